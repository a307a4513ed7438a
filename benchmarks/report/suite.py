"""`cavmae bench all --budget 10m`: all benchmarks that fit this machine and the time, and a report.

Benchmarks run one after the other, each in a separate process, the most informative first, at the
smallest size that still means something. Skipped ones are named with the reason.
"""

import shutil
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import tyro

from cavmae.benchmarks.harness.durations import budget_seconds
from cavmae.benchmarks.harness.processes import (
    Start,
    descendants,
    end_family,
    module_command,
    unwind_on_sigterm,
)
from cavmae.benchmarks.harness.records import RESULTS
from cavmae.benchmarks.harness.timing import default_device
from cavmae.benchmarks.report.report import write_report

_PATIENCE_SECONDS = 30.0
"""Time that a benchmark has to end after SIGTERM."""


@dataclass(frozen=True)
class Turn:
    """One run of a benchmark on a kind of device. Attributes: seconds that it takes; flags."""

    seconds: float
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Benchmark:
    """A benchmark as a part of the suite.

    Attributes:
        name: `cavmae bench NAME`.
        cpu: on two cores, with the time that it took on them beside other work (`overhead`,
            `train`, `storage-faults` and `soak`: estimated); None: it means nothing on a CPU.
        cuda: with a GPU, with an estimate of the time.
        needs: module without which it does not run.
        program: likewise.
    """

    name: str
    cpu: Turn | None
    cuda: Turn | None
    needs: str = ""
    program: str = ""


_DATA = ("--clips", "8", "--batches", "2", "--workers", "2", "--memory-samples", "2000")
_STEP = ("--batch", "2", "--repeats", "3", "--no-memory")
_STEP_BATCHES = ("--only", "cavmae", "--batch", "32", "64", "128", "256")
_ABLATIONS = ("--batch", "2", "--repeats", "2", "--precision", "fp32")
_TRAIN = ("--batch", "2", "--steps", "3", "--part-steps", "2", "--clips", "8")
_AUTOTUNE = ("demo", "--budget", "3m")
_FAULTS = ("--only", "a rank is killed (SIGKILL)", "the newest checkpoint is cut short")
_STORAGE = ("--clips", "4000", "--different", "50")

SUITE = (
    Benchmark("video-check", None, Turn(100)),
    Benchmark("gpu-check", None, Turn(240, ("--budget", "230s"))),
    Benchmark("step", Turn(210, _STEP), Turn(90, _STEP_BATCHES)),
    Benchmark("ablations", Turn(150, _ABLATIONS), Turn(120, ("--repeats", "3"))),
    Benchmark("train", Turn(180, _TRAIN), Turn(150, ("--batch", "256"))),
    Benchmark("kernels", Turn(20, ("--repeats", "5")), Turn(90)),
    Benchmark("data", Turn(165, _DATA), Turn(90, _DATA)),
    Benchmark("faults", Turn(110, _FAULTS), Turn(150, _FAULTS)),
    Benchmark("tiers", Turn(160, ("--clips", "4", "--rounds", "3")), Turn(60, ("--clips", "16"))),
    Benchmark("overhead", Turn(240, ("--steps", "80", "--repeats", "1")), None),
    Benchmark("storage-faults", Turn(60, _STORAGE), Turn(60, _STORAGE), needs="moto"),
    Benchmark("memory", Turn(150, ("--recipes", "demo")), None),
    Benchmark("autotune", Turn(200, _AUTOTUNE), Turn(260, ("audioset_base", "--budget", "4m"))),
    Benchmark("predict", Turn(120), Turn(120)),
    Benchmark("scaling", Turn(15), Turn(15)),
    Benchmark("explore", Turn(60, ("--clips", "20000")), None, "playwright", "chromium"),
    Benchmark("shuffle", Turn(20, ("--shards", "100")), Turn(20, ("--shards", "100"))),
    Benchmark("control-plane", Turn(60), Turn(60)),
    Benchmark("soak", Turn(720, ("--minutes", "5")), Turn(720, ("--minutes", "5"))),
)
"""The most informative first."""


