"""The clips of `cavmae bench data`: made once, then packed for each contender."""

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image
from rich.console import Console

from cavmae.atomic_write import atomic_write
from cavmae.benchmarks.data.published_loader import write_published
from cavmae.dataloaders.constants import AUDIO_HZ, FRAMES_PER_CLIP
from cavmae.dataloaders.packing.pack import PackConfig, pack
from cavmae.dataloaders.shards.shard_set import ShardSet

HEIGHT, WIDTH, FPS, SECONDS = 720, 1280, 25, 10
GROUP = 250
"""Frames between key frames: x264's default."""


def make_videos(work: Path, count: int) -> Path:
    """Write `raw/*.mp4` (720p H.264 and AAC) in `work`, and return that folder.

    Existing videos are reused.
    """
    raw = work / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        path = raw / f"{number:04d}.mp4"
        if not path.exists():
            _write_video(path, number)
    return raw


def make_clips(work: Path, count: int) -> None:
    """Write the videos, `wav/{frames,video}`, `flac/frames` and `published/` in `work`."""
    raw = str(make_videos(work, count))
    wav = PackConfig(raw, str(work / "wav"), audio_codec="wav", clips_per_shard=16)
    pack(wav, Console(quiet=True))
    flac = PackConfig(raw, str(work / "flac"), tiers="frames", clips_per_shard=16)
    pack(flac, Console(quiet=True))
    published = work / "published"
    if not published.exists():
        part = work / "published.part"
        part.mkdir(exist_ok=True)
        _lay_out(ShardSet(work / "wav" / "frames"), part)
        part.rename(published)


def _lay_out(shards: ShardSet, folder: Path) -> None:
    for clip in map(shards.at, range(shards.samples)):
        frames = [
            Image.open(io.BytesIO(shards.member(*clip, f"{place}.jpg")))
            for place in range(FRAMES_PER_CLIP)
        ]
        key = shards.description(*clip)["key"]
        write_published(folder, key, shards.member(*clip, "wav"), frames)


def _write_video(path: Path, seed: int) -> None:
    """Write a video of a drifting soft texture, with a small sharp square moving over it."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (45, 80, 3), dtype=np.uint8))
    picture = np.array(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))
    grain = rng.integers(0, 12, (HEIGHT, WIDTH, 1), dtype=np.uint8)
    with (
        atomic_write(path, durable=False) as temporary,
        av.open(str(temporary), "w", format="mp4") as container,
    ):
        video = container.add_stream("libx264", rate=FPS, options={"preset": "veryfast"})
        sound = container.add_stream("aac", rate=44100, layout="mono")
        assert isinstance(video, av.VideoStream) and isinstance(sound, av.AudioStream)
        video.height, video.width, video.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        video.gop_size = GROUP
        video.codec_context.time_base = Fraction(1, FPS)
        for number in range(FPS * SECONDS):
            pixels = np.roll(picture, (2 * number, 5 * number), (0, 1)) // 2
            pixels += np.roll(grain, 37 * number, 1)
            x, y = 11 * number % (WIDTH - 80), 7 * number % (HEIGHT - 80)
            pixels[y : y + 80, x : x + 80] = 255 - pixels[y : y + 80, x : x + 80]
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = number
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        angle = 2 * np.pi * rng.uniform(100, 2000) * np.arange(44100 * SECONDS) / 44100
        wave = (np.sin(angle) * 9000 + rng.normal(0, 1500, len(angle))).astype(np.int16)
        for first in range(0, len(wave), AUDIO_HZ):
            samples = wave[None, first : first + AUDIO_HZ]
            piece = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
            piece.sample_rate, piece.pts = 44100, first
            container.mux(sound.encode(piece))
        container.mux(sound.encode(None))
