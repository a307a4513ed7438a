"""Sound and picture stay together whatever the time stamps of a file say.

A click sounds with each flash. What a disturbance of the stamps adds to the distance between the
two, beyond what the stamps truly say, is at most 5 ms, anywhere in the clip and from any window.
"""

import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import cache
from pathlib import Path

import av
import av.container
import av.stream
import numpy as np
import pytest

from cavmae.dataloaders.media.audio_layout import lay_out
from cavmae.dataloaders.media.audio_track import AudioTrack
from cavmae.dataloaders.media.decode_clip import decode_clip, stream_seconds
from cavmae.dataloaders.media.errors import DecodeSettings
from cavmae.dataloaders.media.timeline import Timeline, decoding_seconds, flush_packet
from cavmae.dataloaders.media.video_track import VideoTrack

pytestmark = pytest.mark.field

Edit = Callable[[av.Packet, bool], av.Packet | None]
"""Changes a packet before it is written (the second argument: whether it is sound), or drops it."""

FPS, SECONDS = 25, 4
FLASHES = (1, 2, 3)
LIMIT_MS = 5.0
CONTAINERS = {
    "mp4": ("libx264", "aac", 44100),
    "matroska": ("libx264", "libopus", 48000),
    "webm": ("libvpx", "libopus", 48000),
    "mpegts": ("mpeg2video", "mp2", 44100),
    "vob": ("mpeg2video", "mp2", 48000),
    "flv": ("flv1", "libmp3lame", 44100),
    "nut": ("mpeg4", "aac", 48000),
}
"""Those that store the time of each packet, with a codec for video and sound and its rate."""
FAST: dict[str, dict[str, object]] = {"libvpx": {"deadline": "realtime", "cpu-used": "8"}}
"""Options of codecs that take twenty times as long without."""


def write(
    path: Path,
    container: str,
    edit: Edit | None = None,
    background: int = 30,
    keyframe_every: int = 0,
) -> None:
    video_codec, sound_codec, hz = CONTAINERS[container]
    sound = 600 * np.sin(2 * np.pi * 200 * np.arange(SECONDS * hz) / hz)
    burst = np.arange(int(0.04 * hz))
    for at in FLASHES:
        click = 26000 * np.sin(2 * np.pi * 1000 * burst / hz) * np.hanning(len(burst))
        sound[at * hz : at * hz + len(burst)] = click
    with av.open(str(path), "w", format=container) as output:
        video = output.add_stream(video_codec, rate=FPS)
        assert isinstance(video, av.VideoStream)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        video.gop_size = keyframe_every or video.gop_size
        video.options = FAST.get(video_codec, {})
        audio = output.add_stream(sound_codec, rate=hz)
        assert isinstance(audio, av.AudioStream)
        audio.layout = "mono"
        packets = []
        for number in range(SECONDS * FPS):
            level = 230 if number in [at * FPS for at in FLASHES] else background
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), level, np.uint8), "rgb24")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            packets += video.encode(frame)
        packets += video.encode(None)
        size = audio.codec_context.frame_size or 1024
        converter = av.AudioResampler(audio.codec_context.format.name, "mono", hz)
        for start in range(0, len(sound) - size + 1, size):
            block = sound[None, start : start + size].astype(np.int16)
            frame = av.AudioFrame.from_ndarray(block, "s16", "mono")
            frame.sample_rate, frame.pts, frame.time_base = hz, start, Fraction(1, hz)
            packets += [
                packet for part in converter.resample(frame) for packet in audio.encode(part)
            ]
        packets += audio.encode(None)
        for packet in sorted(packets, key=lambda packet: decoding_seconds(packet) or 0.0):
            changed = edit(packet, packet.stream is audio) if edit else packet
            if changed is not None:
                output.mux(changed)


