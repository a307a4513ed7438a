"""`cavmae bench tiers`: size, cost and quality of each way to store a clip.

The same videos are packed in every way. Bytes and CPU time are of one clip; decoding is what a
reader and DALI do for a clip with one frame at a moment drawn for it. PSNR is of the ten frames
against those that were decoded from the source, in RGB, over the stored part of the whole clip; the
median of the clips. On a GPU, decoding is timed there too, by threads and pipelines. MJPEG is
decoded as JPEGs and, for comparison, by DALI's video decoder on the CPU, in turn.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import av
import numpy as np
import torch
import tyro
from av.video.reformatter import VideoReformatter
from rich.console import Console

from cavmae.benchmarks.data.clips import make_videos
from cavmae.benchmarks.harness.records import RecordedConfig, write_record
from cavmae.benchmarks.report.console import show
from cavmae.dataloaders.config import ClipShape, DataConfig
from cavmae.dataloaders.constants import (
    AUDIO_CODECS,
    FRAMES_PER_CLIP,
    IMAGE_STD,
    MIDDLE_FRAME,
)
from cavmae.dataloaders.loading.dali import ClipDecoder
from cavmae.dataloaders.loading.reader import ClipReader, EncodedClip, ReaderSettings, ReadTask
from cavmae.dataloaders.media.audio_codec import decode_audio, encode_audio
from cavmae.dataloaders.media.decode_clip import DecodedClip, decode_clip
from cavmae.dataloaders.media.encode_video import ENCODERS, encode_jpegs, encode_video
from cavmae.dataloaders.media.errors import DecodeSettings
from cavmae.dataloaders.media.video_size import crop_middle, stored_size
from cavmae.dataloaders.media.video_track import rgb_pixels
from cavmae.dataloaders.packing.pack import PackConfig, pack
from cavmae.dataloaders.shards.shard_set import ShardSet
from cavmae.dataloaders.tools.inspect import frame_pixels
from cavmae.field_checks import PositiveInt

T = TypeVar("T")
SHAPE = ClipShape(audio_frames=1024, mel_bins=128, image_size=224)
BATCH = 16
ON_GPU = ((1, 8), (1, 16), (2, 8))
"""Pipelines, and threads of each."""
SOUND_TURNS = 5
LOSSLESS_DB = 99.0
"""PSNR recorded if nothing is lost."""


@dataclass(frozen=True)
class TiersConfig(RecordedConfig):
    """Compare the size, cost and quality of each way to store a clip.

    Raises:
        ValueError: an option out of its range.
    """

    videos: str = ""
    """Folder of videos; empty: 720p videos are generated."""
    clips: PositiveInt = 32
    """Videos to generate."""
    rounds: PositiveInt = 5
    """Turns of each decoder."""
    work_dir: str = "runs/bench-tiers"
    """Folder of the packed sets, kept for the next run."""


def main(arguments: list[str]) -> int:
    """Measure, print and write the record; returns the exit code."""
    config = tyro.cli(TiersConfig, prog="cavmae bench tiers", args=arguments)
    work = Path(config.work_dir)
    videos = Path(config.videos) if config.videos else make_videos(work, config.clips)
    sets = _packed(videos, work / "sets" / videos.resolve().name)
    gpu = 0 if torch.cuda.is_available() else None
    results: dict[str, Any] = {
        "clips": sets["frames"].samples,
        "pictures": {},
        "sound": _sounds(sets),
    }
    costs = _encoding(videos, sets["frames"])
    results["source"] = {
        **_lengths(sets["original"]),
        "decode_cpu_seconds": costs.pop("decoding the source"),
    }
    decoding = _in_turn(sets, config.rounds)
    for name, shards in sets.items():
        results["pictures"][name] = {
            "bytes": _picture_bytes(shards),
            "pack_cpu_seconds": costs.get(name, 0.0),
            "decode_cpu_seconds": statistics.median(decoding[name]["cpu_seconds"]),
            "decode_clips_per_second": statistics.median(decoding[name]["clips_per_second"]),
            "psnr_db": _quality(videos, shards),
            "cropped": _cropped(shards),
            "gpu_clips_per_second": gpu if gpu is None else _on_gpu(shards, gpu, config.rounds),
        }
    results["mjpeg"] = _mjpeg_both_ways(sets["video, mjpeg"], config.rounds)
    device = torch.device("cpu" if gpu is None else "cuda")
    show(write_record(config.out, "tiers", device, vars(config), results))
    return 0


# ----------------------------------------------------------------------------------- storing


def _packed(videos: Path, work: Path) -> dict[str, ShardSet]:
    """Pack the videos in every way."""
    sets = {}
    for codec in ENCODERS:
        tiers = "frames,original,video" if codec == "vp9" else "video"
        config = PackConfig(
            str(videos), str(work / codec), tiers=tiers, video_codec=codec, audio_codec="wav"
        )
        pack(config, Console(quiet=True))
        sets[f"video, {codec}"] = ShardSet(work / codec / "video")
    others = {tier: ShardSet(work / "vp9" / tier) for tier in ("frames", "original")}
    return {"frames": others["frames"], **sets, "original": others["original"]}


def _places(shards: ShardSet) -> Iterator[tuple[int, int]]:
    return map(shards.at, range(shards.samples))


def _picture_bytes(shards: ShardSet) -> float:
    """Average the bytes of a clip without its sound and description."""
    names = [name for name in shards.members if name not in ("json", shards.audio_codec)]
    sizes = [sum(shards.member_size(*place, name) for name in names) for place in _places(shards)]
    return statistics.fmean(sizes)


def _cropped(shards: ShardSet) -> float:
    """Average the fraction of the picture that is cropped away."""
    pictures = [shards.description(*place)["video"] for place in _places(shards)]
    return statistics.fmean(one.get("cropped_from", {"lost": 0.0})["lost"] for one in pictures)


def _lengths(original: ShardSet) -> dict[str, float]:
    seconds, frames = [], []
    for place in _places(original):
        described = original.description(*place)
        seconds.append(described["audio"]["samples"] / described["audio"]["hz"])
        frames.append(described["video"]["frames"])
    return {"seconds": statistics.fmean(seconds), "frames": statistics.fmean(frames)}


def _timed(function: Callable[[], T]) -> tuple[float, T]:
    began = time.process_time()
    result = function()
    return time.process_time() - began, result


def _encoding(videos: Path, frames: ShardSet) -> dict[str, float]:
    """Measure CPU-seconds a clip of encoding, and of decoding the source before it."""
    spent: dict[str, list[float]] = defaultdict(list)
    for place in _places(frames):
        seconds, clip = _timed(lambda place=place: _source_clip(videos, frames, place))
        spent["decoding the source"].append(seconds)
        ten = [one["index"] for one in frames.description(*place)["ten_frames"]]
        pictures = [clip.frames[index] for index in sorted(set(ten))]
        spent["frames"].append(_timed(lambda some=pictures: encode_jpegs(some))[0])
        for codec in ENCODERS:
            size = stored_size(clip.width, clip.height, DecodeSettings.short_side, codec)
            seconds, _ = _timed(
                lambda clip=clip, size=size, codec=codec: encode_video(
                    clip.frames, size, codec, clip.frames_per_second
                )
            )
            spent[f"video, {codec}"].append(seconds)
    return {name: statistics.fmean(some) for name, some in spent.items()}


def _source_clip(videos: Path, shards: ShardSet, place: tuple[int, int]) -> DecodedClip:
    """Decode a clip as packing does."""
    path = videos / shards.description(*place)["source"]["path"]
    config = PackConfig(str(videos), "")
    return decode_clip(str(path), 0.0, config.clip_seconds, config.decode_settings())


def _sounds(sets: dict[str, ShardSet]) -> dict[str, dict[str, float]]:
    """Measure bytes and CPU-seconds of encoding and decoding the sound of a clip, by codec."""
    shards = sets["frames"]
    found: dict[str, dict[str, float]] = {}
    sounds = [decode_audio(shards.member(*place, "wav")) for place in _places(shards)]
    for codec in AUDIO_CODECS:
        packing, stored = _timed(
            lambda codec=codec: [encode_audio(sound, codec) for sound in sounds]
        )
        # A moment of audio costs what the rest of the pipeline does.
        moment = encode_audio(np.ones(400, dtype=np.int16), codec)
        decoding = _sound_decoding(stored) - _sound_decoding([moment] * len(stored))
        found[codec] = {
            "bytes": statistics.fmean(map(len, stored)),
            "pack_cpu_seconds": packing / len(sounds),
            "decode_cpu_seconds": decoding / len(sounds),
        }
    return found


def _sound_decoding(stored: list[bytes]) -> float:
    """Measure CPU-seconds of a pipeline that decodes these sounds, with tiny frames."""
    pixels = (np.zeros((8, 8, 3), dtype=np.uint8),)
    box, task = (0.0, 0.0, 1.0, 1.0), ReadTask(0, 0, 0, 0)
    clips = [
        EncodedClip(task, "", (), sound, (b"\0",), pixels, box, False, (0.0,), (0.0, 1.0))
        for sound in stored
    ]
    decoder = ClipDecoder(False, 8, len(clips), 2, None)

    def turn() -> None:
        decoder.schedule(clips)
        decoder.collect()

    return min(_timed(turn)[0] for _ in range(SOUND_TURNS))


# ---------------------------------------------------------------------------------- decoding


def _in_turn(sets: dict[str, ShardSet], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Decode every set on the CPU in turns; the first turn does not count."""
    found: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in sets}
    for number in range(rounds + 1):
        for name, shards in sets.items():
            for key, value in _decoding(shards, None).items():
                if number:
                    found[name][key].append(value)
    return found


