"""A run, start to end: build, loop, save. What it trains is a stage, pretraining or fine-tuning.

Every rank calls `run` with the same configuration; a run folder that has checkpoints goes on from
the newest whole one.
"""

import dataclasses
import logging
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from cavmae.atomic_write import atomic_write, write_json
from cavmae.trainer.config.configs import EngineConfig, PretrainConfig, RunConfig
from cavmae.trainer.config.finetune_config import FinetuneConfig
from cavmae.trainer.distributed.env import Ranks, limit_threads, ranks_from_environment
from cavmae.trainer.tracking.rank_logging import log_to_file, log_to_stderr

if TYPE_CHECKING:  # torch comes after the threads are set
    import torch

    from cavmae.dataloaders.shards.shard_set import ShardSet
    from cavmae.trainer.checkpoint.store import Store
    from cavmae.trainer.model.encoder import AudioVideoEncoder
    from cavmae.trainer.tasks.finetune import Finetuning
    from cavmae.trainer.tasks.pretraining import Pretraining

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunSummary:
    """How a run ended, the same on every rank.

    Attributes:
        run_dir: the run folder.
        step: optimizer steps done.
        steps: optimizer steps asked for.
        stopped: why this start was asked to leave early, empty where it was not; the same command
            goes on.
        skipped_updates: updates of this start left out for a non-finite loss or gradient.
        quarantined: unreadable clips found on this rank.
        seconds: wall time of this start's training loop.
        samples_per_second: over this start's training loop, everything included.
        scores: held-out metrics of the last evaluation, by name; empty without held-out clips.
        tracking_uri, mlflow_run: where MLflow has the run; empty on ranks above 0.
    """

    run_dir: str
    step: int
    steps: int
    stopped: str
    skipped_updates: int
    quarantined: int
    seconds: float
    samples_per_second: float
    scores: dict[str, float]
    tracking_uri: str = ""
    mlflow_run: str = ""


def run(config: RunConfig, notice: Callable[[], str] = lambda: "") -> RunSummary:
    """Train, evaluate and save; every rank calls it with the same configuration.

    Args:
        config: the run.
        notice: of the starter: why to save and leave, or an empty text. Asked at each step.

    Raises:
        ValueError: the data, the rank count, the run folder or the memory does not fit the
            configuration.
        OSError: data can't be read or the run folder can't be written.
        NonFiniteError: too many updates in a row were not finite.
    """
    ranks = ranks_from_environment()
    threads = limit_threads(config.threads_per_rank, ranks)
    # torch and what needs it come after the threads are set.
    from cavmae.dataloaders.shards.shard_set import ShardSet
    from cavmae.trainer.checkpoint.format import checkpoint_folder
    from cavmae.trainer.checkpoint.store import open_store
    from cavmae.trainer.config.resolve import resolve
    from cavmae.trainer.distributed.collectives import on_first_rank
    from cavmae.trainer.distributed.engine import start_process_group
    from cavmae.trainer.fault_tolerance.oom import check_machines, oom_guard
    from cavmae.trainer.run_dir import open_run_dir

    log_to_stderr(ranks.rank)
    if not config.data.train_folders:
        raise ValueError("data.train is empty; give the folder of a packed tier, e.g. shards/video")
    train_set = ShardSet(config.data.train_folders, config.data.cache)
    store = open_store(checkpoint_folder(config))
    asked = resolve(config, world_size=ranks.world_size, samples=train_set.samples, threads=threads)
    device = start_process_group(ranks)
    run_dir = Path(asked.run_dir)
    config = on_first_rank(lambda: open_run_dir(asked, run_dir, store, device.type))
    log_to_file(run_dir / "logs" / f"rank-{ranks.rank}.log")
    if device.type == "cpu":
        check_machines(config, ranks, store)
    with oom_guard(config, run_dir, store, ranks, device):
        return _train(config, notice, ranks, device, run_dir, store, train_set)


def configure_blocks(model: "AudioVideoEncoder", engine: EngineConfig) -> None:
    """Have the model's blocks run as the fields say."""
    if engine.attention != "auto":
        model.use_attention(engine.attention)
    model.recompute_blocks(engine.activation_checkpointing)
    if engine.compile:
        model.compile_blocks()


