"""Faults that pass: what a run needs is away when its ranks are started again, or for a while.

Each is done to a run on Ray whose rank is killed, as its ranks are then started again.
"""

import dataclasses
import os
import signal
import subprocess
import time
from collections.abc import Callable

from cavmae.benchmarks.faults.faulted_run import FaultedRun
from cavmae.benchmarks.faults.injection import file_of_second_rank, tracking_server
from cavmae.benchmarks.faults.outcome import Row, Skipped
from cavmae.benchmarks.faults.runs import INTERVAL, Bench, last_step
from cavmae.benchmarks.harness.object_store import object_store
from cavmae.benchmarks.harness.processes import answers, free_port
from cavmae.trainer.checkpoint.format import MANIFEST, checkpoint_name
from cavmae.trainer.config.configs import CheckpointConfig, TrackingConfig
from cavmae.trainer.fault_tolerance.preemption import START_AGAIN_EXIT_CODE

AWAY_SECONDS = 60.0
FAILURES = 5
KILL_SECONDS = 30.0
"""torchrun and DeepSpeed's launcher send SIGKILL so long after SIGTERM."""


def data_missing(bench: Bench, name: str) -> Row | Skipped:
    """Unmount the data and kill a rank; mount them again after a minute."""
    mount = bench.work / "mounted"
    mount.mkdir()
    bind = ["mount", "--bind", str(bench.work / "shards"), str(mount)]
    done = subprocess.run(bind, capture_output=True, text=True)
    if done.returncode:
        return Skipped(f"nothing can be mounted: {done.stderr.strip()}")
    unmount = ["umount", "--lazy", str(mount)]
    try:
        config = bench.config(name)
        data = dataclasses.replace(config.data, train=str(mount / "frames"))
        run = FaultedRun(bench, dataclasses.replace(config, data=data), bench.on_ray)
        run.wait_for_checkpoint(2 * INTERVAL)
        _kill_a_rank(run, lambda: subprocess.run(unmount, check=True))
        time.sleep(AWAY_SECONDS)
        subprocess.run(bind, check=True)
        return run.row()
    finally:
        subprocess.run(unmount, capture_output=True)  # it may be unmounted at the moment


def tracking_server_missing(bench: Bench, name: str) -> Row:
    """Kill the tracking server and a rank; the server does not come back."""
    port = free_port()
    with tracking_server(bench.work / "mlflow-server-away", port) as server:
        server.wait_for(lambda: answers(port), "the tracking server's start")
        tracking = TrackingConfig(uri=f"http://127.0.0.1:{port}", every_steps=1)
        run = FaultedRun(bench, bench.config(name, tracking=tracking), bench.on_ray)
        run.wait_for_checkpoint(2 * INTERVAL)
        _kill_a_rank(run, server.kill)
        return run.row()


def store_refuses(bench: Bench, name: str) -> Row:
    """Have the checkpoints' store answer 403 for a minute and 503 for another, and kill a rank."""
    with object_store() as store:
        store.make_bucket("runs")
        folder = CheckpointConfig(every_steps=INTERVAL, folder="s3://runs/mine")
        run = FaultedRun(
            bench,
            bench.config(name, checkpoint=folder),
            lambda config: bench.on_ray(config, **store.environment),
        )
        manifest = f"mine/{checkpoint_name(2 * INTERVAL)}/{MANIFEST}"
        run.attempt.wait_for(lambda: store.has("runs", manifest), f"checkpoint {2 * INTERVAL}")
        _kill_a_rank(run, lambda: store.down(True, "403 Forbidden"))
        time.sleep(AWAY_SECONDS)
        store.down(True)
        time.sleep(AWAY_SECONDS)
        store.down(False)
        return run.row()


def failures_with_progress(bench: Bench, name: str) -> Row:
    """Kill a rank again and again, each time after a new checkpoint; two failures without one would
    end the run."""
    run = FaultedRun(
        bench, bench.config(name), lambda config: bench.on_ray(config, "--max-failures=1")
    )
    for number in range(1, FAILURES + 1):
        run.wait_for_checkpoint(number * INTERVAL)
        _kill_a_rank(run)
        run.attempt.wait_for(run.resume, "a resume")
    return run.row(said=f"{FAILURES} failures, a new checkpoint before each")


def terminated(bench: Bench, name: str) -> Row:
    """Send SIGTERM to all ranks while nothing can be written, and SIGKILL 30 s later to those that
    are left: there must be none, and the checkpoint before must be whole."""
    run = FaultedRun(bench, bench.config(name), bench.plain)
    run.wait_for_checkpoint(2 * INTERVAL)
    writable = last_step(run.run_dir)
    for step in range(writable + 1, bench.steps):
        os.mkfifo(file_of_second_rank(run.config, step))  # a write to it never ends
    run.fault_is_now()
    for process in run.attempt.processes:
        process.send_signal(signal.SIGTERM)
    run.wait_until_noticed(run.stop)
    ends = run.fault_seconds + KILL_SECONDS
    codes = [process.wait(max(0.0, ends - time.time())) for process in run.attempt.processes]
    if set(codes) != {START_AGAIN_EXIT_CODE}:
        raise RuntimeError(f"the ranks exited with {codes}:\n{run.attempt.text()[-4000:]}")
    stopped = last_step(run.run_dir)
    run.launch()
    return run.row(before=stopped, while_writing=stopped - writable)


def _kill_a_rank(run: FaultedRun, take_away: Callable[[], object] = lambda: None) -> None:
    """Kill a rank, take away what the next attempt needs, and wait until the kill is noticed."""
    run.fault_is_now()
    run.attempt.ranks()[-1].kill()
    take_away()
    run.wait_until_noticed(run.failure)
