"""`cavmae bench soak`: one run for an hour, with a fault every few minutes, watched for leaks.

Faults come in a random, seeded order, each by process id, file or gradient. At the end the run is
told to go, goes on to a last step and finishes; a run of as many steps that nothing happened to
shows the samples and losses that it had to have. Driver, controller and ranks must keep neither
memory nor file handles (`leak_check.py`).

Steps have a pause, so that an hour has about as many of them as a short undisturbed run.
"""

import argparse
import dataclasses
import random
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from cavmae.atomic_write import atomic_write
from cavmae.benchmarks.faults.leak_check import (
    FIRST_FAILURE_BYTES,
    HANDLES_GROWTH,
    JUDGED_SECONDS,
    MEMORY_GROWTH_SHARE,
    WARM_UP_SECONDS,
    Life,
    Usage,
    UsageSampler,
    lives,
)
from cavmae.benchmarks.faults.observed_rank import Orders, give_orders
from cavmae.benchmarks.faults.outcome import largest_difference, outcome
from cavmae.benchmarks.faults.runs import INTERVAL, Bench, wait_for_checkpoint
from cavmae.benchmarks.faults.soak_faults import Endured, SoakedRun, drawn, endure
from cavmae.benchmarks.harness.processes import unwind_on_sigterm
from cavmae.benchmarks.harness.records import write_record
from cavmae.trainer.config.configs import PretrainConfig

