"""Training on the device that computes nothing, in one process after another; see
`cavmae.benchmarks.fake_cuda`. Functions here are called in such a process."""

import dataclasses
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from cavmae.benchmarks.fake_cuda.device import DEVICE
from cavmae.benchmarks.fake_cuda.trace import Trace, traced
from cavmae.benchmarks.harness.synthetic_batches import TINY_MODEL, SyntheticBatches
from cavmae.dataloaders.batch import AudioVideoBatch
from cavmae.trainer.checkpoint.store import Store
from cavmae.trainer.config.configs import RunConfig, TrackingConfig
from cavmae.trainer.config.resolve import resolve
from cavmae.trainer.distributed.env import Ranks
from cavmae.trainer.fault_tolerance.lease import Lease
from cavmae.trainer.run_dir import OpenRun
from cavmae.trainer.run_status import StatusWriter
from cavmae.trainer.tasks.labels import LabelSet

STEPS, LOGGED_EVERY = 3, 2
"""The steps that are trained, of which the second logs metrics."""
LABELS = LabelSet(("a", "b", "c"), ("a", "b", "c"))

Config = TypeVar("Config", bound=RunConfig)


@dataclass(frozen=True)
class FakeTraining:
    """What a run did in its steps; phases of the trace are `1`, `2` and `3`.

    Attributes:
        trace: of the steps.
        logged: metrics by step.
    """

    trace: Trace
    logged: dict[int, dict[str, float]]


class _AllTraced(Exception):
    """The steps are done; the rest of the run is skipped."""


class Batches(SyntheticBatches):
    """Clips with labels, one of them mixed with another clip."""

    def __iter__(self) -> Iterator[AudioVideoBatch]:
        for batch in super().__iter__():
            clips = len(batch.sample_ids)
            shares = torch.ones(clips)
            shares[0] = 0.5
            yield dataclasses.replace(
                batch,
                labels=(("a",),) * clips,
                mixup_lambda=shares,
                mixed_labels=(("b",), *((),) * (clips - 1)),
            )


def train(config: RunConfig, world_size: int) -> FakeTraining:
    """Train the tiny model for some steps, with DeepSpeed, as the first of some ranks."""
    from cavmae.trainer.trainer import Hooks, Trainer

    ranks = Ranks(0, world_size, 0, world_size)
    join_ranks(ranks)
    logged: dict[int, dict[str, float]] = {}
    steps = _Steps()
    names = ("log_start", "log_step", "close")
    logger = SimpleNamespace(**dict.fromkeys(names, lambda *args, **kwargs: None))
    logger.log_step = logged.__setitem__
    hooks = Hooks(make_loader=Batches, span=steps.span)
    with (
        tempfile.TemporaryDirectory() as folder,
        patch("cavmae.trainer.trainer.RunLogger", lambda *args, **kwargs: logger),
        patch("cavmae.trainer.trainer.open_labels", lambda *args, **kwargs: LABELS),
        patch("torch.distributed.broadcast_object_list", lambda objects: None),
        patch("torch.distributed.all_gather_object", _all_alike),
        traced() as trace,
    ):
        config = tiny(config, Path(folder), world_size)
        train_set: Any = SimpleNamespace(fingerprint="", samples=10**6, tier="frames")
        status = StatusWriter(Path(folder), 0)
        store = Store(folder)
        opened = OpenRun(
            config, Path(folder), ranks, DEVICE, store, train_set, status, Lease(), attempt=1
        )
        trainer = Trainer(opened, lambda: "", hooks)
        steps.trace = trace
        try:
            trainer._loop()
        except _AllTraced:
            return FakeTraining(trace, logged)
        raise AssertionError("the run ended before all its steps were traced")


def tiny(config: Config, folder: Path, world_size: int) -> Config:
    config = dataclasses.replace(
        config,
        run_dir=str(folder),
        steps=100,
        model=TINY_MODEL,
        engine=dataclasses.replace(config.engine, dtype="bf16"),
        tracking=TrackingConfig(every_steps=LOGGED_EVERY),
    )
    return resolve(config, world_size=world_size, samples=10**6, threads=1)


def join_ranks(ranks: Ranks) -> None:
    """Join ranks that are not there; collectives do nothing."""
    from cavmae.trainer.distributed.process_group import quiet_deepspeed  # isort: skip
    import deepspeed

    if dist.is_initialized():
        dist.destroy_process_group()
        deepspeed.comm.comm.cdb = deepspeed.utils.groups._WORLD_GROUP = None
    os.environ |= {
        "RANK": str(ranks.rank),
        "WORLD_SIZE": str(ranks.world_size),
        "LOCAL_RANK": str(ranks.local_rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    dist.init_process_group("fake", store=FakeStore(), rank=ranks.rank, world_size=ranks.world_size)
    with quiet_deepspeed():
        deepspeed.init_distributed(dist_backend="nccl", verbose=False, auto_mpi_discovery=False)


def _all_alike(of_ranks: list[Any], own: Any) -> None:
    of_ranks[:] = [own] * len(of_ranks)


class _Steps:
    """Numbers the steps of a trace by the trainer's spans."""

    trace: Trace
    number = 0

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        if name == "data wait":
            self.number += 1
            self.trace.begin_phase(str(self.number))
            if self.number > STEPS:
                raise _AllTraced
        yield