def _decoding(
    shards: ShardSet, gpu: int | None, pipelines: int = 1, threads: int = 2
) -> dict[str, float]:
    """Measure clips/s, and CPU-seconds a clip, of reading and decoding some batches."""
    settings = ReaderSettings(shards, DataConfig(), SHAPE, 0, True, gpu)
    reader = ClipReader(settings)
    decoders = [ClipDecoder.of(settings, BATCH, threads) for _ in range(pipelines)]
    places = list(_places(shards))
    batches = max(2, 4 * pipelines)
    clips = 0
    cpu = began = 0.0
    under_way: list[ClipDecoder] = []
    for number in range(batches + pipelines):
        if number == pipelines:  # Each pipeline has had its first, slow one.
            while under_way:
                under_way.pop(0).collect()
            clips, cpu, began = 0, time.process_time(), time.perf_counter()
        some = []
        for position in range(number * BATCH, (number + 1) * BATCH):
            shard, sample = places[position % len(places)]
            clip = reader(ReadTask(position, 0, shard, sample))
            if not isinstance(clip, EncodedClip):
                raise RuntimeError(f"a clip of {shards.folder} cannot be read: {clip}")
            some.append(clip)
        if len(under_way) == pipelines:
            under_way.pop(0).collect()
        decoder = decoders[number % pipelines]
        decoder.schedule(some)
        under_way.append(decoder)
        clips += len(some)
    while under_way:
        under_way.pop(0).collect()
    return {
        "clips_per_second": clips / (time.perf_counter() - began),
        "cpu_seconds": (time.process_time() - cpu) / clips,
    }


