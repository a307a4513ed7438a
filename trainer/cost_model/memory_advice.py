"""Batches and engine fields that fit in memory, and leave a run's result unchanged."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

from cavmae.trainer.config.configs import RunConfig
from cavmae.trainer.cost_model.activations import ActivationTimeline, trace_activations
from cavmae.trainer.cost_model.memory import Sizes, footprint, model_sizes
from cavmae.trainer.model.blocks import Recompute

_RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")
Changes = dict[str, Any]
"""New values of `micro_batch` and of fields of `engine`."""


def advice(
    config: RunConfig,
    sizes: Sizes,
    world_size: int,
    limit_bytes: int,
    *,
    gpu: bool,
    begun: bool = False,
) -> str:
    """Return the end of an error message, with the flags that make a run fit.

    The fields of the ladder are ordered by the speed they cost. They are changed one after the
    other until the run fits; then each is taken back as far as the others allow.

    Args:
        config: `engine.dtype` is bf16 or fp32, `micro_batch` what a rank takes at once.
        sizes: of its model.
        world_size: ranks.
        limit_bytes: of a rank.
        gpu: whether the ranks have GPUs.
        begun: whether the run has checkpoints, which fix its ZeRO stage.
    """

    @functools.cache
    def activations(recompute: Recompute) -> ActivationTimeline:
        if recompute == config.engine.activation_checkpointing:
            return sizes.activations
        return trace_activations(_changed(config, {"activation_checkpointing": recompute}))

    def needed(changes: Changes) -> float:
        """Predict a rank's bytes with these changes; inf where the config refuses them together."""
        try:
            changed = _changed(config, changes)
        except ValueError:
            return math.inf
        traced = Sizes(sizes.tensors, activations(changed.engine.activation_checkpointing))
        return footprint(changed, traced, world_size, gpu=gpu).total

    ladder = _ladder(config, world_size, gpu=gpu, begun=begun)
    taken: Changes = {}
    for field, values in ladder.items():
        options = [taken | {field: value} for value in values]
        fitting = next((one for one in options if needed(one) <= limit_bytes), None)
        taken = fitting or min([taken, *options], key=needed)
        if fitting:
            break
    else:
        return "no change of its batches or engine fits: use more ranks, or a smaller model"
    for field, values in ladder.items():
        others = {name: value for name, value in taken.items() if name != field}
        options = [others, *(others | {field: value} for value in values)]
        taken = next(one for one in options if needed(one) <= limit_bytes)
    words = [_flag(field, taken[field]) for field in ladder if field in taken]
    if taken.get("zero_stage") == 3 and config.engine.compile:
        words.append("--engine.no-compile")
    return f"what fits: {' '.join(words)}"


def largest_micro_batch(config: RunConfig, world_size: int, limit_bytes: int, *, gpu: bool) -> int:
    """Return the most samples that a rank can take at once: the largest part of its share of the
    global batch, cut evenly, that is predicted to fit, or 1.

    Args:
        config: `engine.dtype` is bf16 or fp32; its micro-batch is not looked at.
        world_size: ranks.
        limit_bytes: of a rank.
        gpu: whether the ranks have GPUs.
    """
    sizes = model_sizes(config)
    for count in _micro_batches(config, world_size):
        tried = dataclasses.replace(config, micro_batch=count)
        if footprint(tried, sizes, world_size, gpu=gpu).total <= limit_bytes:
            return count
    return 1


def _micro_batches(config: RunConfig, world_size: int) -> list[int]:
    """Return the sizes of a rank's largest micro-batch, cut into ever more of them."""
    largest, smallest = -(-config.global_batch // world_size), config.global_batch // world_size
    return sorted({-(-largest // times) for times in range(1, smallest + 1)}, reverse=True)


def _ladder(
    config: RunConfig, world_size: int, *, gpu: bool, begun: bool
) -> dict[str, Sequence[Any]]:
    """Return the values that each field may take, the cheapest first."""
    engine = config.engine
    further = _RECOMPUTE[_RECOMPUTE.index(engine.activation_checkpointing) + 1 :]
    return {
        "micro_batch": [
            count for count in _micro_batches(config, world_size) if count < config.micro_batch
        ],
        "zero_stage": () if begun else range(engine.zero_stage + 1, 4),
        "activation_checkpointing": further,
        "offload_optimizer": (True,) if gpu and not engine.offload_optimizer else (),
    }


def _changed(config: RunConfig, changes: Changes) -> RunConfig:
    engine = dict(changes)
    micro_batch = engine.pop("micro_batch", config.micro_batch)
    if engine.get("zero_stage") == 3:
        engine["compile"] = False  # stage 3 runs uncompiled
    return dataclasses.replace(
        config, micro_batch=micro_batch, engine=dataclasses.replace(config.engine, **engine)
    )


def _flag(field: str, value: Any) -> str:
    """Spell a change as on the command line."""
    name = ("" if field == "micro_batch" else "engine.") + field.replace("_", "-")
    return f"--{name}" if value is True else f"--{name} {value}"
