"""`cavmae queue FILE`: many runs, one after the other or side by side, on one cluster.

Each run is a `cavmae train` of its own. The queue starts what fits, the higher priority first; a
run that is preempted saves, stops, and resumes later at the step where it was. Nothing is kept but
the run folders: a queue that is started again resumes whatever is not finished.
"""

import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from cavmae.cluster.config import ClusterConfig
from cavmae.cluster.connection import connected
from cavmae.cluster.experiments.comparison import compare
from cavmae.cluster.experiments.driver import Driver
from cavmae.cluster.experiments.queue_file import Experiment, Need, State, read_experiments
from cavmae.trainer.fault_tolerance.preemption import START_AGAIN_EXIT_CODE

_LOOK_SECONDS = 1.0


@dataclass(frozen=True)
class QueueConfig:
    """Run the experiments of a file, and compare them. Fields after these apply to every run:
    `--data.train SHARDS`, `--workers 8`.

    The file is read again while the queue runs: runs may be added, and priorities changed.

    Raises:
        ValueError: the file, or a run in it, is invalid.
    """

    file: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE|paper_ablations")]
    """YAML with `experiment`, `recipe`, `fields`, `retries` and `runs`; see `many-runs.md`."""
    folder: str
    """Where run folders, the drivers' logs and the comparison are written."""
    address: str = ""
    """Ray cluster; empty: the one that RAY_ADDRESS names, else one on this machine's cores that
    ends with the queue."""


@dataclass(frozen=True)
class Step:
    """What the queue does next. Attributes: start, preempt."""

    start: list[Experiment]
    preempt: list[Experiment]


def main(arguments: list[str]) -> int:
    """Run the command; returns 0 if every run has finished, else 1."""
    config, words = tyro.cli(
        QueueConfig, prog="cavmae queue", args=arguments, return_unknown_args=True
    )
    path = Path(config.file)
    if config.file == "paper_ablations":
        path = Path(__file__).with_name("paper_ablations.yaml")
    folder = Path(config.folder)
    experiments, retries = read_experiments(path, folder, words)
    cores = max(len(os.sched_getaffinity(0)), *(one.need.cpus for one in experiments))
    own = ClusterConfig(workers=1, cpus_per_worker=cores, address=config.address)
    with connected(own, threads=1):
        import ray

        address = ray.get_runtime_context().gcs_address
        signal.signal(signal.SIGTERM, _stop)
        try:
            _run(path, folder, words, experiments, retries, address)
        finally:
            for experiment in experiments:
                if experiment.driver is not None:
                    experiment.driver.request_stop()
            for experiment in experiments:
                if experiment.driver is not None:
                    experiment.driver.wait()
    compare(folder, {one.name: one.state for one in experiments}, Console())
    return 0 if all(one.state == "finished" for one in experiments) else 1


def _stop(_signal: int, _frame: object) -> None:
    """Have the runs save and stop on SIGTERM; then the queue ends."""
    print("SIGTERM: the runs save a checkpoint and stop", file=sys.stderr, flush=True)
    raise SystemExit(START_AGAIN_EXIT_CODE)


def next_step(experiments: Sequence[Experiment], capacity: Need) -> Step:
    """Choose what to start, and what to preempt for runs that can't start otherwise.

    A run that waits lets runs of lower priority use what it can't, as they can be preempted; runs
    of its own priority wait behind it.
    """
    active = [one for one in experiments if one.state in ("running", "stopping")]
    free = capacity
    for one in active:
        free -= one.need
    start: list[Experiment] = []
    preempt: list[Experiment] = []
    blocked: int | None = None
    waiting = [one for one in experiments if one.state == "waiting"]
    for one in sorted(waiting, key=lambda one: -one.priority):
        if not one.need.fits(capacity):
            continue  # the cluster may grow
        if blocked is not None and one.priority >= blocked:
            continue
        if one.need.fits(free):
            start.append(one)
            free -= one.need
            continue
        blocked = one.priority
        soon = free
        for other in active:
            if other.state == "stopping":
                soon += other.need
        lower = [o for o in active if o.state == "running" and o.priority < one.priority]
        chosen = []
        for other in sorted(reversed(lower), key=lambda other: other.priority):
            if one.need.fits(soon):
                break
            chosen.append(other)
            soon += other.need
        if one.need.fits(soon):  # what becomes free is for this one
            preempt += chosen
            break
    return Step(start, preempt)


def _run(
    path: Path,
    folder: Path,
    words: list[str],
    experiments: list[Experiment],
    retries: int,
    address: str,
) -> None:
    import ray

    read_at = path.stat().st_mtime_ns
    too_large: set[str] = set()
    while True:
        if path.stat().st_mtime_ns != read_at:
            read_at = path.stat().st_mtime_ns
            retries = _read_again(path, folder, words, experiments, retries)
        for one in experiments:
            if one.driver is not None and one.driver.exit_code is not None:
                _ended(one, folder, retries)
        if not any(one.state in ("waiting", "running", "stopping") for one in experiments):
            return
        there = ray.cluster_resources()
        capacity = Need(int(there.get("CPU", 0)), int(there.get("GPU", 0)))
        for one in experiments:
            if not one.need.fits(capacity) and one.name not in too_large:
                too_large.add(one.name)
                print(
                    f"{one.name} waits: needs {one.need}, the cluster has {capacity}",
                    file=sys.stderr,
                )
        step = next_step(experiments, capacity)
        for one in step.preempt:
            _say(one, "stopping")
            if one.driver is not None:
                one.driver.request_stop()
        for one in step.start:
            _say(one, "running")
            one.driver = Driver(
                [*one.words, f"--address={address}"], folder / "drivers" / f"{one.name}.log"
            )
        time.sleep(_LOOK_SECONDS)


def _ended(one: Experiment, folder: Path, retries: int) -> None:
    """Set the state of a run whose driver has ended."""
    assert one.driver is not None
    driver, one.driver = one.driver, None
    code = driver.exit_code
    if code == 0:
        _say(one, "finished")
    elif one.state == "stopping" and code in (START_AGAIN_EXIT_CODE, -signal.SIGTERM):
        _say(one, "waiting")  # killed by the signal itself if it had hardly begun
    elif code == START_AGAIN_EXIT_CODE:
        _say(one, "stopped")  # whoever stopped it may start it again
    else:
        one.failures += 1
        print(driver.failure(folder / one.name), file=sys.stderr)
        _say(one, "waiting" if one.failures <= retries else "failed")


def _say(one: Experiment, state: State) -> None:
    one.state = state
    print(f"{one.name}: {state}", file=sys.stderr, flush=True)


def _read_again(
    path: Path, folder: Path, words: list[str], experiments: list[Experiment], retries: int
) -> int:
    """Take added runs and changed priorities; an invalid file is reported and ignored."""
    try:
        read, retries = read_experiments(path, folder, words)
    except (ValueError, OSError) as error:
        print(f"ignored: {error}", file=sys.stderr)
        return retries
    known = {one.name: one for one in experiments}
    for one in read:
        if one.name in known:
            known[one.name].priority = one.priority
        else:
            experiments.append(one)
            print(f"{one.name}: added", file=sys.stderr)
    return retries