def _on_gpu(shards: ShardSet, gpu: int, rounds: int) -> dict[str, float]:
    """Measure clips/s by pipelines and threads."""
    return {
        f"{pipelines} x {threads} threads": statistics.median(
            _decoding(shards, gpu, pipelines, threads)["clips_per_second"] for _ in range(rounds)
        )
        for pipelines, threads in ON_GPU
    }


def _mjpeg_both_ways(shards: ShardSet, rounds: int) -> dict[str, float]:
    """Decode the middle frames of MJPEG as JPEGs and by DALI's video decoder, in turn: CPU-seconds
    a frame, and the mean difference in levels of 0 to 255."""
    settings = ReaderSettings(shards, DataConfig(), SHAPE, 0, False, None)
    reader = ClipReader(settings)
    images = [reader(ReadTask(0, 0, *place)) for place in _places(shards)]
    images = [clip for clip in images if isinstance(clip, EncodedClip)]
    videos = []
    for clip, place in zip(images, _places(shards), strict=True):
        middle = shards.description(*place)["ten_frames"][MIDDLE_FRAME]["index"]
        videos.append(replace(clip, frames=(shards.frame(*place, middle),)))
    pixels, costs = {}, defaultdict(list)
    for number in range(rounds + 1):
        for name, clips in (("image", images), ("video", videos)):
            decoder = ClipDecoder(name == "image", SHAPE.image_size, len(clips), 2, None)
            decoder.schedule(clips)
            decoder.collect()
            decoder.schedule(clips)
            seconds, decoded = _timed(decoder.collect)
            pixels[name] = decoded.frames
            costs[name] += [seconds / len(clips)] if number else []
    levels = np.abs(pixels["image"] - pixels["video"]).mean() * 255 * np.mean(IMAGE_STD)
    return {"levels": float(levels)} | {
        f"{name}_cpu_seconds": statistics.median(some) for name, some in costs.items()
    }


# ----------------------------------------------------------------------------------- quality


def _quality(videos: Path, shards: ShardSet) -> float:
    """Compute the PSNR in dB of the ten frames against those of the source."""
    reformatter = VideoReformatter()
    values = []
    for place in _places(shards):
        source = _source_clip(videos, shards, place)
        errors, described = [], shards.description(*place)
        size = described["video"]["width"], described["video"]["height"]
        for number in range(FRAMES_PER_CLIP):
            whole = source.frames[described["ten_frames"][number]["index"]]
            planes = av.VideoFrame.from_ndarray(crop_middle(whole, *size), format="yuv420p")
            truth = rgb_pixels(planes, reformatter).astype(np.float64)
            errors.append(((frame_pixels(shards, *place, number) - truth) ** 2).mean())
        error = float(np.mean(errors))
        values.append(10 * np.log10(255**2 / error) if error > 0 else LOSSLESS_DB)
    return float(np.median(values))
