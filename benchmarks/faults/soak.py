"""`cavmae bench soak`: one run for an hour, with fault after fault, watched for leaks.

Faults come in a random, seeded order, each a while after the run has recovered from the one before.
A soak that was ended itself goes on with the same `--work-dir`. At the end the run is preempted,
resumes to a last step and finishes; an undisturbed run of as many steps has the samples and losses
that it must have. Driver, controller and ranks must leak neither memory nor file handles
(`leak_check.py`).

Steps have a pause, so that an hour has about as many of them as a short undisturbed run.
"""

import dataclasses
import random
import statistics
import sys
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from cavmae.atomic_write import read_json, write_json
from cavmae.benchmarks.faults.leak_check import FLAT_MEANS, Life, Usage, lives, usage_samples
from cavmae.benchmarks.faults.observed_rank import Orders, give_orders
from cavmae.benchmarks.faults.outcome import largest_difference, outcome
from cavmae.benchmarks.faults.runs import INTERVAL, Bench, last_step
from cavmae.benchmarks.faults.soak_faults import Endured, SoakedRun, drawn, endure
from cavmae.benchmarks.harness.plots import plot_beside
from cavmae.benchmarks.harness.records import RecordedConfig, write_record
from cavmae.benchmarks.harness.work_folder import work_folder
from cavmae.field_checks import PositiveFloat
from cavmae.trainer.config.configs import PretrainConfig

_STEPS = 10_000_000
"""Of the run until it is preempted: more than it can do."""
_UNDISTURBED_SECONDS = 4 * 3600.0
"""Limit of the undisturbed run: it has no pauses, and the other one had an hour or so."""


@dataclass(frozen=True)
class SoakConfig(RecordedConfig):
    """Train for long through fault after fault, and look for leaks.

    Raises:
        ValueError: an option out of its range.
    """

    minutes: PositiveFloat = 60.0
    """Minutes of faults."""
    between_seconds: PositiveFloat = 60.0
    """Seconds of training from a recovery to the next fault."""
    seed: int = 0
    """Of the order of faults."""
    zero_stage: Literal[1, 2] = 1
    """ZeRO stage of the run."""
    pause_seconds: float = 0.25
    """Pause in each step."""
    look_every_seconds: PositiveFloat = 5.0
    """Seconds between two samples of memory and handles."""
    work_dir: str = ""
    """Folder of the runs, which is kept, and in which a soak that was ended goes on; empty: a
    temporary one."""


def main(arguments: list[str]) -> int:
    """Soak, print and write the record; returns 1 if a criterion is not met."""
    config = tyro.cli(SoakConfig, prog="cavmae bench soak", args=arguments)
    with work_folder("soak", config.work_dir) as work:
        results, samples, faults = _soak(config, work)
    record = write_record(config.out, "soak", torch.device("cpu"), vars(config), results)
    _plot(samples, faults, record)
    for name, met in results["criteria"].items():
        print(f"{'yes' if met else 'NO':>4}  {name.replace('_', ' ')}")
    print(results["problem"], end="")
    print(f"record: {record}")
    return 0 if all(results["criteria"].values()) else 1


def _soak(options: SoakConfig, work: Path) -> tuple[dict[str, Any], list[Usage], list[Endured]]:
    bench = Bench(work, _STEPS, options.zero_stage)
    config = bench.config("soak")
    # A gradient that is not finite rolls the run back: a skipped update would change the losses.
    strict = dataclasses.replace(config.engine, max_skipped_updates=1)
    config = dataclasses.replace(config, engine=strict)
    give_orders(Path(config.run_dir), Orders(pause_seconds=options.pause_seconds))
    progress = Progress(work / "progress.json", options)
    found: dict[str, Any] = {}
    problem = ""
    try:
        before = last_step(Path(config.run_dir))
        run = SoakedRun(bench, config)
        with usage_samples(run.processes, options.look_every_seconds, progress.samples):
            run.wait_for_step(before + 1)
            run.wait_for_checkpoints(2)
            finished = _live(options, run, progress)
        bench.end_all()
        found = _compared(bench, finished)
    except RuntimeError as error:  # the record has the faults before it
        problem = f"{error}\n"
    finally:
        bench.end_all()
    faults, samples = progress.faults, progress.samples
    return results(faults, lives(samples), found, problem), samples, faults


