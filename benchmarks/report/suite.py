"""`cavmae bench all --budget 10m`: what this machine can measure in that time, and a report.

Benchmarks run one after the other, each in a process of its own, the most telling first, as small
as they still tell something. What is left out is named with the reason.
"""

import argparse
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from cavmae.benchmarks.harness.options import budget_seconds
from cavmae.benchmarks.harness.processes import (
    Start,
    descendants,
    end_family,
    module_command,
    unwind_on_sigterm,
)
from cavmae.benchmarks.report.report import write_report

_PATIENCE_SECONDS = 30.0
"""For a benchmark that is told to end."""


@dataclass(frozen=True)
class Turn:
    """A benchmark as it is run on a kind of device. Attributes: seconds that it takes; flags."""

    seconds: float
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Benchmark:
    """A benchmark as a part of the suite.

    Attributes:
        name: `cavmae bench NAME`.
        cpu: on two cores, with the time that it took on them beside other work (`overhead`,
            `train`, `storage-faults` and `soak`: estimated); None: it tells nothing there.
        cuda: with a GPU, with an estimate of the time.
        needs: module without which it does not run.
    """

    name: str
    cpu: Turn | None
    cuda: Turn | None
    needs: str = ""

    def turn(self, device: str) -> Turn | None:
        """On this kind of device, `cpu` or `cuda`."""
        return self.cuda if device == "cuda" else self.cpu


_DATA = ("--clips", "8", "--batches", "2", "--workers", "2", "--memory-samples", "2000")
_STEP = ("--batch", "2", "--repeats", "3", "--no-memory")
_STEP_BATCHES = ("--only", "cavmae", "--batch", "32", "64", "128", "256")
_CHOICES = ("--batch", "2", "--repeats", "2", "--precision", "fp32")
_TRAIN = ("--batch", "2", "--steps", "3", "--part-steps", "2", "--clips", "8")
_AUTOTUNE = ("demo", "--budget", "3m")
_FAULTS = ("--only", "a rank is killed (SIGKILL)", "the newest checkpoint is cut short")
_DAY = ("--clips", "4000", "--different", "50")

SUITE = (
    Benchmark("video-check", None, Turn(20)),
    Benchmark("gpu-check", None, Turn(240, ("--seconds", "210"))),
    Benchmark("step", Turn(210, _STEP), Turn(90, _STEP_BATCHES)),
    Benchmark("choices", Turn(150, _CHOICES), Turn(120, ("--repeats", "3"))),
    Benchmark("train", Turn(180, _TRAIN), Turn(150, ("--batch", "256"))),
    Benchmark("kernels", Turn(20, ("--repeats", "5")), Turn(90)),
    Benchmark("data", Turn(165, _DATA), Turn(90, _DATA)),
    Benchmark("faults", Turn(110, _FAULTS), Turn(150, _FAULTS)),
    Benchmark("tiers", Turn(160, ("--clips", "4", "--rounds", "3")), Turn(60, ("--clips", "16"))),
    Benchmark("overhead", Turn(240, ("--steps", "80", "--repeats", "1")), None),
    Benchmark("storage-faults", Turn(60, _DAY), Turn(60, _DAY), needs="moto"),
    Benchmark("memory", Turn(150, ("--recipes", "demo")), None),
    Benchmark("autotune", Turn(200, _AUTOTUNE), Turn(260, ("audioset_base", "--budget", "4m"))),
    Benchmark("scaling", Turn(15), Turn(15)),
    Benchmark("shuffle", Turn(20, ("--shards", "100")), Turn(20, ("--shards", "100"))),
    Benchmark("soak", Turn(720, ("--minutes", "5")), Turn(720, ("--minutes", "5"))),
)
"""The most telling first."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(
        prog="cavmae bench all", description="What this machine can measure within a time."
    )
    arguments.add_argument("--budget", default="10m", help="time for all, as 90s, 10m or 2h")
    names = [one.name for one in SUITE]
    arguments.add_argument("--only", nargs="+", choices=names, default=names, help="some of them")
    arguments.add_argument("--work-dir", default="runs/bench-all", help="of what they say")
    arguments.add_argument("--out", default="benchmarks/results", help="folder of the records")
    arguments.add_argument("--report", default="report.html", help="HTML file of the report")
    return arguments


def main(argv: list[str]) -> int:
    """Run what fits, then write the report; returns 1 where a benchmark failed."""
    flags = parser().parse_args(argv)
    budget = budget_seconds(flags.budget)
    unwind_on_sigterm()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    logs = Path(flags.work_dir)
    logs.mkdir(parents=True, exist_ok=True)
    began, failed, left_out = time.monotonic(), [], []
    for benchmark in SUITE:
        if benchmark.name not in flags.only:
            continue
        left = budget - (time.monotonic() - began)
        turn = benchmark.turn(device)
        reason = why_not(benchmark, turn, left)
        if reason or turn is None:
            left_out.append(f"left out: {benchmark.name}, which {reason}")
            continue
        print(f"{benchmark.name}, about {turn.seconds:g} s ...", file=sys.stderr, flush=True)
        started = time.monotonic()
        words = (benchmark.name, *turn.flags, "--out", flags.out)
        problem = _run(words, left, logs / f"{benchmark.name}.log")
        ending = f"FAILED, {problem}," if problem else "done"
        print(f"{benchmark.name}: {ending} after {time.monotonic() - started:.0f} s", flush=True)
        if problem:
            failed.append(benchmark.name)
    for line in left_out:
        print(line)
    if failed:
        print(f"failed: {', '.join(failed)}; what they said is in {logs}")
    for path in write_report(Path(flags.out), Path(flags.report)):
        print(f"report: {path}")
    return 1 if failed else 0


def why_not(benchmark: Benchmark, turn: Turn | None, left_seconds: float) -> str:
    """Why a benchmark is left out; empty: it is not.

    Args:
        benchmark: to be run.
        turn: of it on the device at hand.
        left_seconds: of the budget.
    """
    if turn is None:
        return "tells nothing on this device"
    if benchmark.needs and find_spec(benchmark.needs) is None:
        return f"needs {benchmark.needs}: pip install 'cavmae[dev]'"
    if turn.seconds > left_seconds:
        return f"takes about {turn.seconds:g} s: {max(0.0, left_seconds):.0f} s are left"
    return ""


def _run(words: tuple[str, ...], left_seconds: float, log: Path) -> str:
    """Run one to its end, or to the end of the budget; returns what went wrong, in a line."""
    start = Start([(module_command("cavmae", "bench", *words), {})], log)
    try:
        start.finish(round(left_seconds))
    except RuntimeError as error:
        said = start.text().strip().splitlines() or ["nothing was said"]
        return f"{str(error).splitlines()[0]} {said[-1]}"
    finally:
        _end(start)
    return ""


def _end(start: Start) -> None:
    """Have it end what it has started, where it has not ended by itself; then end what is left."""
    family = [start.first, *descendants(start.first)]  # whose parents are not known afterwards
    for process in start.processes:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_PATIENCE_SECONDS)
    end_family(family)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
