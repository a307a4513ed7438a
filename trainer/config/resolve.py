"""Resolves a configuration: fields left open get their values, once per run."""

import dataclasses
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import Literal, TypeVar

from cavmae.command import UserMistake
from cavmae.dataloaders.sampling.sample_plan import default_lanes
from cavmae.dataloaders.sampling.step_shares import StepShares, check_ranks
from cavmae.dataloaders.shards.storage import real_place
from cavmae.trainer.config.configs import RunConfig

Config = TypeVar("Config", bound=RunConfig)

# The classes are compared when those of the run are read.
_MAY_CHANGE = {"classifier.labels"}
# As /proc/cpuinfo names them: bf16 multiplication of x86 (two extensions) and of ARM.
_BF16_FEATURES = {"avx512_bf16", "amx_bf16", "bf16"}


def resolve(config: Config, *, world_size: int, samples: int, threads: int) -> Config:
    """Fill in lanes, steps, micro-batch (unless it is 0) and threads.

    Args:
        config: as the user gave it.
        world_size: number of ranks.
        samples: clips of the training set.
        threads: CPU threads per rank, as set.

    Raises:
        ValueError: there are more ranks than samples in a step, or the training set is too small.
    """
    check_ranks(config.global_batch, world_size)
    lanes = config.lanes or default_lanes(config.global_batch, world_size)
    if samples < lanes:
        raise ValueError(
            f"data.train {config.data.train} has {samples} clips, fewer than the {lanes} lanes; "
            f"set lanes to {samples} or less (a divisor of global_batch {config.global_batch})"
        )
    steps = config.steps or max(1, round(config.epochs * samples / config.global_batch))
    config = dataclasses.replace(config, lanes=lanes, steps=steps, threads_per_rank=threads)
    if config.micro_batch:
        micro_batch = step_shares(config, world_size).largest_micro_batch
        config = dataclasses.replace(config, micro_batch=micro_batch)
    return config


def step_shares(config: RunConfig, world_size: int) -> StepShares:
    """Return how a run's ranks share its steps; those of a new run, where `lanes` is open."""
    lanes = config.lanes or default_lanes(config.global_batch, world_size)
    return StepShares(config.global_batch, lanes, world_size, config.micro_batch)


def with_real_places(config: Config) -> Config:
    """Make the paths of sets and of initial weights absolute and free of links, so that they mean
    the same from any folder and whatever becomes of a link."""
    data, weights = config.data, config.initial_weights
    return dataclasses.replace(
        config,
        data=dataclasses.replace(
            data,
            train=",".join(_listed(folder) for folder in data.train_folders),
            validation=data.validation and real_place(data.validation),
        ),
        # A link keeps its name: `trained_on.npz` may lie beside it or beside the file.
        initial_weights=weights and str(Path(weights).parent.resolve() / Path(weights).name),
    )


def _listed(folder: str) -> str:
    real = real_place(folder)
    return folder if "," in real else real  # a comma ends a name in `data.train`


def native_dtype(*, gpu: bool, cpuinfo: Path = Path("/proc/cpuinfo")) -> Literal["bf16", "fp32"]:
    """Choose bf16 where the hardware multiplies it, else fp32.

    A CPU that has to convert is ten times slower in bf16 than in fp32 (`dependencies.md`).

    Args:
        gpu: whether the run trains on a GPU.
        cpuinfo: file in which Linux lists the CPU's features.
    """
    if gpu:
        return "bf16"
    features = cpuinfo.read_text().split() if cpuinfo.exists() else []
    return "bf16" if _BF16_FEATURES & set(features) else "fp32"


def check_same_run(before: RunConfig, now: RunConfig) -> None:
    """Check that a run resumes with the fields that decide what it computes unchanged.

    Raises:
        UserMistake: one of them differs; the message has both values.
    """
    if type(before) is not type(now):
        raise UserMistake(
            f"the run in {now.run_dir} was started with a {type(before).__name__} and cannot "
            f"resume with a {type(now).__name__}; use another --run-dir"
        )
    for name in now.FIXED:
        values = (_leaves(name, attrgetter(name)(config)) for config in (before, now))
        for (field, was), (_, wanted) in zip(*values, strict=True):
            if was != wanted and field not in _MAY_CHANGE:
                raise UserMistake(
                    f"the run in {now.run_dir} was started with {field} {was} and cannot resume "
                    f"with {wanted}; use the former value, or start a new run with another "
                    "--run-dir"
                )


def _leaves(name: str, value: object) -> Iterator[tuple[str, object]]:
    """Yield the dotted name and the value of every field of a section, or of one field."""
    if not dataclasses.is_dataclass(value):
        yield name, value
        return
    for field in dataclasses.fields(value):
        yield from _leaves(f"{name}.{field.name}", getattr(value, field.name))
