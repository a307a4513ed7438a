"""`cavmae bench data`: our loader against the published one and against raw video, in one run.

Every contender loads the same 10 s clips as batches on this machine's CPUs, in turn and several
times; clips/s and CPU-seconds a clip are of the process and all its children. Then what a loader
costs beside decoding, the time to the first batch from any position, the plan of a set of 10^8
samples, and the memory over many samples.
"""

import itertools
import json
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import tyro
from torch.utils.data import Dataset

from cavmae.benchmarks.data.clips import make_clips
from cavmae.benchmarks.data.published_loader import PublishedDataset, RawVideoDataset, batches
from cavmae.benchmarks.harness.plots import plot_beside
from cavmae.benchmarks.harness.records import RecordedConfig, bar, timing, write_record
from cavmae.benchmarks.report.console import show
from cavmae.dataloaders.config import ClipShape, DataConfig
from cavmae.dataloaders.loading.dali import ClipDecoder
from cavmae.dataloaders.loading.loader import TrainLoader
from cavmae.dataloaders.loading.reader import ClipReader, EncodedClip, ReaderSettings, ReadTask
from cavmae.dataloaders.media.log_mel import log_mel
from cavmae.dataloaders.sampling.step_shares import StepShares
from cavmae.dataloaders.shards.shard_set import ShardSet
from cavmae.field_checks import PositiveInt

SHAPE = ClipShape(audio_frames=1024, mel_bins=128, image_size=224)
BATCH, LANES = 16, 4
CPU = torch.device("cpu")
POSITIONS = (0, 10**4, 10**7, 10**12)

_PLAN = """
import json, time
import numpy as np
from cavmae.dataloaders.sampling.sample_plan import SamplePlan
from cavmae.dataloaders.sampling.step_shares import StepShares

def peak_bytes():
    return 1024 * int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0])

began = time.perf_counter()
plan = SamplePlan([1000] * 100_000, seed=0, lanes=4096, window=4096)
made = time.perf_counter() - began
shares = StepShares(global_batch=4096 * 512, lanes=4096, world_size=4096, micro_batch=512)
offsets = shares.offsets(17)
times = []
for step in range(10**6, 10**6 + 50):
    began = time.perf_counter()
    plan.at(step * shares.global_batch + offsets)
    times.append(time.perf_counter() - began)
print(json.dumps({"make_seconds": made, "first_seconds": times[0],
                  "warm_seconds": float(np.median(times[1:])), "peak_bytes": peak_bytes()}))
"""


@dataclass(frozen=True)
class LoaderBenchConfig(RecordedConfig):
    """Compare our loader with others, on the CPUs.

    Raises:
        ValueError: an option out of its range.
    """

    clips: PositiveInt = 32
    """Different clips."""
    rounds: PositiveInt = 3
    """Turns of each contender."""
    batches: PositiveInt = 12
    """Timed batches of a turn."""
    workers: tuple[int, ...] = (1, 2)
    """Reader processes, one turn for each number."""
    memory_samples: PositiveInt = 20_000
    """Samples over which memory is watched."""
    work_dir: str = "runs/bench-data"
    """Folder of the clips, kept for the next run."""


def main(arguments: list[str]) -> int:
    """Measure, print, write the record and a plot; returns the exit code."""
    config = tyro.cli(LoaderBenchConfig, prog="cavmae bench data", args=arguments)
    work = Path(config.work_dir) / f"{config.clips}-clips"
    print(f"clips in {work}: existing ones are reused")
    make_clips(work, config.clips)
    results: dict[str, Any] = {
        "contenders": _contest(work, config.workers, config.rounds, config.batches),
        "parts": {tier: _parts(work / "wav" / tier) for tier in ("frames", "video")},
        "first_batch": _first_batches(work / "wav" / "frames"),
        "plan": json.loads(
            subprocess.run(
                [sys.executable, "-c", _PLAN], check=True, capture_output=True, text=True
            ).stdout
        ),
        "memory": _memory(work / "wav" / "frames", config.memory_samples),
    }
    results["bars"] = bars(results)
    path = write_record(config.out, "data", CPU, vars(config), results)
    show(path)
    _plot(results, path)
    return 0


# ------------------------------------------------------------------------------ contenders


