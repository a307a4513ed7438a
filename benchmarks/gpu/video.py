"""`cavmae bench video-check`: decodes each codec of the shards with DALI, as training does, and
compares the pictures with those of the readers' decoders (PyAV, and Pillow for JPEGs).

On a GPU DALI takes NVDEC and nvJPEG. Frames of one size show what a decoder can do, all sizes in
mixed order what a set costs: where a decoder is made for every frame, that is many times slower.
Where something that decoding on a GPU needs is absent, it is named with its fix.
"""

import io
import random
import time
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

import av
import numpy as np
import torch
import tyro
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image

from cavmae.benchmarks.harness.records import RecordedConfig, write_record
from cavmae.benchmarks.harness.timing import Device
from cavmae.cluster.local.checks import Finding, dali, gpu, library, nvdec, show
from cavmae.console import plain_console
from cavmae.dataloaders.constants import IMAGE_STD, WINDOW_SAMPLES
from cavmae.dataloaders.loading.dali import ClipDecoder, error_line
from cavmae.dataloaders.loading.reader import EncodedClip, ReadTask
from cavmae.dataloaders.media.audio_codec import encode_audio
from cavmae.dataloaders.media.decode_frame import decode_frame
from cavmae.dataloaders.media.encode_video import VideoCodec, encode_jpegs, encode_video
from cavmae.dataloaders.media.headers import payload_of
from cavmae.dataloaders.media.video_size import LONG_SIDES, SMALLEST, stored_size
from cavmae.field_checks import Seconds

SHORT_SIDE = 256
CODECS: tuple[VideoCodec, ...] = get_args(VideoCodec)
SHAPES = {"16:9": (454, 256), "4:3": (340, 256), "portrait": (256, 454), "240p": (426, 240)}
"""Width and height of common pictures before they are cropped."""
MIXED = "all sizes, mixed"
BATCH, PICTURES = 64, 2
"""Frames of a batch, and different ones of each size."""
TIMED_SECONDS, TIMED_BATCHES = 1.0, 2
"""A row is timed for so long, and so many batches, at least."""
OUTPUT_SIDE = 256
"""Pixels; the whole picture is resized to this square."""
LOWEST_PSNR_DB = 30.0
"""Frames of another size, or with the wrong range of colours, are below 25 dB; those of decoders
that enlarge the colours in another way, above 35 dB."""


