"""Opening a run: its data, its ranks, its store of checkpoints, and its folder, new or resumed."""

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from cavmae.atomic_write import read_json, remove_leftovers, write_json
from cavmae.dataloaders.loading.reader import check_set
from cavmae.dataloaders.shards.shard_set import ShardSet
from cavmae.trainer.attention_choice import fixed_attention
from cavmae.trainer.checkpoint.format import (
    check_not_left_behind,
    checkpoint_folder,
    list_checkpoints,
)
from cavmae.trainer.checkpoint.store import Store, check_writable
from cavmae.trainer.config.configs import RunConfig
from cavmae.trainer.config.resolve import (
    check_same_run,
    native_dtype,
    resolve,
    step_shares,
    with_real_places,
)
from cavmae.trainer.config.serialize import load_run_config, save_config
from cavmae.trainer.cost_model.memory_advice import largest_micro_batch
from cavmae.trainer.distributed.collectives import on_all_ranks, on_first_rank
from cavmae.trainer.distributed.env import Ranks
from cavmae.trainer.distributed.process_group import start_process_group
from cavmae.trainer.fault_tolerance.host_memory import rank_memory
from cavmae.trainer.fault_tolerance.lease import Lease
from cavmae.trainer.run_status import StatusWriter
from cavmae.trainer.tracking.code_snapshot import git_commit, save_code, started_by
from cavmae.trainer.tracking.hardware import hardware
from cavmae.trainer.tracking.rank_logging import log_to_file
from cavmae.trainer.trained_on import training_of

Config = TypeVar("Config", bound=RunConfig)
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenRun:
    """A run that this rank has opened.

    Attributes:
        config: resolved.
        run_dir: its folder.
        ranks: this process's rank.
        device: this rank's device.
        store: its checkpoints.
        train_set: what it trains on.
        status: what watchers see of it.
        lease: this attempt's right to write to it; the first rank holds it.
        attempt: the number of this attempt.
    """

    config: RunConfig
    run_dir: Path
    ranks: Ranks
    device: torch.device
    store: Store
    train_set: ShardSet
    status: StatusWriter
    lease: Lease
    attempt: int


def open_run(
    config: RunConfig, ranks: Ranks, threads: int, status: StatusWriter, lease: Lease
) -> OpenRun:
    """Open the data, join the other ranks, and open the run folder; all ranks call it.

    Args:
        config: what the user asked for.
        ranks: this process's rank.
        threads: CPU threads of this rank, as set.
        status: learns when the run folder is open.
        lease: taken by the first rank before it touches anything.

    Raises:
        OwnedError: another start of the run lives.
        ValueError: the data, the rank count or the run folder does not fit the configuration.
        OSError: data can't be read or the run folder can't be written.
    """
    if not config.data.train_folders:
        raise ValueError("data.train is empty; give the folder of a packed tier, e.g. shards/video")
    config = with_real_places(config)
    train_set = ShardSet(config.data.train_folders, config.data.cache)
    check_set(train_set, config.data)
    if config.data.validation:  # now, not at the first validation
        check_set(ShardSet(config.data.validation, config.data.cache), config.data)
    store = Store(checkpoint_folder(config))
    device = start_process_group(ranks)
    resolved = resolve(
        on_first_rank(lambda: _with_lanes_of_run(config, store)),
        world_size=ranks.world_size,
        samples=train_set.samples,
        threads=threads,
    )
    run_dir = Path(resolved.run_dir)

    memory = min(on_all_ranks(lambda: rank_memory(ranks, device)))

    def open_and_note() -> tuple[RunConfig, int, int]:
        places = {"run_dir": Store(run_dir)}
        if config.checkpoint.folder:
            places["checkpoint.folder"] = store
        attempt = lease.take(places)
        begun = bool(list_checkpoints(store))
        opened = open_run_dir(resolved, run_dir, store, device, ranks.world_size, memory)
        if not begun:  # else its sets are those that it began with, or it is refused
            training_of(opened).save(run_dir)
        return opened, attempt, status.attempt

    config, attempt, start = on_first_rank(open_and_note)
    status.opened(config.steps, start)
    log_to_file(run_dir / "logs" / f"rank-{ranks.rank}.log")
    return OpenRun(config, run_dir, ranks, device, store, train_set, status, lease, attempt)


