"""Gradients in the parts of a step: how many bytes of them DeepSpeed 0.19 holds with the settings
of `engine.py`, as the allocator of real ranks counts them (`test_memory.py`)."""

from dataclasses import dataclass

from cavmae.trainer.config.configs import RunConfig
from cavmae.trainer.cost_model.comm_volume import (
    PERSISTENT_ELEMENTS,
    PREFETCH_ELEMENTS,
    TensorSizes,
)
from cavmae.trainer.distributed.engine import LARGEST_BUCKET_ELEMENTS

LIVE_ELEMENTS = 1_000_000_000
"""Stage 3 lets go of gathered weights where they would be more: DeepSpeed's default."""


@dataclass(frozen=True)
class Gradients:
    """Bytes of gradients in the parts of a step, beyond the state.

    Attributes:
        before: when the last micro-batch's passes begin; in stage 3 also the gathered weights.
        stay_where_made: whether those of its backward pass come to that one by one.
        reduction, update: most bytes in these parts.
        single: of those of the reduction, what is a tensor for each parameter; the others are
            blocks of many gradients. Where it is not 0, `before` and `update` are such tensors too.
    """

    before: int
    stay_where_made: bool
    reduction: int
    update: int
    single: int = 0


def gradients_of(
    config: RunConfig, tensors: TensorSizes, world_size: int, *, accumulated: bool
) -> Gradients:
    """Of each of `world_size` ranks.

    Args:
        config: `engine.dtype` is bf16 or fp32.
        tensors: of its model.
        world_size: ranks.
        accumulated: whether a step has several micro-batches.
    """
    engine, weights = config.engine, sum(tensors.trainable)
    element, stage, share = element_bytes(config), engine.zero_stage, share_of(config, world_size)
    largest = max(tensors.trainable)
    whole, own = element * weights, int(4 * weights * share)
    flat = element * min(weights, LARGEST_BUCKET_ELEMENTS)
    if stage == 0:
        masters = 4 * weights if engine.dtype == "bf16" else 0
        return Gradients(
            before=whole if accumulated else 0,
            stay_where_made=not accumulated,
            reduction=whole + flat,
            update=whole + masters,
            single=whole,
        )
    if stage == 1 and engine.dtype == "bf16":
        return Gradients(
            before=whole if accumulated else 0,
            stay_where_made=not accumulated,
            reduction=whole + flat,
            update=whole,
            single=whole,
        )
    in_flight = element * largest
    # A model larger than the bucket is reduced while the backward pass still runs.
    early = weights > LARGEST_BUCKET_ELEMENTS
    if stage == 3:
        live = 0 if world_size == 1 else min(sum(shared(tensors)), LIVE_ELEMENTS)
        fetched = min(live, PREFETCH_ELEMENTS + largest)
        reduction = flat + max(element * live, own) + in_flight
        return Gradients(
            before=element * (live + fetched) + (flat if early else 0),
            stay_where_made=False,
            reduction=reduction,
            update=own,
        )
    kept = own if accumulated or early else 0
    if stage == 1:
        before = 2 * whole if accumulated else 0  # as autograd left them, and their sum
        copies = 2 * flat
        reduction = max(before, copies) + in_flight
    else:
        before = kept
        copies = 4 * min(weights, LARGEST_BUCKET_ELEMENTS) if engine.dtype == "bf16" else 2 * flat
        reduction = kept + copies + in_flight
        if engine.dtype == "bf16":  # reduced in fp32
            reduction = own + copies + 4 * largest
    return Gradients(
        before=before + in_flight + (copies if early else 0),
        stay_where_made=False,
        reduction=reduction,
        update=own,
    )


def small(tensors: TensorSizes) -> list[int]:
    """Sizes of what stage 3 keeps whole."""
    return [one for one in tensors.trainable + tensors.frozen if one <= PERSISTENT_ELEMENTS]


def shared(tensors: TensorSizes) -> list[int]:
    """Sizes of what stage 3 gathers when it is needed."""
    return [one for one in tensors.trainable + tensors.frozen if one > PERSISTENT_ELEMENTS]


def element_bytes(config: RunConfig) -> int:
    """Of a weight."""
    return 2 if config.engine.dtype == "bf16" else 4


def share_of(config: RunConfig, world_size: int) -> float:
    """Of the optimizer's state that a rank has."""
    return 1 / world_size if config.engine.zero_stage else 1.0
