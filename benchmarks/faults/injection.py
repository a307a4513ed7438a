"""The faults on one machine: each is done to a run for real, by process id, file or gradient.

Every function trains one run, does its fault once checkpoints exist, waits for the end of the run
and returns the row. Faults that need several machines are in `node_faults.py`.
"""

import dataclasses
import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

from cavmae.atomic_write import read_json
from cavmae.benchmarks.faults.faulted_run import FaultedRun
from cavmae.benchmarks.faults.observed_rank import order_nan
from cavmae.benchmarks.faults.outcome import Row
from cavmae.benchmarks.faults.runs import INTERVAL, RANKS, Bench, last_step, resumed_step
from cavmae.benchmarks.harness.processes import Start, answers, free_port, module_command
from cavmae.dataloaders.shards.shard_set import ShardSet
from cavmae.trainer.checkpoint.format import (
    attempt_folder,
    checkpoint_name,
    list_checkpoints,
    list_folders,
    read_run_state,
    step_of,
)
from cavmae.trainer.checkpoint.store import Store
from cavmae.trainer.config.configs import PretrainConfig, TrackingConfig
from cavmae.trainer.fault_tolerance.lease import newest_attempt
from cavmae.trainer.tracking.tracker import UNSENT

DAMAGED_CLIPS = 4
"""Of a shard."""


def rank_signalled(sign: signal.Signals, bench: Bench, name: str) -> Row:
    """Send a signal to one of two ranks under Ray, which restarts both."""
    run = FaultedRun(bench, bench.config(name), bench.on_ray)
    run.wait_for_checkpoint(2 * INTERVAL)
    run.fault_is_now()
    run.attempt.ranks()[-1].send_signal(sign)
    run.wait_until_noticed(run.failure)
    return run.row()


def head_killed(bench: Bench, name: str) -> Row:
    """Kill driver, Ray and ranks at once, and run the same command again."""
    run = FaultedRun(bench, bench.config(name), bench.on_ray)
    run.wait_for_checkpoint(2 * INTERVAL)
    run.fault_is_now()
    run.attempt.kill()
    run.launch()
    return run.row(said="resumed by hand")


def preempted(bench: Bench, name: str) -> Row:
    """Send SIGTERM to all ranks, as a scheduler does, and run the same command again."""
    run = FaultedRun(bench, bench.config(name), bench.plain)
    run.wait_for_checkpoint(2 * INTERVAL)
    run.fault_is_now()
    for process in run.attempt.processes:
        process.send_signal(signal.SIGTERM)
    run.wait_until_noticed(run.stop)
    run.attempt.finish()
    before = last_step(run.run_dir)
    run.launch()
    return run.row(before=before)


def checkpoint_damaged(damage: Callable[[Path], None], bench: Bench, name: str) -> Row:
    """Kill all ranks, damage the newest checkpoint, and run the same command again."""
    run = FaultedRun(bench, bench.config(name), bench.plain)
    run.wait_for_checkpoint(2 * INTERVAL)
    run.attempt.kill()
    run.fault_is_now()
    newest = damage_newest(run.config, damage)
    run.launch()
    run.wait_until_noticed(run.resume)
    run.attempt.finish()
    if resumed_step(run.run_dir) >= newest:
        raise RuntimeError(f"the damaged checkpoint of step {newest} was used")
    # The steps since the damaged checkpoint don't count: its own interval is lost with it.
    return run.row(before=min(run.before, newest))


def damage_newest(config: PretrainConfig, damage: Callable[[Path], None]) -> int:
    """Damage a file of the newest checkpoint; returns its step."""
    folder = Path(config.run_dir) / "checkpoints"
    newest = list_checkpoints(Store(folder))[-1]
    damage(next((folder / newest).glob("attempt-*/state/*optim_states.pt")))
    return step_of(newest)


def cut_short(path: Path) -> None:
    """Cut off the end of a file."""
    path.write_bytes(path.read_bytes()[:-1000])


def flip_a_bit(path: Path) -> None:
    """Flip one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def killed_while_writing(bench: Bench, name: str) -> Row:
    """Make a rank's file a pipe that nobody reads, so its write never ends; then kill all ranks."""
    step = 3 * INTERVAL
    run = FaultedRun(bench, bench.config(name), bench.plain)
    run.wait_for_checkpoint(INTERVAL)
    os.mkfifo(file_of_second_rank(run.config, step))
    run.wait_for_step(step + 1)
    run.fault_is_now()
    run.attempt.kill()
    run.launch()
    row = run.row(while_writing=run.before - step, said="resumed by hand")
    store = Store(run.run_dir / "checkpoints")
    left = set(list_folders(store)) - set(list_checkpoints(store))
    if left:
        raise RuntimeError(f"{left} is left")
    return row


def file_of_second_rank(config: PretrainConfig, step: int) -> Path:
    """Path of the second rank's file of a checkpoint that this attempt will write; its folder is
    created."""
    attempt = newest_attempt(Store(config.run_dir))
    checkpoints = Path(config.run_dir) / "checkpoints"
    folder = checkpoints / attempt_folder(checkpoint_name(step), attempt) / "state"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt"


def disk_full(bench: Bench, name: str) -> Row:
    """Link a rank's file to /dev/full, which fails as a full disk does."""
    run = FaultedRun(bench, bench.config(name), bench.plain)
    run.wait_for_checkpoint(INTERVAL)
    file_of_second_rank(run.config, 3 * INTERVAL).symlink_to("/dev/full")
    run.wait_for_step(3 * INTERVAL)
    run.fault_is_now()
    run.wait_until_noticed(lambda: run.metric("checkpoint_failures"))
    return run.row(resumes=False)