@dataclass(frozen=True)
class VideoCheckConfig(RecordedConfig):
    """Decode each codec with DALI in several sizes, and compare the pictures with PyAV's.

    Raises:
        ValueError: an option out of its range.
    """

    device: Device = "cuda"
    """`cuda`: NVDEC and nvJPEG of a GPU. `cpu`: DALI's decoders for CPUs."""
    seconds: Seconds = 80.0
    """Time after which no further row is measured."""
    threads: tuple[int, ...] = (8, 16)
    """Threads of a decode pipeline."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.threads, default=0) < 1:
            raise ValueError(f"threads is {self.threads}; use numbers from 1")


@dataclass(frozen=True)
class Frames:
    """Encoded frames of one size, and what they show.

    Attributes:
        encoded: JPEGs or one-frame videos.
        pixels: `(height, width, 3)` uint8 each, by the decoders of the readers.
    """

    encoded: list[bytes]
    pixels: list[np.ndarray]


def check_video(
    device: torch.device, budget_seconds: float, threads: tuple[int, ...] = (8, 16)
) -> list[dict[str, Any]]:
    """Decode each codec in common sizes, in all sizes mixed, and in the smallest that NVDEC takes.

    Args:
        device: a GPU, or the CPU.
        budget_seconds: after which no further row is measured.
        threads: of a decode pipeline; the first counts most.

    Returns:
        A row for each codec, size and number of threads, the most telling first, with
        `frames_per_second`, `first_batch_seconds` and the lowest `psnr_db` against the CPU;
        `failed` with the reason where DALI fails or a picture is wrong, `skipped` where it was not
        tried.
    """
    deadline = time.monotonic() + budget_seconds
    sizes = {name: stored_size(*whole, SHORT_SIDE, "vp9") for name, whole in SHAPES.items()}
    longs = [n * SHORT_SIDE // 16 for n in LONG_SIDES]
    mixed = [*((long, SHORT_SIDE) for long in longs), *((SHORT_SIDE, long) for long in longs[1:])]
    cases: list[tuple[str, str, list[tuple[int, int]], int]] = []
    for count in threads:
        for name, some in {MIXED: mixed, **{n: [size] for n, size in sizes.items()}}.items():
            cases += [(codec, name, some, count) for codec in (*CODECS, "jpeg")]
    cases += [(codec, "smallest", [SMALLEST[codec]], threads[0]) for codec in CODECS]
    made: dict[tuple[str, int, int], Frames] = {}
    rows = []
    for codec, name, some, count in cases:
        row: dict[str, Any] = {"codec": codec, "size": name, "threads": count}
        rows.append(row)
        if device.type == "cpu" and codec == "h264":
            row["skipped"] = "DALI has no H.264 for CPUs: the readers decode it there"
        elif time.monotonic() > deadline:
            row["skipped"] = "out of time"
        else:
            for size in some:
                if (codec, *size) not in made:
                    made[codec, *size] = _frames(codec, *size)
            row |= _decode([made[codec, *size] for size in some], codec, device, count)
            print(f"  {_in_words(row)}", flush=True)
    return rows


def _in_words(row: dict[str, Any]) -> str:
    found = [row["failed"]] if "failed" in row else []
    if "frames_per_second" in row:
        found = [
            f"{row['frames_per_second']:,.0f} frames/s",
            f"the first batch in {row['first_batch_seconds']:.2f} s",
            f"{row['psnr_db']:.1f} dB",
            *found,
        ]
    return f"{row['codec']}, {row['size']}, {row['threads']} threads: {', '.join(found)}"


def _frames(codec: str, width: int, height: int) -> Frames:
    """Encode pictures with fine detail in brightness and soft colours."""
    encoded, pixels = [], []
    for seed in range(PICTURES):
        rng = np.random.default_rng((seed, width, height))
        coarse = Image.fromarray(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8))
        picture = np.array(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
        picture += 20 * (np.indices((height, width)).sum(0)[..., None] // 4 % 2).astype(np.int16)
        rgb = av.VideoFrame.from_ndarray(picture.clip(0, 255).astype(np.uint8), format="rgb24")
        planes = rgb.reformat(
            format="yuv420p", dst_colorspace=Colorspace.ITU601, dst_color_range=ColorRange.MPEG
        ).to_ndarray()
        if codec == "jpeg":
            (frame,) = encode_jpegs([planes])
            with Image.open(io.BytesIO(frame)) as image:
                shown = np.array(image)
        else:
            frame = encode_video([planes], (width, height), codec, 25.0)  # pyright: ignore[reportArgumentType]
            shown = decode_frame(frame, width, height)
        encoded.append(payload_of(frame) if codec == "mjpeg" else frame)
        pixels.append(shown)
    return Frames(encoded, pixels)


def _decode(sizes: list[Frames], codec: str, device: torch.device, threads: int) -> dict[str, Any]:
    """Time batches of frames of all sizes in random order, and compare one with their pixels."""
    gpu = (device.index or 0) if device.type == "cuda" else None
    frames = [pair for some in sizes for pair in zip(some.encoded, some.pixels, strict=True)]
    batch = [frames[number % len(frames)] for number in range(BATCH)]
    random.Random(0).shuffle(batch)
    sound = encode_audio(np.arange(WINDOW_SAMPLES, dtype=np.int16), "wav")
    task, box = ReadTask(0, 0, 0, 0), (0.0, 0.0, 1.0, 1.0)
    clips = [
        EncodedClip(task, "", (), sound, (frame,), None, box, False, (0.0,), (0.0, 0.0))
        for frame, _ in batch
    ]
    plain = [
        replace(clip, frames=(b"\0",), pixels=(pixels,))
        for clip, (_, pixels) in zip(clips, batch, strict=True)
    ]

    def run(decoder: ClipDecoder, some: list[EncodedClip]) -> torch.Tensor:
        decoder.schedule(some)
        return torch.as_tensor(decoder.collect().frames)

    try:
        began = time.perf_counter()
        decoder = ClipDecoder(codec in ("mjpeg", "jpeg"), OUTPUT_SIDE, BATCH, threads, gpu)
        decoded = last = run(decoder, clips).cpu()
        first = time.perf_counter() - began
        began, count = time.perf_counter(), 0
        while count < TIMED_BATCHES or time.perf_counter() - began < TIMED_SECONDS:
            last = run(decoder, clips)
            count += 1
        rate = count * BATCH / (time.perf_counter() - began)
        reference = run(ClipDecoder(False, OUTPUT_SIDE, BATCH, threads, gpu), plain).cpu()
    except RuntimeError as error:  # DALI's own, and of a pipeline that cannot be built
        return {"failed": error_line(str(error))}
    found: dict[str, Any] = {
        "frames_per_second": rate,
        "first_batch_seconds": first,
        "psnr_db": min(_psnr_db(decoded, reference), _psnr_db(last.cpu(), reference)),
    }
    if found["psnr_db"] < LOWEST_PSNR_DB:
        found["failed"] = f"a picture differs from the CPU's: below {LOWEST_PSNR_DB:g} dB"
    return found


def _psnr_db(decoded: torch.Tensor, reference: torch.Tensor) -> float:
    """The lowest of a batch's frames."""
    std = 255 * torch.tensor(IMAGE_STD)[:, None, None]
    errors = ((decoded - reference) * std).square().mean(dim=(1, 2, 3, 4))
    return float(10 * torch.log10(255**2 / errors.max().clamp_min(1e-6)))


