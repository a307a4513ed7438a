"""Renders videos with a designed correspondence of video and audio, for the demo and for tests.

Every clip is a function of (seed, index). One to three objects of a shape move in one of four ways;
video and audio depend on the same latent quantities:

| video | audio |
|---|---|
| shape: disc, square, triangle, star, ring | timbre: which partials sound |
| motion: bounce, swing, pulse, jump | envelope of each note |
| size, big to small | pitch, low to high, 3.6 octaves |
| hue, red to violet, not wrapping | slope of the spectrum; band of a noise struck at each event |
| number of objects | number of voices |
| moments of bounces, turns, pulses, jumps | onsets |

A trail behind each object lets a single frame show the motion. Background, position, noise and gain
are drawn independently for video and audio. A model that retrieves the audio of an unseen clip has
learned this design; that says nothing about natural video. With `shuffled_pairs` each clip has the
audio of another one, so that nothing can be learned: the control.
"""

import io
import math
import multiprocessing
import os
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import starmap
from pathlib import Path

import av
import numpy as np

from cavmae.atomic_write import atomic_write, write_text
from cavmae.dataloaders.constants import AUDIO_HZ

SHAPES = ("disc", "square", "triangle", "star", "ring")
MOTIONS = ("bounce", "swing", "pulse", "jump")
CLASSES = tuple(f"{shape}-{motion}" for shape in SHAPES for motion in MOTIONS)

LOWEST_PITCH_HZ = 180.0
PITCH_OCTAVES = 3.6
VOICE_INTERVAL = 1.335
"""Ratio of one voice's pitch to the one below: no simple fraction, so that a chord does not sound
like the partials of one tone."""
TRAIL_SECONDS = (0.32, 0.24, 0.16, 0.08)
TRAIL_OPACITY = (0.22, 0.32, 0.42, 0.54)

PARTIALS = {
    "disc": ((1.0, 1.0),),
    "square": ((1.0, 1.0), (3.0, 0.8), (5.0, 0.65), (7.0, 0.5)),
    "triangle": ((1.0, 1.0), (2.0, 0.9), (4.0, 0.8), (8.0, 0.7)),
    "star": tuple((float(number), 1.0) for number in range(1, 9)),
    "ring": ((1.0, 1.0), (2.76, 0.9), (5.4, 0.8), (8.93, 0.6)),
}
"""Frequency as a multiple of the pitch, and strength before the slope."""


@dataclass(frozen=True)
class Latents:
    """The quantities that video and audio of a clip share; unitless numbers are from 0 to 1."""

    shape: str
    motion: str
    size: float
    hue: float
    objects: int
    events_seconds: tuple[float, ...]
    """Moments of the events, from one before the clip to one after it."""

    @property
    def label(self) -> str:
        return f"{self.shape}-{self.motion}"


def _stream(seed: int, index: int, number: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, index, number))))


def latents(seed: int, index: int, seconds: float = 2.0) -> Latents:
    """The hidden quantities of clip `index`."""
    random = _stream(seed, index, 0)
    shape, motion = SHAPES[random.integers(5)], MOTIONS[random.integers(4)]
    size, hue = random.random(2)
    objects = int(random.integers(1, 4))
    period = float(random.uniform(0.3, 0.75))
    phase = float(random.uniform(-1, 0)) * period
    events = [phase - period]
    while events[-1] <= seconds:
        events.append(events[-1] + period * float(random.uniform(0.85, 1.15)))
    return Latents(shape, motion, float(size), float(hue), objects, tuple(events))


# -------------------------------------------------------------------------------------- sound


def render_audio(hidden: Latents, seed: int, index: int, seconds: float = 2.0) -> np.ndarray:
    """(samples,) int16 mono 16 kHz."""
    random = _stream(seed, index, 1)
    samples = round(seconds * AUDIO_HZ)
    time = np.arange(samples, dtype=np.float32) / AUDIO_HZ
    pitch = LOWEST_PITCH_HZ * 2 ** (PITCH_OCTAVES * (1 - hidden.size))
    slope = 2.0 - 2.0 * hidden.hue
    tone = np.zeros(samples, np.float32)
    for voice in range(hidden.objects):
        for multiple, strength in PARTIALS[hidden.shape]:
            hertz = pitch * VOICE_INTERVAL**voice * multiple
            if hertz < 0.45 * AUDIO_HZ:
                phase = random.uniform(0, 2 * np.pi)
                angle = np.float32(2 * np.pi * hertz) * time + np.float32(phase)
                tone += np.float32(strength * multiple**-slope) * np.sin(angle)
    tone *= _envelope(hidden, time) / max(1e-6, float(np.abs(tone).max()))
    band = _noise_band(random, samples, 300 * 2 ** (4.2 * hidden.hue))
    since = time - np.array(hidden.events_seconds, np.float32)[_event_before(hidden, time)]
    signal = tone + 0.8 * band * np.exp(-since / 0.15)
    decibels = random.uniform(12, 30)
    noise = random.standard_normal(samples, dtype=np.float32)
    noise *= float(np.sqrt(np.mean(signal**2))) * 10 ** (-decibels / 20)
    signal = signal + noise
    gain = random.uniform(0.15, 0.9)
    return (signal / np.abs(signal).max() * gain * 32767).astype(np.int16)


