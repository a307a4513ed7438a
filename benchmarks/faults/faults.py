"""`cavmae bench faults`: what a run makes of each fault, done to it for real.

Each row trains a tiny model on two CPU ranks, does something to it once a checkpoint is there, and
measures how long it took until the fault was noticed and until there was a step again, how many
steps were repeated, and whether samples and losses of all steps are those of a run that nothing
happened to: the samples by the ids that every rank notes, the losses bit for bit.
"""

import argparse
import dataclasses
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from cavmae.benchmarks.faults import injection as inject
from cavmae.benchmarks.faults.node_faults import node_cut, node_killed
from cavmae.benchmarks.faults.outcome import Failed, Row, Skipped
from cavmae.benchmarks.faults.runs import INTERVAL, Bench
from cavmae.benchmarks.harness.processes import unwind_on_sigterm
from cavmae.benchmarks.harness.records import write_record

FAULTS: dict[str, Callable[[Bench, str], Row | Skipped]] = {
    "a rank is killed (SIGKILL)": inject.rank_signalled(signal.SIGKILL),
    "a rank is stopped (SIGSTOP)": inject.rank_signalled(signal.SIGSTOP),
    "head, driver and ranks are killed": inject.head_killed,
    "a node is killed": node_killed,
    "a node's network is cut": node_cut,
    "all ranks are told to go (SIGTERM)": inject.terminated,
    "killed while a checkpoint is written": inject.killed_while_writing,
    "the newest checkpoint is cut short": inject.checkpoint_damaged(inject.cut_short),
    "a bit of the newest checkpoint flips": inject.checkpoint_damaged(inject.flip_a_bit),
    "the disk is full": inject.disk_full,
    "a gradient is NaN: rolled back": inject.nan_rolled_back,
    "a gradient is NaN: update left out": inject.nan_left_out,
    "a shard is damaged": inject.shard_damaged,
    "the tracking server dies": inject.tracking_server_stopped,
    "2, then 1, then 2 ranks": inject.other_rank_counts,
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(
        prog="cavmae bench faults", description="What a run makes of each fault, for real."
    )
    arguments.add_argument("--steps", type=int, default=100, help="of each run")
    arguments.add_argument("--zero-stage", type=int, choices=[1, 2], default=1, help="of each run")
    arguments.add_argument(
        "--only",
        nargs="+",
        choices=list(FAULTS),
        default=list(FAULTS),
        metavar="FAULT",
        help=f"some of the faults: {'; '.join(FAULTS)}",
    )
    arguments.add_argument("--work-dir", default="", help="empty: a temporary folder")
    arguments.add_argument("--out", default="benchmarks/results", help="folder of the record")
    return arguments


def main(argv: list[str]) -> int:
    """Measure, print and write the record; 1 where a run did not end as it should."""
    flags = parser().parse_args(argv)
    if flags.steps < 4 * INTERVAL:
        raise ValueError(f"--steps is {flags.steps}; use {4 * INTERVAL} or more")
    unwind_on_sigterm()
    work = Path(flags.work_dir or tempfile.mkdtemp(prefix="cavmae-faults-"))
    work.mkdir(parents=True, exist_ok=True)
    rows: dict[str, Row | Skipped | Failed] = {}
    bench = Bench(work.resolve(), flags.steps, flags.zero_stage)
    try:
        for name in flags.only:
            print(f"{name} ...", file=sys.stderr, flush=True)
            try:
                rows[name] = FAULTS[name](bench, name)
            except RuntimeError as error:  # the other faults are measured all the same
                rows[name] = Failed(str(error))
            finally:
                bench.end_all()
            print(f"    {rows[name]}", file=sys.stderr, flush=True)
    finally:
        if not flags.work_dir:
            shutil.rmtree(work, ignore_errors=True)
    Console(width=140).print(table(rows))
    device = torch.device("cpu")
    results = {name: dataclasses.asdict(row) for name, row in rows.items()}
    print(f"record: {write_record(flags.out, 'faults', device, vars(flags), results)}")
    return exit_code(rows)


def exit_code(rows: Mapping[str, Row | Skipped | Failed]) -> int:
    """1 where a run did not end as it should; a fault that this machine cannot have is none."""
    measured = [row for row in rows.values() if not isinstance(row, Skipped)]
    return 0 if all(isinstance(row, Row) and row.as_it_should_be for row in measured) else 1


def table(rows: Mapping[str, Row | Skipped | Failed]) -> Table:
    """One line for each fault, those that were skipped with the reason."""
    shown = Table("fault", "noticed, s", "again, s", "steps lost", "samples", "losses", "said")
    for name, row in rows.items():
        if isinstance(row, Skipped):
            shown.add_row(name, "", "", "", "", "", f"SKIPPED: {row.skipped}")
            continue
        if isinstance(row, Failed):
            shown.add_row(f"{name}: FAILED", "", "", "", "", "", row.failed.splitlines()[0])
            continue
        equal = "bit for bit"
        if row.largest_difference:
            equal = f"{row.largest_difference:.1e} apart"
        shown.add_row(
            name if row.as_it_should_be else f"{name}: NOT AS IT SHOULD BE",
            f"{row.noticed_seconds:.1f}",
            f"{row.again_seconds:.1f}" if row.again_seconds else "went on",
            f"{row.steps_lost} of {row.steps_allowed}",
            "equal" if row.samples_equal else "DIFFER",
            equal,
            row.said[:40],
        )
    return shown