def nan_rolled_back(bench: Bench, name: str) -> Row:
    """Make a gradient of one rank NaN once, with no update to skip: Ray's run rolls back."""
    config, step = bench.config(name), 2 * INTERVAL + 5
    strict = dataclasses.replace(config.engine, max_skipped_updates=1)
    config = dataclasses.replace(config, engine=strict)
    pending = order_nan(Path(config.run_dir), rank=1, step=step)
    run = FaultedRun(bench, config, bench.on_ray)
    run.attempt.wait_for(lambda: not pending.exists(), "the gradient")
    run.fault_is_now(attempt=1)  # it may have failed already
    run.wait_until_noticed(run.failure)
    return run.row(before=step)


def nan_skipped(bench: Bench, name: str) -> Row:
    """Make a gradient of one rank NaN once; both ranks skip the update, and training continues."""
    config, step = bench.config(name), 2 * INTERVAL
    pending = order_nan(Path(config.run_dir), rank=1, step=step)
    run = FaultedRun(bench, config, bench.plain)
    run.attempt.wait_for(lambda: not pending.exists(), "the gradient")
    run.fault_is_now()
    run.wait_until_noticed(lambda: run.metric("skipped_updates"))
    run.attempt.finish()
    return run.row(resumes=False, expected=bench.skipping_update(step))


def shard_damaged(bench: Bench, name: str) -> Row:
    """Flip bits in the sound of some clips of a shard before the run starts; each clip goes into
    quarantine at the position where it is first drawn."""
    shards = bench.work / "damaged-shards"
    shutil.copytree(bench.work / "shards" / "frames", shards)
    damaged = flip_bits_of_sounds(shards, DAMAGED_CLIPS)
    config = bench.config(name)
    data = dataclasses.replace(config.data, train=str(shards))
    run = FaultedRun(bench, dataclasses.replace(config, data=data), bench.plain)
    run.wait_for_step(1)  # before this nothing could notice the damage
    run.fault_is_now()
    run.wait_until_noticed(lambda: quarantined(run.run_dir))
    run.attempt.finish()
    return run.row(resumes=False, expected=bench.without(damaged))


def quarantined(run_dir: Path) -> str:
    """Return the clips in quarantine and why, from the newest checkpoint; empty if none."""
    store = Store(run_dir / "checkpoints")
    newest = list_checkpoints(store)[-1:]
    found = [item for name in newest for item in read_run_state(store, name).quarantine]
    return ", ".join(f"{sample_id}: {reason}" for sample_id, reason in found)


def unsent(run_dir: Path) -> str:
    """Return which metrics MLflow has missed; empty if none."""
    path = run_dir / UNSENT
    return (
        f"MLflow lacks metrics after step {read_json(path)['after_step']}" if path.exists() else ""
    )


def flip_bits_of_sounds(folder: Path, clips: int) -> tuple[str, ...]:
    """Flip a bit in the sound of some clips of the first shard, which every use of them reads.

    Args:
        folder: a packed tier with sound as FLAC.
        clips: how many, spread over the shard.

    Returns:
        Their ids.
    """
    shards = ShardSet(folder)
    path = folder / shards.files[0].name
    data = bytearray(path.read_bytes())
    samples = range(0, shards.sizes[0], shards.sizes[0] // clips)[:clips]
    for sample in samples:
        sound = shards.member(0, sample, "flac")
        data[data.index(sound) + len(sound) // 2] ^= 1
    path.write_bytes(data)
    return tuple(shards.sample_id(0, sample) for sample in samples)


def tracking_server_stopped(bench: Bench, name: str) -> Row:
    """Kill the tracking server while the run sends it metrics."""
    port = free_port()
    with tracking_server(bench.work / "mlflow-server", port) as server:
        server.wait_for(lambda: answers(port), "the tracking server's start")
        tracking = TrackingConfig(uri=f"http://127.0.0.1:{port}", every_steps=1)
        run = FaultedRun(bench, bench.config(name, tracking=tracking), bench.plain)
        run.wait_for_checkpoint(2 * INTERVAL)
        run.fault_is_now()
        server.kill()
        run.wait_until_noticed(lambda: unsent(run.run_dir))
        return run.row(resumes=False)


def tracking_server(folder: Path, port: int) -> Start:
    """Start a tracking server on loopback that keeps everything in a folder."""
    folder.mkdir(exist_ok=True)
    command = module_command(
        *("mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", f"sqlite:///{folder}/m.db"),
        *("--artifacts-destination", str(folder)),
    )
    return Start([(command, {})], folder / "server.log")


def other_rank_counts(ranks: int, left_ranks: int, bench: Bench, name: str) -> Row:
    """Train on some ranks, then on fewer, then on as many again, each from the other's checkpoint;
    compared with a run on as many ranks all the time."""
    half = bench.steps // (2 * INTERVAL) * INTERVAL
    left = half - INTERVAL
    config = bench.config(name)
    launch = partial(bench.plain, ranks=ranks)
    run = FaultedRun(bench, dataclasses.replace(config, steps=left), launch)
    run.attempt.finish()
    run.fault_is_now()
    bench.plain(dataclasses.replace(config, steps=half), left_ranks).finish()
    run.config = config
    run.launch()
    run.attempt.finish()
    back = resumed_step(run.run_dir)
    said = f"resumed with {left_ranks} and again with {ranks} ranks, from step {back}"
    expected = None if ranks == RANKS else bench.on_ranks(ranks)
    return run.row(before=left, resumed=left, tolerance=1e-5, said=said, expected=expected)