def _event_before(hidden: Latents, time: np.ndarray) -> np.ndarray:
    """Index of the last event at or before each time."""
    events = np.array(hidden.events_seconds)
    return np.clip(np.searchsorted(events, time, side="right") - 1, 0, len(events) - 2)


def _gap_share(hidden: Latents, time: np.ndarray) -> np.ndarray:
    """Where each time lies between two events: 0 at the first, 1 at the next."""
    events = np.array(hidden.events_seconds)
    before = _event_before(hidden, time)
    return (time - events[before]) / (events[before + 1] - events[before])


def _envelope(hidden: Latents, time: np.ndarray) -> np.ndarray:
    before = np.array(hidden.events_seconds)[_event_before(hidden, time)]
    since = time - before
    if hidden.motion == "bounce":  # struck
        envelope = np.exp(-since / 0.07)
    elif hidden.motion == "swing":  # comes and goes
        envelope = 0.5 + 0.5 * np.cos(2 * np.pi * _gap_share(hidden, time))
    elif hidden.motion == "pulse":  # trembles as it fades
        envelope = np.exp(-since / 0.3) * (0.55 + 0.45 * np.cos(2 * np.pi * 18 * since))
    else:  # held, then cut
        envelope = (_gap_share(hidden, time) < 0.6).astype(np.float64)
    attack = np.minimum(1, since / 0.004) if hidden.motion != "swing" else 1
    return (envelope * attack).astype(np.float32)


def _noise_band(random: np.random.Generator, samples: int, centre_hz: float) -> np.ndarray:
    """Noise one third of an octave wide (one standard deviation), peak 1."""
    hertz = np.fft.rfftfreq(samples, 1 / AUDIO_HZ)
    octaves = np.log2(np.maximum(hertz, 1) / centre_hz)
    shape = np.exp(-0.5 * (octaves / 0.33) ** 2)
    noise = np.fft.irfft(np.fft.rfft(random.standard_normal(samples)) * shape, samples)
    return (noise / np.abs(noise).max()).astype(np.float32)


# ------------------------------------------------------------------------------------ picture


def render_frames(
    hidden: Latents, seed: int, index: int, size: int = 64, fps: float = 8, seconds: float = 2.0
) -> np.ndarray:
    """(frames, size, size, 3) uint8 RGB; frame i shows time i / fps."""
    random = _stream(seed, index, 2)
    time = np.arange(round(seconds * fps)) / fps
    # Colours first: numpy's innermost loops are over the last axis.
    picture = _background(random, len(time), size)  # (3, frames, size, size)
    colour = _rgb(0.78 * hidden.hue, random.uniform(0.75, 1), random.uniform(0.8, 1))
    placing = _Placing(hidden, random)
    # The trail lies under the objects: oldest first.
    layers = [*zip(TRAIL_SECONDS, TRAIL_OPACITY, strict=True), (0.0, 1.0)]
    for ago, opacity in layers:
        for number in range(hidden.objects):
            x, y, radius = placing.at(number, time - ago)
            box = _box(x, y, radius, size)
            cover = _cover(hidden.shape, x, y, radius, placing.turn, size, box)
            part = picture[:, :, *box]
            part += cover * np.float32(opacity) * (colour[:, None, None, None] - part)
    picture = np.ascontiguousarray(np.moveaxis(picture, 0, -1))
    noise = random.uniform(0.005, 0.03)
    picture += np.float32(noise) * random.standard_normal(picture.shape, dtype=np.float32)
    return (np.clip(picture, 0, 1) * 255).astype(np.uint8)