_STEPS = 10_000_000
"""Of the run until it is told to go: more than it can do."""
_UNDISTURBED_SECONDS = 4 * 3600.0
"""The undisturbed run takes no longer: it has no pauses, and the other one had an hour or so."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(
        prog="cavmae bench soak", description="A long run with a fault every few minutes."
    )
    arguments.add_argument("--minutes", type=float, default=60.0, help="of faults")
    arguments.add_argument(
        "--fault-every-seconds", type=float, default=180.0, help="from one fault to the next"
    )
    arguments.add_argument("--seed", type=int, default=0, help="of the order of faults")
    arguments.add_argument("--zero-stage", type=int, choices=[1, 2], default=1, help="of the run")
    arguments.add_argument("--pause-seconds", type=float, default=0.25, help="in each step")
    arguments.add_argument("--look-every-seconds", type=float, default=5.0, help="at the processes")
    arguments.add_argument("--work-dir", default="", help="empty: a temporary folder")
    arguments.add_argument("--out", default="benchmarks/results", help="folder of the record")
    return arguments


def main(argv: list[str]) -> int:
    """Soak, print and write the record; 1 where a criterion is not met."""
    flags = parser().parse_args(argv)
    for name in ("minutes", "fault_every_seconds", "look_every_seconds"):
        if getattr(flags, name) <= 0:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(flags, name)}; use above 0")
    unwind_on_sigterm()
    work = Path(flags.work_dir or tempfile.mkdtemp(prefix="cavmae-soak-"))
    work.mkdir(parents=True, exist_ok=True)
    try:
        results, samples, faults = _soak(flags, work.resolve())
    finally:
        if not flags.work_dir:
            shutil.rmtree(work, ignore_errors=True)
    record = write_record(flags.out, "soak", torch.device("cpu"), vars(flags), results)
    _plot(samples, faults, record.with_suffix(".png"))
    for name, met in results["criteria"].items():
        print(f"{'yes' if met else 'NO':>4}  {name.replace('_', ' ')}")
    print(results["problem"], end="")
    print(f"record: {record}")
    return 0 if all(results["criteria"].values()) else 1


def _soak(
    flags: argparse.Namespace, work: Path
) -> tuple[dict[str, Any], list[Usage], list[Endured]]:
    bench = Bench(work, _STEPS, flags.zero_stage)
    config = bench.config("soak")
    # A gradient that is not finite sends the run back: an update left out would change the losses.
    strict = dataclasses.replace(config.engine, max_skipped_updates=1)
    config = dataclasses.replace(config, engine=strict)
    give_orders(Path(config.run_dir), Orders(pause_seconds=flags.pause_seconds))
    run = SoakedRun(bench, config)
    faults: list[Endured] = []
    problem = ""
    with UsageSampler(run.processes, flags.look_every_seconds) as usage:
        try:
            finished = _live(flags, run, faults)
        except RuntimeError as error:  # the record says what was got over before
            finished, problem = config, f"{error}\n"
        finally:
            bench.end_all()
    try:
        found = {} if problem else _compared(bench, finished)
    except RuntimeError as error:
        found, problem = {}, f"{error}\n"
    finally:
        bench.end_all()
    watched = lives(usage.samples)
    return results(faults, watched, found, problem), usage.samples, faults


def _live(flags: argparse.Namespace, run: SoakedRun, faults: list[Endured]) -> PretrainConfig:
    """The time of faults, and the finish; returns the run with the steps that it ended with."""
    wait_for_checkpoint(run.start, run.config, 2 * INTERVAL)
    rng, began = random.Random(flags.seed), time.monotonic()
    count = int(flags.minutes * 60 / flags.fault_every_seconds)
    for number, fault in enumerate(drawn(rng, count)):
        due = began + (number + 1) * flags.fault_every_seconds
        time.sleep(max(0.0, due - time.monotonic()))
        print(f"{number + 1} of {count}: {fault} ...", file=sys.stderr, flush=True)
        faults.append(endure(run, fault, rng))
        again, lost = faults[-1].again_seconds, faults[-1].steps_lost
        print(f"    again after {again:.1f} s, {lost} steps lost", file=sys.stderr, flush=True)
    time.sleep(max(0.0, began + flags.minutes * 60 - time.monotonic()))
    run.config = dataclasses.replace(run.config, steps=run.leave() + INTERVAL)
    run.begin()
    run.start.finish()
    return run.config


def _compared(bench: Bench, config: PretrainConfig) -> dict[str, Any]:
    """The run beside one that nothing happens to, which is made now."""
    undisturbed = bench.config("undisturbed", steps=config.steps, engine=config.engine)
    bench.plain(undisturbed).finish(_UNDISTURBED_SECONDS)
    found, expected = outcome(config, "the soaked run"), outcome(undisturbed, "the undisturbed one")
    return {
        "steps": config.steps,
        "samples": len(found.samples),
        "samples_equal": found.samples == expected.samples,
        "largest_difference": largest_difference(found, expected),
    }


def results(
    faults: list[Endured],
    watched: list[Life],
    found: dict[str, Any],
    problem: str,
) -> dict[str, Any]:
    """What the record says.

    Args:
        faults: that were got over.
        watched: processes over their lives.
        found: of the comparison; empty where the run did not finish.
        problem: why it did not.
    """
    judged = [life for life in watched if life.judged]
    return {
        "criteria": {
            "every_fault_came_and_the_run_finished": not problem,
            "samples_equal": bool(found) and found["samples_equal"],
            "losses_equal_bit_for_bit": bool(found) and found["largest_difference"] == 0,
            "no_whole_checkpoint_passed_over": all(fault.from_newest for fault in faults),
            "processes_were_watched_long_enough": bool(judged),
            "memory_and_handles_are_flat": all(life.flat for life in judged),
        },
        "flat_means": {
            "warm_up_seconds": WARM_UP_SECONDS,
            "judged_seconds_at_least": JUDGED_SECONDS,
            "memory_growth_share_at_most": MEMORY_GROWTH_SHARE,
            "controller_may_grow_once_by_bytes": FIRST_FAILURE_BYTES,
            "handles_growth_at_most": HANDLES_GROWTH,
        },
        "problem": problem,
        "comparison": found,
        "faults": [dataclasses.asdict(one) | {"steps_lost": one.steps_lost} for one in faults],
        "kinds": {kind: _of_kind(judged, kind) for kind in ("driver", "controller", "rank")},
        "processes": [dataclasses.asdict(life) for life in watched],
    }


def _of_kind(judged: list[Life], kind: str) -> dict[str, float]:
    """Of all processes of a kind that were judged: how many, and what they grew by."""
    found = [life for life in judged if life.kind == kind]
    if not found:
        return {"judged": 0}
    return {
        "judged": len(found),
        "longest_seconds": max(life.seconds for life in found),
        "median_memory_bytes": statistics.median(life.memory_bytes for life in found),
        "median_memory_growth_bytes": statistics.median(life.memory_growth_bytes for life in found),
        "largest_memory_growth_bytes": max(life.memory_growth_bytes for life in found),
        "largest_handles_growth": max(life.handles_growth for life in found),
    }


def _plot(samples: list[Usage], faults: list[Endured], path: Path) -> None:
    """Memory and handles of each process over the time, with the faults."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6), layout="constrained")
    axes = figure.subplots(2, 1, sharex=True)
    began = samples[0].unix_seconds if samples else 0.0
    colours = {"driver": "tab:blue", "controller": "tab:green", "rank": "tab:orange"}
    for kind, colour in colours.items():
        found = [one for one in samples if one.kind == kind]
        minutes = [(one.unix_seconds - began) / 60 for one in found]
        axes[0].plot(minutes, [one.memory_bytes / 1e6 for one in found], ".", color=colour, ms=2)
        axes[1].plot(minutes, [one.handles for one in found], ".", color=colour, ms=2, label=kind)
    for axis, name in zip(axes, ("resident memory (MB)", "open file handles"), strict=True):
        for fault in faults:
            axis.axvline((fault.unix_seconds - began) / 60, color="0.8", zorder=0)
        axis.set(ylabel=name, ylim=(0, None))
    axes[1].set(xlabel="minutes; a line is a fault")
    axes[1].legend()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
