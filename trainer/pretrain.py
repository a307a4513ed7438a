"""Pretraining, start to end: `python -m cavmae.trainer.pretrain RECIPE [--field value ...]`.

Started by plain python, `deepspeed --module`, `torchrun -m` or `cavmae.cluster.train`; each sets
the same rank variables. A run folder that has checkpoints goes on from the newest whole one.
"""

import dataclasses
import logging
import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from cavmae.command import exit_code
from cavmae.trainer.config import PretrainConfig
from cavmae.trainer.rank_log import log_to_file, log_to_stderr
from cavmae.trainer.ranks import limit_threads, ranks_from_environment
from cavmae.trainer.recipes import RECIPES
from cavmae.trainer.run_folder import load_config, write_json

log = logging.getLogger("cavmae.trainer.pretrain")  # it is often `__main__`

Config = TypeVar("Config", bound=PretrainConfig)


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


def parse(
    arguments: list[str], kind: type[Config] = PretrainConfig, prog: str = "cavmae pretrain"
) -> Config:
    """The configuration of a command line.

    Args:
        arguments: a recipe's name or the path of a saved `config.json`, then `--field value`s.
        kind: `PretrainConfig` or a dataclass that adds fields with defaults to it.
        prog: how the command is called, for its help.

    Raises:
        ValueError: no such recipe, or a field that a dataclass refuses.
        SystemExit: `--help`, or a field that does not exist (with a message that names it).
    """
    import tyro

    names = ", ".join(RECIPES)
    if not arguments or arguments[0].startswith("-"):
        if not {"-h", "--help"} & set(arguments):
            raise ValueError(f"name a recipe ({names}) or a saved config.json first")
        base = kind()
        description = f"First word: a recipe ({names}) or the path of a saved config.json."
    else:
        name, *arguments = arguments
        if name in RECIPES:
            recipe = RECIPES[name]()
            description = RECIPES[name].__doc__ or ""
        elif name.endswith(".json"):
            recipe = load_config(name, PretrainConfig)
            description = f"The run saved in {name}."
        else:
            raise ValueError(f"{name!r} is no recipe; use one of {names}, or a saved config.json")
        fields = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)}
        base = kind(**fields)
    return tyro.cli(kind, prog=prog, default=base, args=arguments, description=description)


