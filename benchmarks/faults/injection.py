"""The faults on one machine: each is done to a run for real, by process id, file or gradient.

Every function trains one run, does its fault once checkpoints are there, sees the run to its end
and returns the row. Those that need several machines are in `node_faults.py`.
"""

import dataclasses
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

from cavmae.benchmarks.faults.observed_rank import order_nan
from cavmae.benchmarks.faults.outcome import Row
from cavmae.benchmarks.faults.runs import (
    INTERVAL,
    Bench,
    last_step,
    resumed_step,
    wait_for_checkpoint,
)
from cavmae.benchmarks.harness.processes import Start, answers, free_port, module_command
from cavmae.dataloaders.shards.shard_set import ShardSet
from cavmae.trainer.checkpoint.format import (
    checkpoint_name,
    list_checkpoints,
    list_folders,
    step_of,
)
from cavmae.trainer.checkpoint.store import Store
from cavmae.trainer.config.configs import PretrainConfig, TrackingConfig

DAMAGED_CLIPS = 4
"""Of a shard."""


def rank_signalled(sign: signal.Signals) -> Callable[[Bench, str], Row]:
    """A signal to one of two ranks under Ray, which starts both again."""

    def row(bench: Bench, name: str) -> Row:
        config = bench.config(name)
        start = bench.on_ray(config)
        try:
            wait_for_checkpoint(start, config, 2 * INTERVAL)
            before, fault = last_step(Path(config.run_dir)), time.time()
            start.ranks()[-1].send_signal(sign)
            said = start.wait_for(lambda: start.line("rank . failed"), "the failure")
            noticed = time.time()
            start.finish()
            return bench.row(
                config, fault, noticed, said, before=before, resumed=resumed_step(start)
            )
        finally:
            start.kill()

    return row


def head_killed(bench: Bench, name: str) -> Row:
    """Driver, Ray and ranks are gone at once; the same command is given again."""
    config = bench.config(name)
    start = bench.on_ray(config)
    try:
        wait_for_checkpoint(start, config, 2 * INTERVAL)
        before, fault = last_step(Path(config.run_dir)), time.time()
        start.kill()
        start = bench.on_ray(config)
        start.finish()
        return bench.row(
            config, fault, fault, "given again by hand", before=before, resumed=resumed_step(start)
        )
    finally:
        start.kill()


def terminated(bench: Bench, name: str) -> Row:
    """SIGTERM to all ranks, as a scheduler sends it; the same command is given again."""
    config = bench.config(name)
    start = bench.plain(config)
    wait_for_checkpoint(start, config, 2 * INTERVAL)
    fault = time.time()
    for process in start.processes:
        process.send_signal(signal.SIGTERM)
    said = start.wait_for(lambda: start.line("SIGTERM: saving"), "the notice")
    noticed = time.time()
    start.finish()
    before = last_step(Path(config.run_dir))
    start = bench.plain(config)
    start.finish()
    return bench.row(config, fault, noticed, said, before=before, resumed=resumed_step(start))


def checkpoint_damaged(damage: Callable[[Path], None]) -> Callable[[Bench, str], Row]:
    """All ranks are killed and something happens to the newest checkpoint; started again."""

    def row(bench: Bench, name: str) -> Row:
        config = bench.config(name)
        start = bench.plain(config)
        wait_for_checkpoint(start, config, 2 * INTERVAL)
        start.kill()
        before, fault = last_step(Path(config.run_dir)), time.time()
        newest = damage_newest(config, damage)
        start = bench.plain(config)
        said = start.wait_for(lambda: start.line("trying the previous one"), "the notice")
        noticed = time.time()
        start.finish()
        resumed = resumed_step(start)
        if resumed >= newest:
            raise RuntimeError(f"the damaged checkpoint of step {newest} was used")
        # The damaged interval is lost with its checkpoint; counted from there on.
        before = min(before, newest)
        return bench.row(config, fault, noticed, said, before=before, resumed=resumed)

    return row


def damage_newest(config: PretrainConfig, damage: Callable[[Path], None]) -> int:
    """Do something to a file of the newest checkpoint; returns its step."""
    folder = Path(config.run_dir) / "checkpoints"
    newest = list_checkpoints(Store(folder))[-1]
    damage(next((folder / newest).glob("state/*optim_states.pt")))
    return step_of(newest)


def cut_short(path: Path) -> None:
    """A file loses its end."""
    path.write_bytes(path.read_bytes()[:-1000])


def flip_a_bit(path: Path) -> None:
    """A file's middle changes by one bit."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def killed_while_writing(bench: Bench, name: str) -> Row:
    """A rank's file is a pipe that nobody reads, so the write never ends; then all are killed."""
    config = bench.config(name)
    start = bench.plain(config)
    wait_for_checkpoint(start, config, INTERVAL)
    os.mkfifo(file_of_second_rank(config, 3 * INTERVAL))
    run_dir = Path(config.run_dir)
    start.wait_for(lambda: last_step(run_dir) > 3 * INTERVAL, "the step after")
    before, fault = last_step(run_dir), time.time()
    start.kill()
    start = bench.plain(config)
    start.finish()
    store = Store(run_dir / "checkpoints")
    left = set(list_folders(store)) - set(list_checkpoints(store))
    if left:
        raise RuntimeError(f"{left} is left")
    return bench.row(
        config,
        fault,
        fault,
        "started again by hand",
        before=before,
        resumed=resumed_step(start),
        while_writing=before - 3 * INTERVAL,
    )