def _train(
    config: RunConfig,
    notice: Callable[[], str],
    ranks: Ranks,
    device: "torch.device",
    run_dir: Path,
    store: "Store",
    train_set: "ShardSet",
) -> RunSummary:
    """The run, once it is known what it is and where."""
    import torch
    import torch.distributed as dist

    from cavmae.dataloaders.batch import ClipShape
    from cavmae.dataloaders.loading.loader import TrainLoader
    from cavmae.trainer.checkpoint.format import RunState
    from cavmae.trainer.checkpoint.load import load_newest
    from cavmae.trainer.checkpoint.save import CheckpointSaver
    from cavmae.trainer.checkpoint.weight_average import EpochWeights
    from cavmae.trainer.distributed.engine import Engine
    from cavmae.trainer.fault_tolerance.preemption import StopRequest, withdraw_request
    from cavmae.trainer.fault_tolerance.stragglers import RankTimer, StragglerReport
    from cavmae.trainer.fault_tolerance.watchdog import Watchdog
    from cavmae.trainer.lr_schedule import learning_rate
    from cavmae.trainer.tracking.profiler import StepProfile
    from cavmae.trainer.tracking.run_logger import RunLogger
    from cavmae.trainer.trainer import train
    from cavmae.trainer.validator import Validator

    # Build.
    torch.manual_seed(config.seed)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    stage = _stage(config, ranks, device, run_dir, store)
    model, groups = stage.model()
    configure_blocks(model, config.engine)
    accumulation = config.global_batch // ranks.world_size // config.micro_batch
    engine = Engine(
        model,
        config.engine,
        config.optimizer,
        micro_batch=config.micro_batch,
        accumulation=accumulation,
        device=device,
        groups=groups,
    )
    rank_timer = RankTimer(device)
    task = stage.task(rank_timer.before_sync)
    checkpoint, state = load_newest(store, engine) or (None, None)
    start_step = state.step if state else 0
    if state and state.train_set != train_set.fingerprint:
        raise ValueError(
            f"the run in {run_dir} was trained on other clips than data.train "
            f"{config.data.train} now holds; give the former set, or another --run-dir"
        )
    steps_per_epoch = train_set.samples / config.global_batch
    epoch_weights = EpochWeights(
        run_dir / "epoch-weights",
        first_epoch=config.average_from_epoch,
        steps=config.steps,
        steps_per_epoch=steps_per_epoch,
    )
    shape = ClipShape(config.model.audio_frames, config.model.mel_bins, config.model.image_size)
    loader = TrainLoader(
        config.data,
        shape,
        seed=config.seed,
        global_batch=config.global_batch,
        micro_batch=config.micro_batch,
        lanes=config.lanes,
        rank=ranks.rank,
        world_size=ranks.world_size,
        device=device,
        start_position=state.position if state else 0,
        quarantine=state.quarantine if state else (),
        journal=run_dir / "journal" / f"rank-{ranks.rank}.txt",
    )
    logger = RunLogger(
        config,
        run_dir,
        ranks,
        start_step=start_step,
        steps_per_epoch=steps_per_epoch,
        device=device,
    )
    logger.log_start(task.description, train_set, resumed_from=checkpoint)
    held_out = Validator(config, shape, ranks, stage.score, logger, device=device)

    def state_at(step: int) -> RunState:
        quarantine: list[list[tuple[str, str]] | None] = [None] * ranks.world_size
        dist.all_gather_object(
            quarantine, [(item.sample_id, item.reason) for item in loader.quarantine]
        )
        found = sorted({item for items in quarantine if items for item in items})
        return RunState(
            step=step,
            position=step * config.global_batch,
            quarantine=tuple(found),
            train_set=train_set.fingerprint,
            world_size=ranks.world_size,
            zero_stage=config.engine.zero_stage,
            dtype=config.engine.dtype,
        )

    saver = CheckpointSaver(store, config.checkpoint, engine, state_at, start_step)
    hosts = [""] * ranks.world_size
    dist.all_gather_object(hosts, socket.gethostname())

    # Loop.
    began = time.monotonic()
    try:
        outcome = train(
            engine,
            task,
            loader,
            start_step=start_step,
            steps=config.steps,
            accumulation=accumulation,
            global_batch=config.global_batch,
            learning_rate=lambda step: learning_rate(
                config.schedule,
                config.optimizer.learning_rate,
                step=step,
                steps=config.steps,
                steps_per_epoch=steps_per_epoch,
            ),
            max_skipped_updates=config.engine.max_skipped_updates,
            report_every=config.tracking.every_steps,
            report=logger.log_step,
            evaluate_every=config.evaluation.every_steps,
            evaluate=lambda step: held_out.score(engine.module, step),
            end_step=lambda step: epoch_weights.keep(engine, step),
            save_every=config.checkpoint.every_steps,
            saver=saver,
            stop=StopRequest(
                run_dir if ranks.rank == 0 else None,
                config.checkpoint.grace_seconds,
                notice,
            ),
            rank_timer=rank_timer,
            stragglers=StragglerReport(config.watchdog.straggler_ratio, hosts),
            watchdog=Watchdog(config.watchdog, run_dir / "hangs", ranks.rank),
            profile=StepProfile(
                config.profile,
                run_dir / "profile",
                rank=ranks.rank,
                start_step=start_step,
                device=device,
            ),
            device=device,
        )
        weights = {}
        if not outcome.stopped:
            weights = epoch_weights.mean() if epoch_weights else engine.full_state_dict()
            if epoch_weights and held_out.there:
                held_out.score(_model_of(weights, stage, device), outcome.step, "averaged")
    except BaseException:
        logger.close("FAILED")
        raise
    finally:
        loader.close()

    # Save.
    if outcome.stopped and ranks.rank == 0:
        withdraw_request(run_dir)
    seconds = time.monotonic() - began
    summary = RunSummary(
        run_dir=str(run_dir),
        step=outcome.step,
        steps=config.steps,
        stopped=outcome.stopped,
        skipped_updates=outcome.skipped_updates,
        quarantined=len(loader.quarantine),
        seconds=seconds,
        samples_per_second=(outcome.step - start_step) * config.global_batch / max(seconds, 1e-9),
        scores=held_out.scores,
        tracking_uri=logger.tracking_uri,
        mlflow_run=logger.mlflow_run,
    )
    if not outcome.stopped and ranks.rank == 0:
        with atomic_write(run_dir / "weights.pt") as temporary, temporary.open("wb") as file:
            torch.save(weights, file)  # torch writes the name of a path into the file
        write_json(run_dir / "summary.json", dataclasses.asdict(summary))
    logger.close("KILLED" if outcome.stopped else "FINISHED")
    if outcome.stopped:
        log.info(
            "left at step %d of %d (%s); the same command goes on",
            outcome.step,
            config.steps,
            outcome.stopped,
        )
    dist.barrier()
    return summary


