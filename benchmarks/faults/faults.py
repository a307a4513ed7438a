"""`cavmae bench faults`: how a run recovers from each fault, done to it for real.

Each row trains a tiny model on two CPU ranks, does a fault to it once a checkpoint exists, and
measures how long it took until the fault was noticed and until a new step was done, how many steps
were repeated, and whether samples and losses of all steps are those of an undisturbed run: the
samples by the ids that every rank notes, the losses bit for bit.
"""

import dataclasses
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import torch
import tyro

from cavmae.benchmarks.faults import injection as inject
from cavmae.benchmarks.faults import outages
from cavmae.benchmarks.faults.data_faults import clip_hangs_reader, journal_torn, log_blocks
from cavmae.benchmarks.faults.node_faults import node_cut, node_drained, node_killed
from cavmae.benchmarks.faults.outcome import Failed, Row, Skipped
from cavmae.benchmarks.faults.run_folder import (
    misread,
    stop_request_torn,
    two_starts,
    whole_disk_full,
)
from cavmae.benchmarks.faults.runs import INTERVAL, Bench
from cavmae.benchmarks.harness.records import RecordedConfig, write_record
from cavmae.benchmarks.harness.work_folder import work_folder
from cavmae.benchmarks.report.console import show
from cavmae.field_checks import at_least

FAULTS: dict[str, Callable[[Bench, str], Row | Skipped]] = {
    "a rank is killed (SIGKILL)": partial(inject.rank_signalled, signal.SIGKILL),
    "a rank is stopped (SIGSTOP)": partial(inject.rank_signalled, signal.SIGSTOP),
    "head, driver and ranks are killed": inject.head_killed,
    "a node is killed": node_killed,
    "a node's network is cut": node_cut,
    "a node's pod is ended (preStop)": node_drained,
    "all ranks are preempted (SIGTERM)": inject.preempted,
    "killed while a checkpoint is written": inject.killed_while_writing,
    "the newest checkpoint is cut short": partial(inject.checkpoint_damaged, inject.cut_short),
    "a bit of the newest checkpoint flips": partial(inject.checkpoint_damaged, inject.flip_a_bit),
    "one rank reads a checkpoint wrongly": misread,
    "the disk is full": inject.disk_full,
    "the whole disk is full": whole_disk_full,
    "the run is started twice": two_starts,
    "a stop request is torn": stop_request_torn,
    "a gradient is NaN: rolled back": inject.nan_rolled_back,
    "a gradient is NaN: update skipped": inject.nan_skipped,
    "a shard is damaged": inject.shard_damaged,
    "a clip hangs a reader": clip_hangs_reader,
    "journals are torn": journal_torn,
    "a log file blocks": log_blocks,
    "the tracking server dies": inject.tracking_server_stopped,
    "2, then 1, then 2 ranks": partial(inject.other_rank_counts, 2, 1),
    "4, then 3, then 4 ranks": partial(inject.other_rank_counts, 4, 3),
    "the data are not mounted at a restart, for 60 s": outages.data_missing,
    "the tracking server is away at a restart": outages.tracking_server_missing,
    "the store answers 403, then 503, for two minutes": outages.store_refuses,
    "five failures, with a new checkpoint between them": outages.failures_with_progress,
    "SIGTERM with 30 s to live, and nothing can be written": outages.terminated,
}


@dataclass(frozen=True)
class FaultsConfig(RecordedConfig):
    """Do faults to real runs, and measure how each run recovers.

    Raises:
        ValueError: an option out of its range.
    """

    steps: Annotated[int, at_least(4 * INTERVAL)] = 100
    """Steps of each run."""
    zero_stage: Literal[1, 2] = 1
    """ZeRO stage of each run."""
    only: Annotated[
        tuple[str, ...],
        tyro.conf.arg(metavar="FAULT ...", help=f"Some of the faults: {'; '.join(FAULTS)}."),
    ] = tuple(FAULTS)
    work_dir: str = ""
    """Folder of the runs, which is kept; empty: a temporary one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.only:
            if name not in FAULTS:
                raise ValueError(f"only has {name!r}; use some of: {'; '.join(FAULTS)}")


def main(arguments: list[str]) -> int:
    """Measure, print and write the record; returns 1 if a run did not pass."""
    config = tyro.cli(FaultsConfig, prog="cavmae bench faults", args=arguments)
    rows: dict[str, Row | Skipped | Failed] = {}
    with work_folder("faults", config.work_dir) as work:
        bench = Bench(work, config.steps, config.zero_stage)
        for name in config.only:
            print(f"{name} ...", file=sys.stderr, flush=True)
            try:
                rows[name] = FAULTS[name](bench, name)
            except RuntimeError as error:  # the other faults are measured all the same
                rows[name] = Failed(str(error))
            finally:
                bench.end_all()
            print(f"    {rows[name]}", file=sys.stderr, flush=True)
    show(write_record(config.out, "faults", torch.device("cpu"), vars(config), recorded(rows)))
    return exit_code(rows)


def recorded(rows: Mapping[str, Row | Skipped | Failed]) -> dict[str, dict[str, Any]]:
    """Return the results of a record: rows with whether they passed."""
    return {
        name: dataclasses.asdict(row) | ({"passed": row.passed} if isinstance(row, Row) else {})
        for name, row in rows.items()
    }


def exit_code(rows: Mapping[str, Row | Skipped | Failed]) -> int:
    """Return 1 if a run did not pass; a fault that this machine can't have does not count."""
    measured = [row for row in rows.values() if not isinstance(row, Skipped)]
    return 0 if all(isinstance(row, Row) and row.passed for row in measured) else 1
