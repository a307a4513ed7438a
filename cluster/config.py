"""Fields of a run that Ray places. Imports nothing heavy."""

from dataclasses import dataclass, field, fields
from typing import Annotated

import tyro

from cavmae.field_checks import CheckedFields, NonNegativeFloat, PositiveInt, Seconds, at_least
from cavmae.trainer.config.configs import FinetuneConfig, PretrainConfig, RunConfig


@dataclass(frozen=True)
class ClusterConfig(CheckedFields):
    """Where Ray puts the ranks, and how often it starts them again.

    Raises:
        ValueError: a number out of its range.
    """

    workers: PositiveInt = 2
    """Ranks: one Ray worker each."""
    min_workers: int = 0
    """Fewer ranks to go on with while nodes are missing: any number from here to `workers` that
    divides the lanes. Nodes that come back are used again. 0: `workers` or none."""
    resize_every_seconds: Seconds = 60.0
    """How often nodes that have come are looked for, where `min_workers` is set."""
    gpus_per_worker: int = 0
    """1: each rank has a GPU of its own; 0: train on CPUs."""
    cpus_per_worker: PositiveInt = 1
    """CPU cores reserved for each rank; also its CPU threads where `threads_per_rank` is 0."""
    address: str = ""
    """Ray cluster to use, such as `auto` (the one on this machine) or HOST:6379; empty: the one
    that RAY_ADDRESS names, else one that is started for this run and ends with it."""
    max_failures: Annotated[int, at_least(0, "never start again")] = 3
    """Times that dead or failed ranks are started again, from the run folder's newest checkpoint.
    Errors that a repetition cannot mend end the run at once."""
    collective_timeout_seconds: PositiveInt = 1800
    """A rank that waits longer than this for the others fails, and all are started again."""
    storage: str = ""
    """Folder that all nodes reach, for Ray Train's own notes; empty: `ray` in the run folder.
    Nothing is resumed from it."""

    dry_run: bool = False
    """Print what each rank would take, and start nothing; an error where that does not fit."""
    memory_gb_per_worker: NonNegativeFloat = 0.0
    """Memory of a rank's GPU (or of a rank, on CPUs) that `dry_run` compares with; 0: nothing."""

    gpus_per_node: PositiveInt = 8
    """GPUs of each node, for a `dry_run` that has no cluster to ask."""
    teraflops_per_worker: NonNegativeFloat = 0.0
    """Speed of a training step on one rank, in 1e12 operations a second as `cavmae bench step`
    prints it, for what `dry_run` expects; 0: assumed, which it says."""

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
    """On the command line its fields stand alone: `--workers 8`."""


@dataclass(frozen=True)
class RayFinetuneConfig(FinetuneConfig):
    """One fine-tuning run on a Ray cluster."""

    cluster: Annotated[ClusterConfig, tyro.conf.arg(name="")] = field(default_factory=ClusterConfig)
    """On the command line its fields stand alone: `--workers 8`."""


RayRunConfig = RayPretrainConfig | RayFinetuneConfig
RAY_KINDS: list[type[RayPretrainConfig] | type[RayFinetuneConfig]] = [
    RayPretrainConfig,
    RayFinetuneConfig,
]


def without_cluster(config: RayRunConfig) -> RunConfig:
    """The run as its ranks see it."""
    kind = FinetuneConfig if isinstance(config, FinetuneConfig) else PretrainConfig
    return kind(**{entry.name: getattr(config, entry.name) for entry in fields(kind)})
