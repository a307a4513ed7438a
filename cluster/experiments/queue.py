"""`cavmae queue FILE`: many runs on one cluster, one after another or side by side.

Each run is a separate `cavmae train`. The queue starts what fits, the higher priority first; a
preempted run saves a checkpoint, stops, and resumes later at the same step. The queue itself keeps
no state: rerunning it continues with the run folders that are not finished.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro

from cavmae.cluster.config import ClusterConfig
from cavmae.cluster.connection import connected
from cavmae.cluster.experiments.comparison import compare
from cavmae.cluster.experiments.driver import Driver
from cavmae.cluster.experiments.queue_file import Experiment, Need, State, read_experiments
from cavmae.console import JsonOption
from cavmae.field_checks import CheckedFields
from cavmae.trainer.fault_tolerance.preemption import START_AGAIN_EXIT_CODE

_POLL_SECONDS = 1.0


@dataclass(frozen=True)
class QueueConfig(CheckedFields, JsonOption):
    """Run the experiments of a file, and compare them. Fields after these apply to every run:
    `--data.train SHARDS`, `--workers 8`.

    The file is reread when it changes: runs may be added, and priorities changed.

    Raises:
        ValueError: the file, or a run in it, is invalid.
    """

    file: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE|paper_ablations")]
    """YAML with `experiment`, `recipe`, `fields`, `retries` and `runs`; see `many-runs.md`."""
    folder: str
    """Folder for the run folders, the drivers' logs and the comparison."""
    address: str = ""
    """Ray cluster; empty: the one that RAY_ADDRESS names, else one on this machine's cores that
    is started and stopped with the queue."""


def main(arguments: list[str]) -> int:
    """Run the command; returns 0 if every run finished, else 1."""
    config, words = tyro.cli(
        QueueConfig, prog="cavmae queue", args=arguments, return_unknown_args=True
    )
    path = Path(config.file)
    if config.file == "paper_ablations":
        path = Path(__file__).with_name("paper_ablations.yaml")
    folder = Path(config.folder)
    read = partial(read_experiments, path, folder, words)
    experiments = read()
    cores = max(len(os.sched_getaffinity(0)), *(one.need.cpus for one in experiments))
    own = ClusterConfig(workers=1, cpus_per_worker=cores, address=config.address)
    with connected(own, threads=1):
        import ray

        address = ray.get_runtime_context().gcs_address
        signal.signal(signal.SIGTERM, _stop)
        try:
            _run(path, folder, read, experiments, address)
        finally:
            drivers = [one.driver for one in experiments if one.driver is not None]
            for driver in drivers:
                driver.request_stop()
            for driver in drivers:
                driver.wait()
    compare(folder, {one.name: one.state for one in experiments}, as_json=config.json)
    return 0 if all(one.state == "finished" for one in experiments) else 1


def _stop(_signal: int, _frame: object) -> None:
    """End the queue, on which its runs save and stop."""
    print("SIGTERM: stop requested; the runs save and stop", file=sys.stderr, flush=True)
    raise SystemExit(START_AGAIN_EXIT_CODE)


def next_step(
    experiments: Sequence[Experiment], capacity: Need
) -> tuple[list[Experiment], list[Experiment]]:
    """Return the runs to start, and those to preempt for runs that cannot start otherwise.

    While a run waits, runs of lower priority use the resources that do not suffice for it, as they
    can be preempted; runs of the same priority wait behind it.
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
        available = sum((other.need for other in active if other.state == "stopping"), free)
        lower = [o for o in active if o.state == "running" and o.priority < one.priority]
        chosen = []
        for other in sorted(reversed(lower), key=lambda other: other.priority):
            if one.need.fits(available):
                break
            chosen.append(other)
            available += other.need
        if one.need.fits(available):  # what becomes free is for this one
            preempt += chosen
            break
    return start, preempt


def _run(
    path: Path,
    folder: Path,
    read: Callable[[], list[Experiment]],
    experiments: list[Experiment],
    address: str,
) -> None:
    import ray

    read_at = path.stat().st_mtime_ns
    too_large: set[str] = set()
    while True:
        if path.stat().st_mtime_ns != read_at:
            read_at = path.stat().st_mtime_ns
            _reread(read, experiments)
        for one in experiments:
            if one.driver is not None and one.driver.exit_code is not None:
                _ended(one, folder)
        if not any(one.state in ("waiting", "running", "stopping") for one in experiments):
            return
        resources = ray.cluster_resources()
        capacity = Need(int(resources.get("CPU", 0)), int(resources.get("GPU", 0)))
        for one in experiments:
            if not one.need.fits(capacity) and one.name not in too_large:
                too_large.add(one.name)
                print(
                    f"{one.name} waits: it needs {one.need}, the cluster has {capacity}",
                    file=sys.stderr,
                )
        start, preempt = next_step(experiments, capacity)
        for one in preempt:
            _set_state(one, "stopping")
            if one.driver is not None:
                one.driver.request_stop()
        for one in start:
            _set_state(one, "running")
            one.driver = Driver(
                [*one.words, f"--address={address}"], folder / "drivers" / f"{one.name}.log"
            )
        time.sleep(_POLL_SECONDS)


def _ended(one: Experiment, folder: Path) -> None:
    """Update a run whose driver has ended."""
    assert one.driver is not None
    driver, one.driver = one.driver, None
    code = driver.exit_code
    if code == 0:
        _set_state(one, "finished")
    elif one.state == "stopping" and code in (START_AGAIN_EXIT_CODE, -signal.SIGTERM):
        _set_state(one, "waiting")  # killed by the signal itself if it had hardly started
    elif code == START_AGAIN_EXIT_CODE:
        _set_state(one, "stopped")  # by someone else, who may rerun it
    else:
        one.failures += 1
        print(driver.failure(folder / one.name), file=sys.stderr)
        _set_state(one, "waiting" if one.failures <= one.retries else "failed")


def _set_state(one: Experiment, state: State) -> None:
    one.state = state
    print(f"{one.name}: {state}", file=sys.stderr, flush=True)


def _reread(read: Callable[[], list[Experiment]], experiments: list[Experiment]) -> None:
    """Take over added runs and changed priorities; a file that is invalid now is reported only."""
    try:
        now = read()
    except (ValueError, OSError) as error:
        print(f"file ignored: {error}", file=sys.stderr)
        return
    known = {one.name: one for one in experiments}
    for one in now:
        if one.name in known:
            known[one.name].priority, known[one.name].retries = one.priority, one.retries
        else:
            experiments.append(one)
            print(f"{one.name}: added", file=sys.stderr)