def run(config: PretrainConfig, notice: Callable[[], str] = lambda: "") -> RunSummary:
    """Train, evaluate and save; every rank calls it with the same configuration.

    Args:
        config: the run.
        notice: of the starter: why to save and leave, or an empty text. Asked at each step.

    Raises:
        ValueError: the data, the rank count or the run folder does not fit the configuration.
        OSError: data can't be read or the run folder can't be written.
        NonFiniteError: too many updates in a row were not finite.
    """
    ranks = ranks_from_environment()
    threads = limit_threads(config.threads_per_rank, ranks)
    # torch and what needs it come after the threads are set.
    import torch
    import torch.distributed as dist

    from cavmae.dataloaders.batch import ClipShape
    from cavmae.dataloaders.loader import TrainLoader
    from cavmae.dataloaders.shards import ShardSet
    from cavmae.trainer.agreement import on_first_rank
    from cavmae.trainer.checkpoint import RunState, checkpoint_folder
    from cavmae.trainer.checkpoint_reader import load_newest
    from cavmae.trainer.checkpoint_store import open_store
    from cavmae.trainer.checkpoint_writer import CheckpointWriter
    from cavmae.trainer.engine import Engine, start_process_group
    from cavmae.trainer.held_out import HeldOut
    from cavmae.trainer.loop import train
    from cavmae.trainer.model.cavmae import CAVMAE
    from cavmae.trainer.model.weights import load_initial_weights
    from cavmae.trainer.opening import open_run_folder
    from cavmae.trainer.report import RunReport
    from cavmae.trainer.resolve import resolve
    from cavmae.trainer.schedule import learning_rate
    from cavmae.trainer.stopping import StopRequest, withdraw_request
    from cavmae.trainer.stragglers import OwnTime, StragglerReport
    from cavmae.trainer.task import PretrainTask
    from cavmae.trainer.watchdog import Watchdog

    log_to_stderr(ranks.rank)
    # Build.
    if not config.data.train_folders:
        raise ValueError("data.train is empty; give the folder of a packed tier, e.g. shards/video")
    train_set = ShardSet(config.data.train_folders, config.data.cache)
    store = open_store(checkpoint_folder(config))
    asked = resolve(config, world_size=ranks.world_size, samples=train_set.samples, threads=threads)
    device = start_process_group(ranks)
    run_dir = Path(asked.run_dir)
    config = on_first_rank(lambda: open_run_folder(asked, run_dir, store, device.type))
    log_to_file(run_dir / "logs" / f"rank-{ranks.rank}.log")

    torch.manual_seed(config.seed)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    model = CAVMAE(config.model)
    if config.initial_weights:
        load_initial_weights(model, config.initial_weights)
    model.freeze_unused(
        reconstruct=config.loss.reconstruction_weight > 0,
        contrast=config.loss.contrastive_weight > 0,
    )
    if config.engine.compile:
        model.compile_blocks()
    accumulation = config.global_batch // ranks.world_size // config.micro_batch
    engine = Engine(
        model,
        config.engine,
        config.optimizer,
        micro_batch=config.micro_batch,
        accumulation=accumulation,
        device=device,
    )
    own_time = OwnTime(device)
    task = PretrainTask(
        config,
        rank=ranks.rank,
        world_size=ranks.world_size,
        device=device,
        before_exchange=own_time.meets_others,
    )
    checkpoint, state = load_newest(store, engine) or (None, None)
    start_step = state.step if state else 0
    if state and state.train_set != train_set.fingerprint:
        raise ValueError(
            f"the run in {run_dir} was trained on other clips than data.train "
            f"{config.data.train} now holds; give the former set, or another --run-dir"
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
    report = RunReport(config, run_dir, ranks, start_step=start_step, device=device)
    report.opened(task.layout, train_set, resumed_from=checkpoint)
    held_out = HeldOut(config, shape, ranks, engine, report, device=device)

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

    saver = CheckpointWriter(store, config.checkpoint, engine, state_at, start_step)
    hosts = [""] * ranks.world_size
    dist.all_gather_object(hosts, socket.gethostname())

    # Loop.
    began = time.monotonic()
    steps_per_epoch = train_set.samples / config.global_batch
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
            maximum_skipped_updates=config.engine.maximum_skipped_updates,
            report_every=config.tracking.every_steps,
            report=report.step,
            evaluate_every=config.evaluation.every_steps,
            evaluate=held_out.score,
            save_every=config.checkpoint.every_steps,
            saver=saver,
            stop=StopRequest(
                run_dir if ranks.rank == 0 else None,
                config.checkpoint.leave_within_seconds,
                notice,
            ),
            own_time=own_time,
            stragglers=StragglerReport(config.watchdog.straggler_ratio, hosts),
            watchdog=Watchdog(config.watchdog, run_dir / "hangs", ranks.rank),
            device=device,
        )
    except BaseException:
        report.close("FAILED")
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
        tracking_uri=report.tracking_uri,
        mlflow_run=report.mlflow_run,
    )
    if not outcome.stopped:
        weights = engine.full_state_dict()
        if ranks.rank == 0:
            partial = run_dir / "weights.pt.partial"
            torch.save(weights, partial)
            partial.replace(run_dir / "weights.pt")
            write_json(run_dir / "summary.json", dataclasses.asdict(summary))
    report.close("KILLED" if outcome.stopped else "FINISHED")
    if outcome.stopped:
        log.info(
            "left at step %d of %d (%s); the same command goes on",
            outcome.step,
            config.steps,
            outcome.stopped,
        )
    dist.barrier()
    return summary


def main(arguments: list[str]) -> int:
    """The command; returns its exit code."""
    # The deepspeed launcher puts this first; LOCAL_RANK in the environment says the same.
    words = [word for word in arguments if not word.startswith("--local_rank=")]
    config = parse(words)
    from cavmae.trainer.stopping import withdraw_request

    withdraw_request(Path(config.run_dir))  # one of a start before
    run(config)
    from cavmae.trainer.engine import end_rank  # `--help` does without torch

    end_rank()


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