def file_of_second_rank(config: PretrainConfig, step: int) -> Path:
    """Where the second rank will write its part of a checkpoint; its folder is made."""
    folder = Path(config.run_dir) / "checkpoints" / checkpoint_name(step) / "state"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt"


def disk_full(bench: Bench, name: str) -> Row:
    """A rank's file goes to /dev/full, which answers as a full disk does."""
    config = bench.config(name)
    start = bench.plain(config)
    wait_for_checkpoint(start, config, INTERVAL)
    file_of_second_rank(config, 3 * INTERVAL).symlink_to("/dev/full")
    run_dir = Path(config.run_dir)
    start.wait_for(lambda: last_step(run_dir) >= 3 * INTERVAL, f"step {3 * INTERVAL}")
    fault = time.time()
    said = start.wait_for(lambda: start.line("ALARM"), "the alarm")
    noticed = time.time()
    start.finish()
    return bench.row(config, fault, noticed, said, resumed=None)


def nan_rolled_back(bench: Bench, name: str) -> Row:
    """A gradient of one rank is NaN once, and no update may be left out: Ray's run goes back."""
    config = bench.config(name)
    strict = dataclasses.replace(config.engine, max_skipped_updates=1)
    config = dataclasses.replace(config, engine=strict)
    carried_out = order_nan(Path(config.run_dir), rank=1, step=2 * INTERVAL + 5)
    start = bench.on_ray(config)
    try:
        start.wait_for(lambda: not carried_out.exists(), "the gradient")
        fault = time.time()
        said = start.wait_for(lambda: start.line("rank . failed"), "the failure")
        noticed = time.time()
        start.finish()
        before = 2 * INTERVAL + 5
        return bench.row(config, fault, noticed, said, before=before, resumed=resumed_step(start))
    finally:
        start.kill()


def nan_left_out(bench: Bench, name: str) -> Row:
    """A gradient of one rank is NaN once; the update is left out on both, and training goes on."""
    config = bench.config(name)
    carried_out = order_nan(Path(config.run_dir), rank=1, step=2 * INTERVAL)
    start = bench.plain(config)
    start.wait_for(lambda: not carried_out.exists(), "the gradient")
    fault = time.time()
    said = start.wait_for(lambda: start.line("the update is left out"), "the notice")
    noticed = time.time()
    start.finish()
    expected = bench.leaving_out(2 * INTERVAL)
    return bench.row(config, fault, noticed, said, resumed=None, expected=expected)


def shard_damaged(bench: Bench, name: str) -> Row:
    """Bits of a shard have flipped in the sound of some clips before the run starts; each goes into
    quarantine at the position where it is first drawn."""
    shards = bench.work / "damaged-shards"
    shutil.copytree(bench.work / "shards" / "frames", shards)
    damaged = flip_bits_of_sounds(shards, DAMAGED_CLIPS)
    config = bench.config(name)
    data = dataclasses.replace(config.data, train=str(shards))
    config = dataclasses.replace(config, data=data)
    fault = time.time()
    start = bench.plain(config)
    said = start.wait_for(lambda: start.line("left out"), "the notice")
    noticed = time.time()
    start.finish()
    expected = bench.without(damaged)
    return bench.row(config, fault, noticed, said, resumed=None, expected=expected)


def flip_bits_of_sounds(folder: Path, clips: int) -> tuple[str, ...]:
    """Change a bit in the sound of some clips of the first shard, which every use of them reads.

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
    """The tracking server is killed while the run sends it metrics."""
    port = free_port()
    store = bench.work / "mlflow-server"
    store.mkdir()
    command = module_command(
        "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"
    )
    backend = ["--backend-store-uri", f"sqlite:///{store}/m.db", "--artifacts-destination"]
    server = Start([([*command, *backend, str(store)], {})], store / "server.log")
    try:
        server.wait_for(lambda: answers(port), "the tracking server's start")
        tracking = TrackingConfig(uri=f"http://127.0.0.1:{port}", every_steps=1)
        config = bench.config(name, tracking=tracking)
        start = bench.plain(config)
        wait_for_checkpoint(start, config, 2 * INTERVAL)
        fault = time.time()
        server.kill()
        said = start.wait_for(lambda: start.line("did not take a record"), "the notice")
        noticed = time.time()
        start.finish()
        return bench.row(config, fault, noticed, said, resumed=None)
    finally:
        server.kill()


def other_rank_counts(bench: Bench, name: str) -> Row:
    """2, then 1, then 2 ranks, each from the other's checkpoint."""
    half = bench.steps // (2 * INTERVAL) * INTERVAL
    config = bench.config(name)
    bench.plain(dataclasses.replace(config, steps=half - INTERVAL), 2).finish()
    fault = time.time()
    bench.plain(dataclasses.replace(config, steps=half), 1).finish()
    start = bench.plain(config, 2)
    start.finish()
    said = f"went on with 1 and again with 2 ranks, from step {resumed_step(start)}"
    left = half - INTERVAL
    return bench.row(config, fault, fault, said, before=left, resumed=left, tolerance=1e-5)