def mixed_over_single(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The rate of mixed sizes over the mean of those of single sizes, by codec, with the first
    number of threads: far below 1, decoders are not found again."""
    rates: dict[str, dict[str, float]] = {}
    for row in rows:
        if "frames_per_second" in row and row["size"] in (MIXED, *SHAPES):
            of_codec = rates.setdefault(row["codec"], {})
            of_codec.setdefault(row["size"], row["frames_per_second"])
    return {
        codec: some[MIXED] * (len(some) - 1) / (sum(some.values()) - some[MIXED])
        for codec, some in rates.items()
        if MIXED in some and len(some) > 1
    }


def findings() -> list[Finding]:
    """Probe everything that decoding on a GPU needs."""
    driver = "install the NVIDIA driver; in a container, pass the GPU in"
    return [gpu(), library("libcuda.so.1", driver), nvdec(), dali()]


def main(arguments: list[str]) -> int:
    """Check, print and write the record; returns 0 where all codecs decode, else 1.

    Raises:
        ValueError: the device is a GPU, and something that it needs is absent.
    """
    config = tyro.cli(VideoCheckConfig, prog="cavmae bench video-check", args=arguments)
    found = findings() if config.device == "cuda" else []
    if absent := ", ".join(one.name for one in found if one.state != "ok"):
        show(found, plain_console(highlight=False))
        raise ValueError(
            f"device is cuda, and no video decodes on a GPU here, without {absent}; mend that, or "
            f"try DALI's decoders for CPUs with --device cpu"
        )
    device = torch.device(config.device)
    rows = check_video(device, config.seconds, config.threads)
    skipped = {row["skipped"] for row in rows if "skipped" in row}
    for reason in sorted(skipped):
        count = sum(row.get("skipped") == reason for row in rows)
        print(f"{count} of {len(rows)} skipped: {reason}")
    ratios = mixed_over_single(rows)
    said = ", ".join(f"{codec} {ratio:.2f}" for codec, ratio in ratios.items())
    print(f"frames/s of mixed sizes over those of single sizes: {said or 'not measured'}")
    failed = [row for row in rows if "failed" in row]
    print(f"{len(failed)} failed" if failed else "all pictures are those of the CPU")
    results = {
        "rows": rows,
        "mixed_over_single": ratios,
        "probes": [asdict(one) for one in found],
    }
    settings = {"device": config.device, "threads": list(config.threads), "batch": BATCH}
    print(f"record: {write_record(config.out, 'video-check', device, settings, results)}")
    return 1 if failed else 0