def distances_ms(path: Path, start: float = 0.0, end: float = 60.0) -> np.ndarray:
    """From each flash to the middle of its click."""
    clip = decode_clip(str(path), start, end, DecodeSettings(keep_silent=True))
    found = []
    for frame, time in zip(clip.frames, clip.times_seconds, strict=True):
        if frame[: clip.height].mean() > 120:
            first = max(0, round((time - 0.4) * 16000))
            near = np.abs(clip.audio[first : round((time + 0.45) * 16000)].astype(float))
            loud = np.maximum(near - 2500, 0)
            middle = (np.arange(len(loud)) * loud).sum() / loud.sum() + first
            found.append((middle / 16000 - time) * 1000)
    return np.array(found)


def seconds(packet: av.Packet) -> float:
    return float((packet.pts or 0) * (packet.time_base or 0))


def moved(packet: av.Packet, by: float) -> av.Packet:
    packet.pts = packet.dts = (packet.pts or 0) + round(by / float(packet.time_base or 1))
    return packet


def gap(by: float) -> Edit:
    return lambda packet, sound: moved(packet, by) if sound and seconds(packet) >= 1.5 else packet


def lost(length: float) -> Edit:
    return lambda packet, sound: None if sound and 1.4 <= seconds(packet) < 1.4 + length else packet


def drift(rate: float) -> Edit:
    return lambda packet, sound: moved(packet, rate * seconds(packet)) if sound else packet


def factor(times: float) -> Edit:
    """Stamps that go on too fast, or too slowly, from the first, which is right."""
    first: list[float] = []

    def edit(packet: av.Packet, sound: bool) -> av.Packet:
        if not sound:
            return packet
        first.append(seconds(packet))
        return moved(packet, (times - 1) * (first[-1] - first[0]))

    return edit


def wobble(milliseconds: float) -> Edit:
    count = iter(range(10**6))

    def edit(packet: av.Packet, sound: bool) -> av.Packet:
        if not sound:
            return packet
        return moved(packet, 0.05 - milliseconds / 1000 * math.cos(2 * math.pi * next(count) / 40))

    return edit


def jitter(milliseconds: float) -> Edit:
    random = np.random.default_rng(1)

    def edit(packet: av.Packet, sound: bool) -> av.Packet:
        by = 0.05 + random.uniform(-milliseconds, milliseconds) / 1000
        return moved(packet, by) if sound else packet

    return edit


def first_stamp(by: float) -> Edit:
    count = iter(range(10**6))
    return lambda packet, sound: moved(packet, by) if sound and next(count) == 0 else packet


DISTURBANCES: dict[str, tuple[Callable[[], Edit], Callable[[float], float]]] = {
    "wobble of 16 ms": (lambda: wobble(16), lambda at: 50),
    "wobble of 21 ms": (lambda: wobble(21), lambda at: 50),
    "jitter of 9 ms": (lambda: jitter(9), lambda at: 50),
    "drift of 1%": (lambda: drift(0.01), lambda at: 10 * at),
    "drift of -0.5%": (lambda: drift(-0.005), lambda at: -5 * at),
    "gap of 10 ms": (lambda: gap(0.01), lambda at: 10 * (at > 1.5)),
    "gap of 40 ms": (lambda: gap(0.04), lambda at: 40 * (at > 1.5)),
    "gap of 300 ms": (lambda: gap(0.3), lambda at: 300 * (at > 1.5)),
    "packets lost": (lambda: lost(0.3), lambda at: 0),
    "a wrong first stamp": (lambda: first_stamp(-0.4), lambda at: 0),
}
"""How packets are changed, and how many milliseconds later a click is by the stamps, truly."""