def _background(random: np.random.Generator, frames: int, size: int) -> np.ndarray:
    """A still gradient between two dull colours, (3, frames, size, size) float32."""
    first, second = (
        _rgb(random.random(), random.uniform(0, 0.35), random.uniform(0.05, 0.5)) for _ in range(2)
    )
    angle = random.uniform(0, 2 * np.pi)
    x, y = _grid(size)
    share = 0.5 + 0.5 * (math.cos(angle) * (2 * x - 1) + math.sin(angle) * (2 * y - 1)) / 1.42
    still = share * first[:, None, None] + (1 - share) * second[:, None, None]
    return np.repeat(still[:, np.newaxis].astype(np.float32), frames, axis=1)


def _rgb(hue: float, saturation: float, value: float) -> np.ndarray:
    sector = (hue * 6 + np.array([0, 4, 2])) % 6
    pure = np.clip(np.abs(sector - 3) - 1, 0, 1)
    return (value * (1 - saturation * (1 - pure))).astype(np.float32)


def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """x and y of the pixel centres, 0 to 1, each (size, size) float32."""
    line = ((np.arange(size) + 0.5) / size).astype(np.float32)
    return np.meshgrid(line, line)


class _Placing:
    """The positions of the objects over time, as fractions of the image size."""

    def __init__(self, hidden: Latents, random: np.random.Generator):
        self.hidden = hidden
        self.turn = random.uniform(-0.3, 0.3)
        self.shift = random.uniform(-0.06, 0.06, 2)
        self.drift = random.uniform(-0.06, 0.06)
        self.spots = random.uniform(0.2, 0.8, (hidden.objects, len(hidden.events_seconds), 2))

    def at(self, number: int, time: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """x, y and radius of one object at each time."""
        hidden = self.hidden
        event = _event_before(hidden, time)
        share = _gap_share(hidden, time)
        radius = np.full(len(time), 0.06 * 4**hidden.size)
        x = np.full(len(time), (number + 1) / (hidden.objects + 1) + self.shift[0])
        y = np.full(len(time), 0.5 + self.shift[1])
        if hidden.motion == "bounce":
            y = 0.82 + self.shift[1] - radius - 0.5 * 4 * share * (1 - share)
            x = x + self.drift * time
        elif hidden.motion == "swing":
            angle = 0.9 * np.cos(np.pi * (event + share))
            x = x + 0.3 * np.sin(angle)
            y = y - 0.2 + 0.35 * np.cos(angle)
        elif hidden.motion == "pulse":
            radius = radius * (0.8 + 0.5 * np.exp(-3.5 * share))
        else:
            x, y = self.spots[number, event, 0], self.spots[number, event, 1]
        return x, y, radius


def _box(x: np.ndarray, y: np.ndarray, radius: np.ndarray, size: int) -> tuple[slice, slice]:
    """Rows and columns beyond which an object covers nothing in any frame."""
    reach = 1.25 * radius + 1 / size  # the farthest corner of a shape is at 1.21 radii
    low, high = ((size * np.stack([y, x]) + sign * size * reach).astype(int) for sign in (-1, 1))
    rows, columns = np.clip([low.min(1) - 1, high.max(1) + 1], 0, size).T
    return slice(*rows), slice(*columns)


def _cover(
    shape: str,
    x: np.ndarray,
    y: np.ndarray,
    radius: np.ndarray,
    turn: float,
    size: int,
    box: tuple[slice, slice],
) -> np.ndarray:
    """How much an object covers of each pixel of a box: (frames, rows, columns) float32, 0 to 1."""
    columns, rows = (axis[box] for axis in _grid(size))
    inverse = (1 / radius).astype(np.float32)[:, None, None]
    across = (columns - x.astype(np.float32)[:, None, None]) * inverse
    down = (rows - y.astype(np.float32)[:, None, None]) * inverse
    cos, sin = np.float32(math.cos(turn)), np.float32(math.sin(turn))
    across, down = across * cos - down * sin, across * sin + down * cos
    edge = _outside(shape, across, down)
    return np.clip(0.5 - edge / inverse * np.float32(size), 0, 1)


def _outside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Distance from the edge in radii, negative inside (exact near the edge, which is enough)."""
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - np.float32(0.85)
    if shape == "triangle":
        return np.maximum(np.abs(x) * np.float32(0.866) - y * np.float32(0.5), y) - np.float32(0.6)
    distance = np.sqrt(x * x + y * y)
    if shape == "disc":
        return distance - 1
    if shape == "ring":
        return np.abs(distance - np.float32(0.8)) - np.float32(0.24)
    # Star: fold the plane into one tenth, whose edge runs from an outer to an inner corner.
    sector = np.float32(2 * np.pi / 5)
    angle = np.arctan2(x, -y)
    angle = np.abs(angle - sector * np.round(angle / sector))
    outer, inner = 1.15, 0.5
    corner = np.array([inner * math.cos(math.pi / 5), inner * math.sin(math.pi / 5)])
    normal = np.array([corner[1], outer - corner[0]])
    normal = (normal / np.linalg.norm(normal)).astype(np.float32)
    return (
        distance * (np.cos(angle) * normal[0] + np.sin(angle) * normal[1])
        - np.float32(outer) * normal[0]
    )


# -------------------------------------------------------------------------------------- files


def encode_clip(frames: np.ndarray, audio: np.ndarray, fps: float) -> bytes:
    """RGB frames and int16 mono 16 kHz to an MP4 file, H.264 and AAC."""
    stream_of_bytes = io.BytesIO()
    rate = Fraction(fps).limit_denominator(1001)
    with av.open(stream_of_bytes, "w", format="mp4") as container:
        video = container.add_stream(
            "libx264", rate=rate, options={"crf": "20", "preset": "ultrafast"}
        )
        # In as many bytes: a third of the default's time and, for these sounds, nearer to them.
        coder = {"aac_coder": "fast"}
        sound = container.add_stream("aac", rate=AUDIO_HZ, layout="mono", options=coder)
        assert isinstance(video, av.VideoStream)
        assert isinstance(sound, av.AudioStream)
        sound.codec_context.bit_rate = 64000
        video.height, video.width = frames.shape[1:3]
        video.pix_fmt = "yuv420p"
        video.codec_context.thread_count = 1
        video.codec_context.time_base = 1 / rate
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = number
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        piece = av.AudioFrame.from_ndarray(audio[np.newaxis], format="s16", layout="mono")
        piece.sample_rate = AUDIO_HZ
        piece.pts = 0
        for part in (piece, None):
            container.mux(sound.encode(part))
    return stream_of_bytes.getvalue()


def _write_clip(
    folder: Path, seed: int, size: int, fps: float, seconds: float, index: int, sound_index: int
) -> str:
    """Write the video of a clip with the audio of a clip; returns its row of the list."""
    path = folder / f"{index:06d}.mp4"
    hidden = latents(seed, index, seconds)
    frames = render_frames(hidden, seed, index, size, fps, seconds)
    audio = render_audio(latents(seed, sound_index, seconds), seed, sound_index, seconds)
    with atomic_write(path, durable=False) as temporary:
        temporary.write_bytes(encode_clip(frames, audio, fps))
    return f"{path.name},,,{hidden.label}\n"


def generate(
    folder: str | Path,
    count: int,
    seed: int,
    *,
    start_index: int = 0,
    size: int = 64,
    fps: float = 8,
    seconds: float = 2.0,
    shuffled_pairs: bool = False,
    workers: int = 0,
) -> Path:
    """Write clips `start_index` to `start_index + count - 1` and a list of them.

    Args:
        folder: created if missing; files are named by index.
        size: pixels of each side, even.
        shuffled_pairs: give each clip the audio of another one of this call.
        workers: processes; 0: one per core.

    Returns:
        The CSV file (path,start,end,labels) that `cavmae pack` takes; written last.

    Raises:
        ValueError: an argument is out of range.
    """
    if count < 1 or (shuffled_pairs and count < 2):
        raise ValueError(f"count is {count}; use 1 or more, with shuffled_pairs 2 or more")
    if size < 16 or size % 2 or fps <= 0 or seconds <= 0:
        raise ValueError(
            f"size is {size}, fps {fps}, seconds {seconds}; use an even size from 16 and "
            f"values above 0"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sounds = _other_clips(count, seed) if shuffled_pairs else np.arange(count)
    write = partial(_write_clip, folder, seed, size, fps, seconds)
    jobs = [(start_index + clip, start_index + sound) for clip, sound in enumerate(sounds.tolist())]
    workers = min(workers or len(os.sched_getaffinity(0)), -(-count // 16))
    if workers == 1:
        rows = list(starmap(write, jobs))
    else:
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            rows = pool.starmap(write, jobs, chunksize=16)
    listing = folder / "clips.csv"
    write_text(listing, "".join(["path,start,end,labels\n", *rows]))
    return listing


def _other_clips(count: int, seed: int) -> np.ndarray:
    """Draw a permutation in which no clip keeps its audio: one random cycle through all."""
    order = _stream(seed, 0, 3).permutation(count)
    sounds = np.empty(count, np.int64)
    sounds[order] = np.roll(order, 1)
    return sounds
