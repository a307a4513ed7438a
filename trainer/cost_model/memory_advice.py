"""Advice for a run that does not fit in memory: fields that leave its result unchanged."""

import dataclasses
import functools
import math
from typing import Any

from cavmae.trainer.config.configs import RunConfig
from cavmae.trainer.cost_model.activations import ActivationTimeline, trace_activations
from cavmae.trainer.cost_model.memory import Sizes, footprint
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

    The rungs of the ladder are ordered by the speed they cost. They are climbed until the run fits;
    then each is taken back as far as the others allow.

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

    def needed(rungs: list[Changes]) -> float:
        """Bytes of a rank with these changes; inf where the config refuses them together."""
        try:
            changed = _changed(config, _together(rungs))
        except ValueError:
            return math.inf
        traced = Sizes(sizes.tensors, activations(changed.engine.activation_checkpointing))
        return footprint(changed, traced, world_size, gpu=gpu).total

    ladder = _ladder(config, world_size, gpu=gpu, begun=begun)
    taken: list[Changes] = [{} for _ in ladder]
    for number, rungs in enumerate(ladder):
        options = [[*taken[:number], rung, *taken[number + 1 :]] for rung in rungs]
        fitting = next((one for one in options if needed(one) <= limit_bytes), None)
        taken = fitting or min([taken, *options], key=needed)
        if fitting:
            break
    else:
        return "no change of its batches or engine fits: use more ranks, or a smaller model"
    for number, rungs in enumerate(ladder):
        options = [[*taken[:number], rung, *taken[number + 1 :]] for rung in ({}, *rungs)]
        taken = next(one for one in options if needed(one) <= limit_bytes)
    return f"what fits: {_flags(_together(taken))}"


def _ladder(config: RunConfig, world_size: int, *, gpu: bool, begun: bool) -> list[list[Changes]]:
    """Return the changes of each field, the cheapest first."""
    per_rank, engine = config.global_batch // world_size, config.engine
    micro_batches = [n for n in range(config.micro_batch - 1, 0, -1) if per_rank % n == 0]
    stages = [] if begun else range(engine.zero_stage + 1, 4)
    # Stage 3 runs uncompiled.
    no_compile: Changes = {"compile": False} if engine.compile else {}
    further = _RECOMPUTE[_RECOMPUTE.index(engine.activation_checkpointing) + 1 :]
    offload = gpu and not engine.offload_optimizer
    return [
        [{"micro_batch": samples} for samples in micro_batches],
        [{"zero_stage": stage} | (no_compile if stage == 3 else {}) for stage in stages],
        [{"activation_checkpointing": recompute} for recompute in further],
        [{"offload_optimizer": True}] if offload else [],
    ]


def _together(rungs: list[Changes]) -> Changes:
    return {name: value for rung in rungs for name, value in rung.items()}


def _changed(config: RunConfig, changes: Changes) -> RunConfig:
    engine = dict(changes)
    micro_batch = engine.pop("micro_batch", config.micro_batch)
    return dataclasses.replace(
        config, micro_batch=micro_batch, engine=dataclasses.replace(config.engine, **engine)
    )


def _flags(changes: Changes) -> str:
    """Spell changes as on a command line."""
    flags = []
    for name, value in changes.items():
        option = name.replace("_", "-")
        if name == "micro_batch":
            flags.append(f"--{option} {value}")
        elif isinstance(value, bool):
            flags.append(f"--engine.{option}" if value else f"--engine.no-{option}")
        else:
            flags.append(f"--engine.{option} {value}")
    return " ".join(flags)