class Progress:
    """What a soak has done, in a file from which it goes on if it is ended itself.

    Args:
        path: of the file.
        options: of the soak.

    Attributes:
        seconds: of training through faults.
        faults, samples: so far.

    Raises:
        ValueError: the file is of a soak with other options.
    """

    def __init__(self, path: Path, options: SoakConfig) -> None:
        self._path = path
        self._options = {
            name: getattr(options, name) for name in ("seed", "zero_stage", "pause_seconds")
        }
        found = read_json(path) if path.exists() else {}
        if found and found["options"] != self._options:
            raise ValueError(
                f"{path.parent} holds a soak of {found['options']}, and this one is of "
                f"{self._options}; give another --work-dir"
            )
        self.seconds: float = found.get("seconds", 0.0)
        self.faults = [Endured(**one) for one in found.get("faults", [])]
        self.samples = [Usage(**one) for one in found.get("samples", [])]

    def write(self) -> None:
        write_json(
            self._path,
            {
                "options": self._options,
                "seconds": self.seconds,
                "faults": [dataclasses.asdict(one) for one in self.faults],
                "samples": [dataclasses.asdict(one) for one in list(self.samples)],
            },
        )


def _live(options: SoakConfig, run: SoakedRun, progress: Progress) -> PretrainConfig:
    """Do the faults and let the run finish; returns it with the steps that it ended with."""
    began = time.monotonic() - progress.seconds
    for fault in islice(drawn(random.Random(options.seed)), len(progress.faults), None):
        time.sleep(options.between_seconds)
        if time.monotonic() - began > options.minutes * 60:
            break
        number = len(progress.faults)
        print(f"{number + 1}: {fault} ...", file=sys.stderr, flush=True)
        endured = endure(run, fault, random.Random(f"{options.seed}, fault {number}"))
        again, lost = endured.again_seconds, endured.steps_lost
        print(f"    recovered in {again:.1f} s, {lost} steps lost", file=sys.stderr, flush=True)
        progress.faults.append(endured)
        progress.seconds = time.monotonic() - began
        progress.write()
    run.config = dataclasses.replace(run.config, steps=run.preempt() + INTERVAL)
    run.launch()
    run.attempt.finish()
    return run.config


def _compared(bench: Bench, config: PretrainConfig) -> dict[str, Any]:
    """Compare the run with an undisturbed one, which is trained now."""
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
    faults: list[Endured], watched: list[Life], found: dict[str, Any], problem: str
) -> dict[str, Any]:
    """Make the results of the record.

    Args:
        faults: that the run survived.
        watched: processes over their lives.
        found: of the comparison; empty if the run did not finish.
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
        "flat_means": dataclasses.asdict(FLAT_MEANS),
        "problem": problem,
        "comparison": found,
        "faults": [dataclasses.asdict(one) | {"steps_lost": one.steps_lost} for one in faults],
        "kinds": {kind: _of_kind(judged, kind) for kind in ("driver", "controller", "rank")},
        "processes": [dataclasses.asdict(life) for life in watched],
    }


def _of_kind(judged: list[Life], kind: str) -> dict[str, float]:
    """Summarize the judged processes of a kind: how many, and their growth."""
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


def _plot(samples: list[Usage], faults: list[Endured], record: Path) -> None:
    """Plot memory and handles of each process over time, with the faults."""
    began = samples[0].unix_seconds if samples else 0.0
    colours = {"driver": "tab:blue", "controller": "tab:green", "rank": "tab:orange"}
    with plot_beside(record, 12, 6) as figure:
        memory, handles = figure.subplots(2, 1, sharex=True)
        for kind, colour in colours.items():
            found = [one for one in samples if one.kind == kind]
            minutes = [(one.unix_seconds - began) / 60 for one in found]
            megabytes = [one.memory_bytes / 1e6 for one in found]
            memory.plot(minutes, megabytes, ".", color=colour, ms=2)
            handles.plot(
                minutes, [one.handles for one in found], ".", color=colour, ms=2, label=kind
            )
        for axis, name in ((memory, "resident memory (MB)"), (handles, "open file handles")):
            for fault in faults:
                axis.axvline((fault.unix_seconds - began) / 60, color="0.8", zorder=0)
            axis.set(ylabel=name, ylim=(0, None))
        handles.set(xlabel="minutes; a line is a fault")
        handles.legend()