@cache
def undisturbed_ms(folder: Path, container: str) -> float:
    write(folder / f"none.{container}", container)
    return float(np.median(distances_ms(folder / f"none.{container}")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("timing")


@pytest.mark.parametrize("disturbance", DISTURBANCES)
@pytest.mark.parametrize("container", CONTAINERS)
def test_click_and_flash_stay_together(container: str, disturbance: str, folder: Path) -> None:
    edit, truth = DISTURBANCES[disturbance]
    path = folder / f"{disturbance}.{container}"
    write(path, container, edit())
    base = undisturbed_ms(folder, container)
    expected = [truth(at) for at in FLASHES]
    assert distances_ms(path) - base == pytest.approx(expected, abs=LIMIT_MS)
    assert distances_ms(path, 2.6, 3.9) - base == pytest.approx(expected[2:], abs=LIMIT_MS)


@pytest.mark.parametrize("container", ["matroska", "mpegts", "vob"])
def test_joined_files_lie_end_to_end(container: str, folder: Path) -> None:
    base = undisturbed_ms(folder, container)
    second, path = folder / f"second.{container}", folder / f"joined.{container}"
    write(second, container, background=80)
    path.write_bytes((folder / f"none.{container}").read_bytes() + second.read_bytes())
    assert distances_ms(path) - base == pytest.approx([0] * 6, abs=LIMIT_MS)
    assert max(stream_seconds(str(path)).values()) == pytest.approx(2 * SECONDS, abs=0.1)
    clip = decode_clip(str(path), 0.0, 10.0, DecodeSettings())
    assert len(clip.frames) == 2 * SECONDS * FPS
    assert clip.timing["time_started_anew"] == 1 and "audio_overlapping" not in clip.timing
    for start, end, background in ((2.6, 3.9, 30), (5.5, 7.9, 80)):
        clip = decode_clip(str(path), start, end, DecodeSettings())
        seen = np.median([frame[: clip.height].mean() for frame in clip.frames])
        assert (seen - 16) * 255 / 219 == pytest.approx(background, abs=8)
        assert distances_ms(path, start, end) - base == pytest.approx(0, abs=LIMIT_MS)


def test_what_is_joined_begins_where_the_longer_stream_ends(folder: Path) -> None:
    first, second, path = (folder / f"{name}.mkv" for name in ("short", "whole", "longer"))
    write(first, "matroska", lambda packet, sound: packet if sound or seconds(packet) < 3 else None)
    write(second, "matroska")
    path.write_bytes(first.read_bytes() + second.read_bytes())
    clip = decode_clip(str(path), 0.0, 10.0, DecodeSettings())
    assert clip.times_seconds[3 * FPS] == pytest.approx(SECONDS, abs=0.05)
    assert len(clip.audio) / 16000 == pytest.approx(2 * SECONDS, abs=0.1)


@pytest.mark.parametrize("times", [0.5, 1.5, 90.0])
def test_sound_whose_stamps_are_wrong_by_a_factor_is_as_long_as_its_samples(
    times: float, folder: Path
) -> None:
    path = folder / f"factor{times}.mkv"
    write(path, "matroska", factor(times), keyframe_every=10)  # so that the window is sought
    clip = decode_clip(str(path), 0.0, 10.0, DecodeSettings())
    assert len(clip.audio) / 16000 == pytest.approx(SECONDS, abs=0.05)
    assert "stamps_disagree" in clip.timing
    base = undisturbed_ms(folder, "matroska")
    assert distances_ms(path) == pytest.approx([base] * 3, abs=LIMIT_MS)
    assert distances_ms(path, 2.6, 3.9) == pytest.approx([base], abs=LIMIT_MS)


def test_what_was_done_is_counted_by_cause(folder: Path) -> None:
    def timing(edit: Edit) -> dict[str, float]:
        write(folder / "counted.mkv", "matroska", edit)
        return decode_clip(str(folder / "counted.mkv"), 0.0, 10.0, DecodeSettings()).timing

    assert timing(gap(0.3)) == {"audio_filled": pytest.approx(0.3, abs=0.002)}
    assert timing(drift(0.01)) == {"audio_stretched": pytest.approx(0.04, abs=0.002)}
    assert timing(wobble(16)) == {}


class Edited:
    """A container whose packets are changed after reading: muxers refuse to write some stamps."""

    def __init__(self, container: av.container.InputContainer, edit: Edit):
        self.container, self.edit = container, edit

    def demux(self, *streams: av.stream.Stream) -> Iterator[av.Packet]:
        for packet in self.container.demux(*streams):
            changed = self.edit(packet, packet.stream.type == "audio") if packet.size else None
            if changed is not None:
                yield changed


def read(path: Path, edit: Edit) -> tuple[VideoTrack, AudioTrack]:
    with av.open(str(path)) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        frames = VideoTrack(video, 0.0, 10.0, DecodeSettings())
        sound = AudioTrack(audio, 0.0, 10.0, DecodeSettings())
        for packet in Timeline(Edited(container, edit), [video, audio]).packets():  # type: ignore[arg-type]
            (frames if packet.stream is video else sound).decode(packet)
        for track, stream in ((frames, video), (sound, audio)):
            track.decode(flush_packet(stream))
            track.finish()
    return frames, sound


def test_sound_that_is_there_twice_by_its_stamps_is_heard_once(folder: Path) -> None:
    write(folder / "once.mkv", "matroska")
    _, sound = read(folder / "once.mkv", gap(-0.3))
    assert sound.faults == {"audio_overlapping": pytest.approx(0.3, abs=0.01)}
    assert len(sound.waveform()) / 16000 == pytest.approx(SECONDS - 0.3, abs=0.05)


@pytest.mark.parametrize(
    ("stamps", "expected", "moved_frames"),
    [
        ({5: 9.9, 6: 9.94}, {}, 0),
        ({5: 0.9}, {}, 1),
        ({5: 0.16}, {5: 0.2}, 1),
        ({0: 0.9}, {}, 1),
        ({n: 0.2 for n in range(5, 100)}, {}, 95),
    ],
    ids=["two far ahead", "one ahead", "one twice", "the first", "all the same"],
)
def test_a_frame_with_a_stamp_that_cannot_be_right_is_shown_between_its_neighbours(
    stamps: dict[int, float], expected: dict[int, float], moved_frames: int, folder: Path
) -> None:
    write(folder / "odd.mkv", "webm")
    count = iter(range(10**6))

    def edit(packet: av.Packet, sound: bool) -> av.Packet:
        if not sound and (stamp := stamps.get(next(count))) is not None:
            moved(packet, stamp - seconds(packet))
        return packet

    frames, _ = read(folder / "odd.mkv", edit)
    times = {n: n / FPS for n in range(SECONDS * FPS)} | expected
    assert frames.times == pytest.approx(list(times.values()), abs=0.021)
    assert frames.moved <= moved_frames


# ------------------------------------------------------------------------------- the layout alone


def blocks(count: int, hz: int = 48000, size: int = 1024) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.full(count, size)
    return np.arange(count) * size / hz, lengths


def test_exact_stamps_give_one_run() -> None:
    stated, lengths = blocks(200)
    layout = lay_out(stated + 0.25, lengths, 48000)
    assert (layout.hz, layout.starts, layout.positions) == (48000, [0], [12000])


def test_a_shift_has_to_stay() -> None:
    stated, lengths = blocks(200)
    stated[90:92] += 0.04
    assert lay_out(stated, lengths, 48000).starts == [0]
    stated[90:] = blocks(200)[0][90:] + 0.04
    layout = lay_out(stated, lengths, 48000)
    assert layout.starts == [0, 90]
    assert layout.positions[1] == 90 * 1024 + 1920


def test_noise_makes_no_shifts() -> None:
    for seed in range(20):
        stated, lengths = blocks(400)
        noise = np.random.default_rng(seed).uniform(-0.01, 0.01, 400)
        layout = lay_out(stated + noise, lengths, 48000)
        assert layout.starts == [0] and abs(layout.positions[0]) < 0.004 * 48000


def test_blocks_without_stamps_follow_those_that_have_them() -> None:
    stated, lengths = blocks(100)
    stated[1::3] = np.nan
    stated[:2] = np.nan
    layout = lay_out(stated, lengths, 48000)
    assert (layout.starts, layout.positions) == ([0], [0])


def test_stamps_that_go_back_by_seconds_are_wrong() -> None:
    stated, lengths = blocks(200)
    stated[100:] -= 1.8
    layout = lay_out(stated, lengths, 48000)
    assert layout.starts == [0] and layout.disagree


def test_stamps_that_go_back_again_and_again_lose_no_samples() -> None:
    stated, lengths = blocks(400)
    for block, by in ((100, -1.8), (200, 0.3), (300, -1.5)):
        stated[block:] += by
    layout = lay_out(stated, lengths, 48000)
    assert (layout.starts, layout.positions, layout.disagree) == ([0], [0], True)