def open_run_dir(
    config: Config,
    run_dir: Path,
    store: Store,
    device: torch.device,
    world_size: int,
    memory_bytes: int,
) -> Config:
    """Make the folder, or check that this attempt resumes the run in it; one rank calls it.

    Args:
        config: resolved.
        run_dir: its folder.
        store: its checkpoints.
        device: of this rank.
        world_size: ranks.
        memory_bytes: that each rank can take.

    Returns:
        The configuration with the dtype, the micro-batch and, on a GPU, the attention of the run.

    Raises:
        ValueError: the folder or the checkpoints are of another run, or the store is not writable.
        OSError: the folder or the store can't be written.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    for folder in (run_dir, *(run_dir / name for name in ("epoch-weights", "lease"))):
        remove_leftovers(folder, older_than_seconds=3600)  # another process may be writing
    saved, run_file = run_dir / "config.json", run_dir / "run.json"
    record = read_json(run_file) if run_file.exists() else {}
    check_writable(store)
    folder = config.checkpoint.folder
    if folder and "://" not in folder:
        folder = str(Path(folder).absolute())
    folder_before = record.get("checkpoint_folder", "")
    if record and folder_before != folder:
        check_not_left_behind(store, folder_before or str(run_dir / "checkpoints"), run_dir)
    before, gpu = None, device.type == "cuda"
    if list_checkpoints(store):
        if not saved.exists():
            raise ValueError(
                f"checkpoint.folder {store.location()} has checkpoints and run_dir {run_dir} has "
                "no config.json: they belong to another run; give another folder, or its run_dir"
            )
        before = load_run_config(saved)
    if config.engine.dtype == "auto":
        dtype = before.engine.dtype if before else native_dtype(gpu=gpu)
        config = dataclasses.replace(config, engine=dataclasses.replace(config.engine, dtype=dtype))
    if config.engine.attention == "auto" and gpu:
        attention = before.engine.attention if before else fixed_attention(config, device)
        engine = dataclasses.replace(config.engine, attention=attention)
        config = dataclasses.replace(config, engine=engine)
    if not config.micro_batch:
        micro_batch = _micro_batch(config, before, world_size, memory_bytes, gpu=gpu)
        config = dataclasses.replace(config, micro_batch=micro_batch)
    if before:
        check_same_run(before, config)
    save_config(config, saved)
    attempt = {
        "git_commits": git_commit(),
        "code": save_code(run_dir),
        "commands": started_by(),
        "hardware": {"ranks": world_size, "of the first": hardware(device)},
    }
    attempts = {name: [*record.get(name, []), value] for name, value in attempt.items()}
    write_json(run_file, record | attempts | {"checkpoint_folder": folder})
    return config


def _with_lanes_of_run(config: RunConfig, store: Store) -> RunConfig:
    """Keep the lanes of a run that resumes: their default follows from its first rank count."""
    saved = Path(config.run_dir) / "config.json"
    if config.lanes or not saved.exists() or not list_checkpoints(store):
        return config
    before = load_run_config(saved)
    if before.global_batch != config.global_batch:
        return config  # refused when the two are compared
    return dataclasses.replace(config, lanes=before.lanes)


def _micro_batch(
    config: RunConfig, before: RunConfig | None, world_size: int, memory_bytes: int, *, gpu: bool
) -> int:
    """Choose the micro-batch: the one of before, or the largest that fits in a rank's memory."""
    if before:
        kept = dataclasses.replace(config, micro_batch=before.micro_batch)
        return step_shares(kept, world_size).largest_micro_batch
    found = largest_micro_batch(config, world_size, memory_bytes, gpu=gpu)
    log.info(
        "micro_batch %d: the largest predicted to fit in the %.1f GB that a rank has",
        found,
        memory_bytes / 1e9,
    )
    return found
