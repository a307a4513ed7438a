"""From what the user asked for to what this run does: every open field filled in, once."""

import dataclasses
from pathlib import Path
from typing import Literal, TypeVar

from cavmae.dataloaders.sampling.sample_plan import check_ranks, default_lanes
from cavmae.trainer.config.configs import RunConfig
from cavmae.trainer.config.finetune_config import FinetuneConfig

Config = TypeVar("Config", bound=RunConfig)

# Fields of the data that decide what a run computes, as `RunConfig.FIXED` does.
_FIXED_DATA = (
    "frame_choice",
    "log_mel_mean",
    "log_mel_std",
    "shuffle_window",
    "mixture",
    "sampling",
    "window_seconds",
    "augmentation",
)
# As Linux names them: x86's two ways of multiplying bf16, and ARM's.
_BF16_FEATURES = {"avx512_bf16", "amx_bf16", "bf16"}


def resolve(config: Config, *, world_size: int, samples: int, threads: int) -> Config:
    """Fill in lanes, steps, micro-batch and threads, and where `initial_weights` lie.

    Args:
        config: what the user asked for.
        world_size: ranks of this start.
        samples: clips of the training set.
        threads: CPU threads per rank, as set.

    Raises:
        ValueError: the rank count does not divide the lanes, or the set is too small.
    """
    lanes = config.lanes or default_lanes(config.global_batch)
    check_ranks(lanes, world_size)
    if samples < lanes:
        raise ValueError(
            f"data.train {config.data.train} has {samples} clips, fewer than the {lanes} lanes; "
            f"set lanes to {samples} or less (a divisor of global_batch {config.global_batch})"
        )
    per_rank = config.global_batch // world_size
    steps = config.steps or max(1, round(config.epochs * samples / config.global_batch))
    return dataclasses.replace(
        config,
        lanes=lanes,
        steps=steps,
        micro_batch=_largest_divisor(per_rank, config.micro_batch),
        threads_per_rank=threads,
        initial_weights=config.initial_weights and str(Path(config.initial_weights).absolute()),
    )


def native_dtype(*, gpu: bool, cpuinfo: Path = Path("/proc/cpuinfo")) -> Literal["bf16", "fp32"]:
    """bf16 where the hardware multiplies it, else fp32.

    A CPU that has to convert takes ten times as long in bf16 as in fp32 (`dependencies.md`).

    Args:
        gpu: whether the run trains on one.
        cpuinfo: what the kernel says of the processor.
    """
    if gpu:
        return "bf16"
    features = cpuinfo.read_text().split() if cpuinfo.exists() else []
    return "bf16" if _BF16_FEATURES & set(features) else "fp32"


def check_same_run(before: RunConfig, now: RunConfig) -> None:
    """A run that goes on must compute what it began.

    Raises:
        ValueError: a field that decides what is computed differs; names it with both values.
    """
    if type(before) is not type(now):
        raise ValueError(
            f"the run in {now.run_dir} was started with a {type(before).__name__} and this start "
            f"has a {type(now).__name__}; give another --run-dir"
        )
    if isinstance(before, FinetuneConfig) and isinstance(now, FinetuneConfig):
        # The classes themselves are compared where the run's are opened.
        classifier = dataclasses.replace(now.classifier, labels=before.classifier.labels)
        now = dataclasses.replace(now, classifier=classifier)
    differing = [
        (name, getattr(before, name), getattr(now, name))
        for name in now.FIXED
        if getattr(before, name) != getattr(now, name)
    ] + [
        (f"data.{name}", getattr(before.data, name), getattr(now.data, name))
        for name in _FIXED_DATA
        if getattr(before.data, name) != getattr(now.data, name)
    ]
    if differing:
        name, was, is_now = differing[0]
        if dataclasses.is_dataclass(was):
            for field in dataclasses.fields(was):
                old, new = getattr(was, field.name), getattr(is_now, field.name)
                if old != new:
                    name, was, is_now = f"{name}.{field.name}", old, new
                    break
        raise ValueError(
            f"the run in {now.run_dir} was started with {name} {was} and this start has {is_now}; "
            "give the former, or another --run-dir to start anew"
        )


def _largest_divisor(number: int, limit: int) -> int:
    return next(divisor for divisor in range(min(number, limit), 0, -1) if number % divisor == 0)