def _loader(
    folder: Path,
    workers: int = 2,
    *,
    threads: int = 0,
    shape: ClipShape = SHAPE,
    batch: int = BATCH,
    start_position: int = 0,
) -> TrainLoader:
    return TrainLoader(
        DataConfig(train=str(folder), reader_workers=workers, decode_threads=threads or workers),
        shape,
        seed=0,
        shares=StepShares(batch, LANES, world_size=1, micro_batch=batch),
        rank=0,
        device=CPU,
        start_position=start_position,
    )


def _contest(work: Path, workers: tuple[int, ...], rounds: int, count: int) -> dict[str, Any]:
    """Measure clips/s and CPU-seconds a clip of every contender."""
    videos = sorted((work / "raw").glob("*.mp4"))
    endless = 10**6

    def ours(tier: str) -> Callable[[int], Any]:
        return lambda workers: closing(_loader(work / tier, workers))

    def theirs(dataset: Dataset) -> Callable[[int], Any]:
        return lambda workers: nullcontext(batches(dataset, BATCH, workers))

    ways = {
        "cavmae frames": ours("wav/frames"),
        "cavmae frames with FLAC": ours("flac/frames"),
        "cavmae video": ours("wav/video"),
        "published": theirs(PublishedDataset(work / "published", endless)),
        "PyAV, raw 720p": theirs(RawVideoDataset(videos, endless, "pyav")),
    }
    if find_spec("decord"):
        ways["decord, raw 720p"] = theirs(RawVideoDataset(videos, endless, "decord"))
    else:
        print("decord is not installed: skipped")
    found: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for _ in range(rounds):
        for (name, way), number in itertools.product(ways.items(), workers):
            # Raw videos are slow: fewer batches, one of them not timed.
            turns = count if "raw" not in name else max(1, count // 6)
            began = time.perf_counter()
            with way(number) as loaded:
                iterator = iter(loaded)
                next(iterator)
                first = time.perf_counter() - began
                for _ in range(1 if "raw" in name else 4):
                    next(iterator)
                cpu, began = cpu_seconds(), time.perf_counter()
                for _ in range(turns):
                    next(iterator)
                spent = time.perf_counter() - began
                used = cpu_seconds() - cpu
            clips = turns * BATCH
            found[f"{name}, {number} workers"].append((spent / clips, used / clips, first))
    results = {}
    for name, turns in found.items():
        seconds, cpu_seconds_per_clip, firsts = map(list, zip(*turns, strict=True))
        results[name] = {
            "clips_per_second": 1 / statistics.median(seconds),
            "cpu_seconds_per_clip": statistics.median(cpu_seconds_per_clip),
            "first_batch_seconds": statistics.median(firsts),
            "seconds_per_clip": timing(seconds),
            "all_cpu_seconds_per_clip": cpu_seconds_per_clip,
        }
    return results


def cpu_seconds() -> float:
    """Return CPU time of this process and its descendants, ended ones included."""
    return _of_family(lambda one: sum(one.cpu_times()[:4]))  # the last two: of ended children


def memory_bytes() -> int:
    """Return the unshared memory of this process and its descendants (Linux)."""
    return int(_of_family(lambda one: one.memory_full_info().uss))


def _of_family(measure: Callable[[psutil.Process], float]) -> float:
    this, total = psutil.Process(), 0.0
    for process in (this, *this.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            total += measure(process)
    return total


# ------------------------------------------------------------------------------ other numbers


def _parts(folder: Path) -> dict[str, float]:
    """Measure CPU-seconds a clip of decoding alone, and of the log-mel alone."""
    shards = ShardSet(folder)
    settings = ReaderSettings(shards, DataConfig(), SHAPE, 0, True, None)
    reader = ClipReader(settings)
    clips = [reader(ReadTask(number, 0, 0, number % shards.sizes[0])) for number in range(BATCH)]
    sound = [clip for clip in clips if isinstance(clip, EncodedClip)]
    decoder = ClipDecoder.of(settings, BATCH, threads=2)
    waveforms: list[torch.Tensor] = []
    costs: dict[str, list[float]] = {"decode": [], "log_mel": []}
    for _ in range(12):
        cpu = cpu_seconds()
        decoder.schedule(sound)
        waveforms = [torch.from_numpy(one) for one in decoder.collect().waveforms]
        costs["decode"].append(cpu_seconds() - cpu)
        cpu = cpu_seconds()
        log_mel(waveforms, SHAPE.mel_bins, SHAPE.audio_frames, CPU)
        costs["log_mel"].append(cpu_seconds() - cpu)
    return {
        f"{name}_cpu_seconds_per_clip": sum(some[2:]) / len(some[2:]) / len(sound)
        for name, some in costs.items()
    }


def _first_batches(folder: Path) -> dict[str, float]:
    """Measure seconds from nothing to the first batch, by position."""
    found = {}
    for position in POSITIONS:
        times = []
        for _ in range(3):
            began = time.perf_counter()
            loader = _loader(folder, start_position=position // LANES * LANES)
            next(iter(loader))
            times.append(time.perf_counter() - began)
            loader.close()
        found[str(position)] = statistics.median(times)
    return found


def _memory(folder: Path, samples: int) -> dict[str, Any]:
    """Measure unshared memory of all processes at ten points of a run over so many samples.

    Frames and spectrograms are small, so that the samples pass quickly: a leak would be by
    clip, shard or batch, not by pixel.
    """
    small = ClipShape(audio_frames=32, mel_bins=64, image_size=32)
    loader = _loader(folder, 1, threads=2, shape=small, batch=64)
    points, seen = [], 0
    marks = [samples * part // 10 for part in range(1, 11)]
    for batch in loader:
        seen += len(batch.positions)
        if seen >= marks[len(points)]:
            points.append({"samples": seen, "bytes": memory_bytes()})
            if len(points) == len(marks):
                break
    loader.close()
    sizes = np.array([point["bytes"] for point in points], dtype=np.float64)
    # Buffers grow to the largest clip at first: the first three points are skipped.
    return {"points": points, "growth": float(sizes[7:].mean() / sizes[3:7].mean() - 1)}


# ------------------------------------------------------------------------------ what follows


def bars(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Compare with the bars: value, bar, and whether it is met."""

    def best(name: str) -> dict[str, Any]:
        found = [one for key, one in results["contenders"].items() if key.startswith(f"{name}, ")]
        return max(found, key=lambda one: one["clips_per_second"])

    frames, video, published, raw = (
        best(name) for name in ("cavmae frames", "cavmae video", "published", "PyAV, raw 720p")
    )

    def faster(one: dict[str, Any], other: dict[str, Any]) -> float:
        return one["clips_per_second"] / other["clips_per_second"]

    parts = results["parts"]["frames"]
    log_mel_seconds = parts["log_mel_cpu_seconds_per_clip"]
    total = frames["cpu_seconds_per_clip"]
    known = log_mel_seconds + parts["decode_cpu_seconds_per_clip"]
    cpu_over_ours = published["cpu_seconds_per_clip"] / (total - log_mel_seconds)
    first_batch = results["first_batch"]["10000000"]
    return {
        "frames over raw 720p": bar(faster(frames, raw), at_least=8),
        "video over raw 720p": bar(faster(video, raw), at_least=8),
        "frames over published": bar(faster(frames, published), at_least=1.1),
        "published over frames, host CPU without log-mel": bar(cpu_over_ours, at_least=2.5),
        "share of CPU outside decoding and log-mel": bar(1 - known / total, below=0.1),
        "seconds to the first batch at 10^7": bar(first_batch, below=1),
        "plan slice of 512, seconds": bar(results["plan"]["warm_seconds"], below=1e-3),
        "plan memory, bytes": bar(results["plan"]["peak_bytes"], below=200e6),
        "growth of memory": bar(results["memory"]["growth"], below=0.02),
    }


def _plot(results: dict[str, Any], record: Path) -> None:
    with plot_beside(record, 12, 4) as figure:
        rates, memory = figure.subplots(1, 2)
        contenders = results["contenders"]
        rates.barh(list(contenders), [one["clips_per_second"] for one in contenders.values()])
        rates.set(xlabel="clips/s", title="10 s clips on this machine's CPUs")
        rates.invert_yaxis()
        points = results["memory"]["points"]
        sizes = [one["bytes"] / 1e6 for one in points]
        memory.plot([one["samples"] for one in points], sizes, "o-")
        memory.set(xlabel="samples", ylabel="MB", title="memory of all processes", ylim=(0, None))