def run_as_rank(config: RunConfig) -> NoReturn:
    """Run as the rank that the environment names, and end the process."""
    from cavmae.trainer.fault_tolerance.preemption import withdraw_request

    withdraw_request(Path(config.run_dir))  # one of a start before
    run(config)
    from cavmae.trainer.distributed.engine import end_rank

    end_rank()


def _stage(
    config: RunConfig, ranks: Ranks, device: "torch.device", run_dir: Path, store: "Store"
) -> "Pretraining | Finetuning":
    """What the run trains; the first rank keeps the classes of fine-tuning in the run folder."""
    if isinstance(config, FinetuneConfig):
        from cavmae.trainer.checkpoint.format import list_checkpoints
        from cavmae.trainer.distributed.collectives import on_first_rank
        from cavmae.trainer.tasks.finetune import Finetuning
        from cavmae.trainer.tasks.labels import open_labels

        labels = on_first_rank(
            lambda: open_labels(config, run_dir, begun=bool(list_checkpoints(store)))
        )
        return Finetuning(config, labels, device)
    assert isinstance(config, PretrainConfig)
    from cavmae.trainer.tasks.pretraining import Pretraining

    return Pretraining(config, ranks, device)


def _model_of(
    weights: "dict[str, torch.Tensor]", stage: "Pretraining | Finetuning", device: "torch.device"
) -> "torch.nn.Module":
    """A model of its own on every rank, with the weights that the first one has."""
    import torch.distributed as dist

    model, _ = stage.model()
    if dist.get_rank() == 0:
        model.load_state_dict(weights)
    model.to(device)
    for parameter in model.parameters():
        dist.broadcast(parameter.data, src=0)
    return model
