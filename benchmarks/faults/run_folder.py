"""The faults of a run folder: two starts in it, a full disk under it, one rank that misreads it."""

import dataclasses
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cavmae.benchmarks.faults.faulted_run import FaultedRun
from cavmae.benchmarks.faults.observed_rank import (
    Orders,
    give_orders,
    order_misread,
    trained_samples,
)
from cavmae.benchmarks.faults.outcome import Row, Skipped
from cavmae.benchmarks.faults.runs import (
    CLIPS,
    GLOBAL_BATCH,
    INTERVAL,
    Bench,
    last_step,
    resumed_step,
)
from cavmae.benchmarks.harness.processes import Start
from cavmae.trainer.checkpoint.format import step_of
from cavmae.trainer.config.configs import TrackingConfig
from cavmae.trainer.fault_tolerance.preemption import STOP_FILE

DISK_BYTES = 64 << 20
"""Of the small disk: room for the checkpoints of a tiny run and the weights of all its epochs."""
STEPS_ON_A_FULL_DISK = INTERVAL
_PAUSE_SECONDS = 0.2
"""In each step: a tiny run would end before the full disk is noticed."""
_PAUSE_FOR_A_START_SECONDS = 1.0
"""In each step: the run has to outlive the start of another one."""


def two_starts(bench: Bench, name: str) -> Row:
    """Start the same command again while a run trains: the second start is refused."""
    config = bench.config(name)
    give_orders(Path(config.run_dir), Orders(pause_seconds=_PAUSE_FOR_A_START_SECONDS))
    run = FaultedRun(bench, config, bench.plain)
    run.wait_for_checkpoint(INTERVAL)
    run.fault_is_now()
    second = bench.plain(run.config)
    run.wait_until_noticed(lambda: refusal(second))
    return run.row(resumes=False)


def refusal(start: Start) -> str:
    """Return the last words of a start that all ranks have ended with an error."""
    failed = all(process.poll() not in (None, 0) for process in start.processes)
    return start.text().strip().rpartition("\n")[2] if failed else ""


def whole_disk_full(bench: Bench, name: str) -> Row | Skipped:
    """Fill the disk of the whole run folder, with MLflow's store in it, for some steps; weights of
    epochs are due all the time."""
    config = bench.config(name)
    run_dir = Path(config.run_dir)
    with small_disk(run_dir) as reason:
        if reason:
            return Skipped(reason)
        samples = run_dir.with_name(f"{run_dir.name}-samples")  # of the observer, not of the run
        samples.mkdir()
        (run_dir / "samples").symlink_to(samples)
        tracking = TrackingConfig(uri=f"sqlite:///{run_dir}/mlflow.db", every_steps=1)
        config = dataclasses.replace(config, tracking=tracking, average_from_epoch=1)
        give_orders(run_dir, Orders(pause_seconds=_PAUSE_SECONDS))
        run = FaultedRun(bench, config, bench.plain)
        run.wait_for_checkpoint(INTERVAL)
        run.fault_is_now()
        ballast = fill(run_dir)
        # Nothing can be written to the folder, so the log is all that there is to see.
        alarm = run.wait_until_noticed(lambda: _alarm(run.attempt))
        until = max(trained_samples(run_dir)) + STEPS_ON_A_FULL_DISK * GLOBAL_BATCH
        run.attempt.wait_for(
            lambda: max(trained_samples(run_dir)) >= until, "steps on the full disk"
        )
        ballast.unlink()
        failures = run.attempt.wait_for(
            lambda: run.metric("checkpoint_failures"), "metrics of the time when the disk was full"
        )
        row = run.row(resumes=False, said=f"{alarm}; {failures}")
        epochs = -(-bench.steps * GLOBAL_BATCH // CLIPS)
        kept = len(list((run_dir / "epoch-weights").glob("*.pt")))
        if kept != epochs or not (run_dir / "weights.pt").exists():
            raise RuntimeError(f"{kept} of {epochs} epochs are averaged")
        return row


def _alarm(attempt: Start) -> str:
    lines = (line for line in attempt.text().splitlines() if "ALARM: the checkpoint" in line)
    return next(lines, "").partition("ALARM: ")[2]


@contextmanager
def small_disk(folder: Path) -> Iterator[str]:
    """Mount a small tmpfs on a folder, which is made; yields why that can't be done, or nothing."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "cavmae-full-disk", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        yield f"a small disk can't be mounted: {done.stderr.strip()}"
        return
    try:
        yield ""
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Fill the disk of a folder to its last byte; returns the file that does it."""
    path = folder / "ballast"
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return path


def misread(bench: Bench, name: str) -> Row:
    """Kill all ranks; one of them then reads a file of the newest checkpoint wrongly, once."""
    run = FaultedRun(bench, bench.config(name), bench.plain)
    run.wait_for_checkpoint(2 * INTERVAL)
    run.attempt.kill()
    run.fault_is_now()
    newest = max(map(step_of, os.listdir(run.run_dir / "checkpoints")))
    pending = order_misread(run.run_dir, rank=1)
    run.launch()
    run.wait_until_noticed(run.resume)
    if pending.exists() or resumed_step(run.run_dir) != newest:
        raise RuntimeError(f"resumed from {resumed_step(run.run_dir)} instead of {newest}")
    return run.row()


def stop_request_torn(bench: Bench, name: str) -> Row:
    """Write half of a stop request, as a full disk leaves it, and run the same command again."""
    run = FaultedRun(bench, bench.config(name), bench.plain)
    run.wait_for_checkpoint(2 * INTERVAL)
    run.fault_is_now()
    tear_stop_request(run.run_dir)
    run.wait_until_noticed(run.stop)
    run.attempt.finish()
    before = last_step(run.run_dir)
    run.launch()
    return run.row(before=before)


def tear_stop_request(run_dir: Path) -> None:
    """Write the first half of a stop request."""
    (run_dir / STOP_FILE).write_text('{"reason": "mainten')