@dataclass(frozen=True)
class SuiteConfig:
    """Run all benchmarks that fit this machine and a time budget, then write the report."""

    budget: str = "10m"
    """Time for all, as 90s, 10m or 2h."""
    only: tuple[str, ...] = ()
    """Some of them, such as `step kernels`; empty: all."""
    work_dir: str = "runs/bench-all"
    """Folder of their logs."""
    out: str = RESULTS
    """Folder of the records."""
    report: str = "report.html"
    """HTML file of the report."""

    def __post_init__(self) -> None:
        names = [one.name for one in SUITE]
        if unknown := set(self.only) - set(names):
            raise ValueError(f"only names {', '.join(unknown)}; use some of {', '.join(names)}")


def main(arguments: list[str]) -> int:
    """Run what fits, then write the report; returns 1 where a benchmark failed."""
    config = tyro.cli(SuiteConfig, prog="cavmae bench all", args=arguments)
    budget = budget_seconds(config.budget)
    unwind_on_sigterm()
    logs = Path(config.work_dir)
    logs.mkdir(parents=True, exist_ok=True)
    began, failed, skipped = time.monotonic(), [], []
    for benchmark in SUITE:
        if config.only and benchmark.name not in config.only:
            continue
        left = budget - (time.monotonic() - began)
        turn = benchmark.cuda if default_device() == "cuda" else benchmark.cpu
        reason = why_skipped(benchmark, turn, left)
        if reason or turn is None:
            skipped.append(f"skipped: {benchmark.name}, which {reason}")
            continue
        print(f"{benchmark.name}, about {turn.seconds:g} s ...", file=sys.stderr, flush=True)
        started = time.monotonic()
        words = (benchmark.name, *turn.flags, "--out", config.out)
        problem = _run(words, left, logs / f"{benchmark.name}.log")
        ending = f"FAILED, {problem}," if problem else "done"
        print(f"{benchmark.name}: {ending} after {time.monotonic() - started:.0f} s", flush=True)
        if problem:
            failed.append(benchmark.name)
    for line in skipped:
        print(line)
    if failed:
        print(f"failed: {', '.join(failed)}; their logs are in {logs}")
    for path in write_report(Path(config.out), Path(config.report)):
        print(f"report: {path}")
    return 1 if failed else 0


def why_skipped(benchmark: Benchmark, turn: Turn | None, left_seconds: float) -> str:
    """Return why a benchmark is skipped; empty where it runs.

    Args:
        benchmark: the benchmark.
        turn: its run on the device at hand.
        left_seconds: rest of the budget.
    """
    if turn is None:
        return "means nothing on this device"
    if benchmark.needs and find_spec(benchmark.needs) is None:
        return f"needs {benchmark.needs}: pip install 'cavmae[dev]'"
    if benchmark.program and shutil.which(benchmark.program) is None:
        return f"needs the program {benchmark.program}"
    if turn.seconds > left_seconds:
        return f"takes about {turn.seconds:g} s: {max(0.0, left_seconds):.0f} s are left"
    return ""


def _run(words: tuple[str, ...], left_seconds: float, log: Path) -> str:
    """Run one to its end, or to the end of the budget; returns what failed, in a line."""
    start = Start([(module_command("cavmae", "bench", *words), {})], log)
    try:
        start.finish(round(left_seconds))
    except RuntimeError as error:
        lines = start.text().strip().splitlines() or ["the log is empty"]
        return f"{str(error).splitlines()[0]} {lines[-1]}"
    finally:
        _end(start)
    return ""


def _end(start: Start) -> None:
    """Let it end what it started, where it has not ended by itself; then kill what is left."""
    family = [start.first, *descendants(start.first)]  # their parents are not known afterwards
    for process in start.processes:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_PATIENCE_SECONDS)
    end_family(family)
