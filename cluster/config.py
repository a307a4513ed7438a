"""Fields of a run on a Ray cluster. Imports nothing heavy."""

from dataclasses import dataclass, field, fields
from typing import Annotated

import tyro

from cavmae.field_checks import (
    CheckedFields,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Seconds,
    at_least,
)
from cavmae.trainer.config.configs import FinetuneConfig, PretrainConfig, RunConfig


@dataclass(frozen=True)
class ClusterConfig(CheckedFields):
    """Where Ray places the ranks, and how often it restarts them.

    Raises:
        ValueError: a field is out of range, or does not fit another one.
    """

    workers: PositiveInt = 2
    """Number of ranks, one Ray worker each."""
    min_workers: int = 0
    """Elastic training: minimum number of ranks while nodes are missing. As many from this to
    `workers` are used as fit; nodes that return are used again. 0: always `workers`."""
    resize_every_seconds: Seconds = 60.0
    """Interval between checks for new nodes, where `min_workers` is set."""
    gpus_per_worker: int = 0
    """1: one GPU per rank; 0: train on CPUs."""
    cpus_per_worker: PositiveInt = 1
    """CPU cores reserved per rank, and its CPU threads where `threads_per_rank` is 0."""
    address: str = ""
    """Ray cluster to use, such as `auto` (the one on this machine) or HOST:6379; empty:
    RAY_ADDRESS, else a local cluster that is started for this run and stopped at its end."""
    max_failures: Annotated[int, at_least(0, "never start again")] = 10
    """Maximum failures of training ranks in a row without a new checkpoint; after each, the ranks
    restart from the newest one. Three alike at one step end the run earlier, and errors that a
    restart cannot fix at once."""
    outage_hours: PositiveFloat = 48.0
    """How long a run that has trained before tries again while data, a store, the network or nodes
    are away, at least every five minutes."""
    collective_timeout_seconds: PositiveInt = 1800
    """Timeout of collectives: a rank that waits longer fails, and all ranks restart."""
    storage: str = ""
    """Shared folder for Ray Train's internal state; empty: `ray` in the run folder. Runs do not
    resume from it."""

    dry_run: bool = False
    """Print the memory and time that a run would need, without starting it; fails if it would not
    fit."""
    memory_gb_per_worker: NonNegativeFloat = 0.0
    """Memory per GPU (or per rank, on CPUs) that `dry_run` compares with; 0: no comparison."""

    gpus_per_node: PositiveInt = 8
    """GPUs per node, for a `dry_run` without a cluster."""
    gpu: str = "H200"
    """GPU for the time that `dry_run` predicts, by the driver's name or a part of it, such as
    `A100`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gpus_per_worker not in (0, 1):
            raise ValueError(
                f"gpus_per_worker is {self.gpus_per_worker}; a rank drives one GPU: use 1, "
                "or 0 to train on CPUs, and set workers to the number of GPUs"
            )
        if not 0 <= self.min_workers <= self.workers:
            raise ValueError(
                f"min_workers is {self.min_workers} and workers "
                f"{self.workers}; use 0 (always all) or 1 to {self.workers}"
            )


@dataclass(frozen=True)
class RayPretrainConfig(PretrainConfig):
    """One pretraining run on a Ray cluster."""

    cluster: Annotated[ClusterConfig, tyro.conf.arg(name="")] = field(default_factory=ClusterConfig)
    """Its fields have no prefix on the command line: `--workers 8`."""


@dataclass(frozen=True)
class RayFinetuneConfig(FinetuneConfig):
    """One fine-tuning run on a Ray cluster."""

    cluster: Annotated[ClusterConfig, tyro.conf.arg(name="")] = field(default_factory=ClusterConfig)
    """Its fields have no prefix on the command line: `--workers 8`."""


RayRunConfig = RayPretrainConfig | RayFinetuneConfig
RAY_KINDS = [RayPretrainConfig, RayFinetuneConfig]


def without_cluster(config: RayRunConfig) -> RunConfig:
    """Return the configuration without `cluster`, as the ranks get it."""
    kind = FinetuneConfig if isinstance(config, FinetuneConfig) else PretrainConfig
    return kind(**{entry.name: getattr(config, entry.name) for entry in fields(kind)})
