"""The collectives of a training step, to the byte, computed from the configuration.

They are those of DeepSpeed 0.19 with the settings of `distributed/engine.py`, and
`test_comm_volume.py` counts them in real runs. DeepSpeed differs from the ZeRO paper (Rajbhandari
et al., 2020, section 7) in two places: stages 1 and 2 reduce gradients with an all-reduce, whose
bytes are twice those of a reduce-scatter, and stage 3 gathers weights once for forward and backward
pass together, because it releases none that are used again within 1e9 elements.
"""

import math
from dataclasses import dataclass
from typing import Literal

from torch import nn

from cavmae.trainer.config.configs import PretrainConfig, RunConfig
from cavmae.trainer.config.resolve import step_shares
from cavmae.trainer.distributed.engine import LARGEST_BUCKET_ELEMENTS
from cavmae.trainer.losses.contrastive_groups import (
    contrastive_layout,
    group_size,
    groups_span_ranks,
)

Kind = Literal["all_reduce", "reduce_scatter", "all_gather"]
Purpose = Literal["gradients", "weights", "embeddings", "scalars"]

# DeepSpeed's defaults, in elements.
PERSISTENT_ELEMENTS = 100_000
"""Stage 3 keeps parameters of up to this size whole on every rank."""
PREFETCH_ELEMENTS = 50_000_000
"""Stage 3 gathers this many elements at once, or one parameter more."""
_ALIGNED_ELEMENTS = 2
"""A rank's partition of a flat buffer of stages 1 and 2 is a multiple of this."""

_FLAGS = 2
"""Numbers that the loop sums in every step beside the metrics: who stops, who still writes."""


@dataclass(frozen=True)
class Collective:
    """Equal calls of one step.

    Attributes:
        purpose: what they are for.
        kind: the operation.
        payload_bytes: of all calls together: what every rank has after an all-reduce or gather, or
            before a reduce-scatter.
        calls: how many there are.
        prefetched: whether they are issued before their result is needed.
    """

    purpose: Purpose
    kind: Kind
    payload_bytes: int
    calls: int
    prefetched: bool = False


@dataclass(frozen=True)
class TensorSizes:
    """Elements of each parameter of a model.

    Attributes:
        trainable: of trained parameters.
        frozen: of the others.
        together: parameters that stage 3 gathers in one call with others of their block, beyond the
            first of each block.
    """

    trainable: tuple[int, ...]
    frozen: tuple[int, ...]
    together: int = 0

    @property
    def persistent(self) -> list[int]:
        """Sizes of the parameters that stage 3 keeps whole on every rank."""
        return [one for one in self.trainable + self.frozen if one <= PERSISTENT_ELEMENTS]

    @property
    def partitioned(self) -> list[int]:
        """Sizes of the parameters that stage 3 gathers when they are needed."""
        return [one for one in self.trainable + self.frozen if one > PERSISTENT_ELEMENTS]


def tensor_sizes(model: nn.Module) -> TensorSizes:
    """Return the sizes of a model that DeepSpeed has not partitioned."""
    parameters = list(model.parameters())
    blocks = [module for module in model.modules() if getattr(module, "is_zero3_leaf", False)]
    large = [sum(p.numel() > PERSISTENT_ELEMENTS for p in block.parameters()) for block in blocks]
    return TensorSizes(
        trainable=tuple(one.numel() for one in parameters if one.requires_grad),
        frozen=tuple(one.numel() for one in parameters if not one.requires_grad),
        together=sum(count - 1 for count in large if count),
    )


def element_bytes(config: RunConfig) -> int:
    """Return the bytes of a weight; `engine.dtype` is bf16 or fp32."""
    return 2 if config.engine.dtype == "bf16" else 4


def micro_batches(config: RunConfig, world_size: int) -> int:
    """Return how many micro-batches each rank accumulates in a step."""
    return step_shares(config, world_size).accumulation


def sent_bytes(collective: Collective, world_size: int) -> int:
    """Return the bytes that each rank sends in a ring algorithm (NCCL's and gloo's way)."""
    rounds = 2 if collective.kind == "all_reduce" else 1
    return rounds * (world_size - 1) * collective.payload_bytes // world_size


def collectives(
    config: PretrainConfig, tensors: TensorSizes, world_size: int
) -> tuple[Collective, ...]:
    """Return the collectives of a logged step; none for one rank.

    The first two steps differ, in which stage 3 learns the order of modules.

    Args:
        config: resolved: `lanes` is set, `engine.dtype` is bf16 or fp32, and `micro_batch` is what
            a rank takes at once. `engine.offload_optimizer` is taken as off.
        tensors: of its model.
        world_size: ranks.
    """
    if world_size == 1:
        return ()
    contrasts = config.loss.contrastive_weight > 0
    cached = embeds_first(config, world_size)
    if config.engine.zero_stage == 3:
        sharding = _sharded(config, tensors, world_size, cached=cached)
    else:
        sharding = _replicated(config, tensors, world_size)
    return (
        *sharding,
        *(_embeddings(config, world_size, cached=cached) if contrasts else ()),
        _metrics(config, world_size),
    )


def embeds_first(config: PretrainConfig, world_size: int) -> bool:
    """Return whether a step has forward passes without gradients before those with them."""
    contrasts = config.loss.contrastive_weight > 0
    layout = contrastive_layout(step_shares(config, world_size), group_size(config))
    return contrasts and layout == "cached"


def sent_by_purpose(found: tuple[Collective, ...], world_size: int) -> dict[Purpose, int]:
    """Return the bytes that each rank sends in a step, by purpose."""
    totals: dict[Purpose, int] = {"gradients": 0, "weights": 0, "embeddings": 0, "scalars": 0}
    for one in found:
        totals[one.purpose] += sent_bytes(one, world_size)
    return totals


def _embeddings(config: PretrainConfig, world_size: int, *, cached: bool) -> tuple[Collective, ...]:
    """Return the gathers of the contrastive loss over ranks, and of its gradient."""
    shares = step_shares(config, world_size)
    if not groups_span_ranks(shares, group_size(config)):
        return ()
    times = 1 if cached else shares.accumulation
    directions = 2 if config.loss.bidirectional else 1
    # Both embeddings of each clip, and the float32 log of its sum in each direction.
    clip_bytes = 2 * config.model.width * element_bytes(config) + 4 * directions
    gathers = Collective(
        "embeddings",
        "all_gather",
        world_size * shares.largest // times * clip_bytes,
        2 + directions,
    )
    return times * (gathers,)


def _replicated(
    config: PretrainConfig, tensors: TensorSizes, world_size: int
) -> tuple[Collective, ...]:
    """Return those of stages 0 to 2, in which every rank has all weights.

    Source: `deepspeed/runtime/engine.py`, `bf16_optimizer.py` and `zero/stage_1_and_2.py`.
    """
    stage, bf16 = config.engine.zero_stage, config.engine.dtype == "bf16"
    element, elements = element_bytes(config), sum(tensors.trainable)
    padded = _rounded_up(elements, _ALIGNED_ELEMENTS * world_size)
    # Stage 1 in bf16 has its own optimizer, which reduces the flat buffer with its padding.
    reduced = padded if stage == 1 and bf16 else elements
    times = micro_batches(config, world_size) if stage == 2 else 1
    buckets = math.ceil(elements / LARGEST_BUCKET_ELEMENTS)
    gradients = Collective("gradients", "all_reduce", times * element * reduced, times * buckets)
    if stage == 0:
        return (gradients,)
    weights = Collective("weights", "all_gather", element * padded, 1)
    if stage == 1 and bf16:
        return gradients, weights  # every rank has all gradients, and their norm
    norm = Collective("scalars", "all_reduce", 4, 1)
    if not bf16:
        return gradients, weights, norm
    return gradients, weights, norm, Collective("scalars", "all_reduce", 1, 1)  # whether all finite


def _sharded(
    config: PretrainConfig, tensors: TensorSizes, world_size: int, *, cached: bool
) -> tuple[Collective, ...]:
    """Return those of stage 3 for models of fewer than 5e8 parameters: weights of larger ones would
    be released and gathered again between forward and backward pass.

    Source: `deepspeed/runtime/zero/stage3.py` and `partitioned_param_coordinator.py`.
    """
    element, times = element_bytes(config), micro_batches(config, world_size)
    partitioned, persistent = tensors.partitioned, tensors.persistent

    def padded(sizes: list[int] | tuple[int, ...]) -> int:
        """Each tensor is partitioned by itself."""
        return element * sum(_rounded_up(size, world_size) for size in sizes)

    fetches = math.ceil(sum(partitioned) / PREFETCH_ELEMENTS)
    passes = (2 if cached else 1) * times
    gathered = padded(partitioned)
    found = [
        Collective("gradients", "reduce_scatter", times * padded(tensors.trainable), times),
        Collective("weights", "all_gather", passes * gathered, passes * fetches, prefetched=True),
        Collective("weights", "all_gather", padded(persistent), len(persistent)),  # after the step
        Collective("scalars", "all_reduce", 8, 1),
    ]
    if cached:
        # After a pass without gradients DeepSpeed does not expect a backward pass: it releases the
        # weights after the forward pass, and gathers those of a block again when it is called. (Not
        # the decoder's, which that pass does not use; a large decoder is counted all the same.)
        calls = times * (len(partitioned) - tensors.together)
        found.append(Collective("weights", "all_gather", times * gathered, calls))
    return tuple(one for one in found if one.calls)


def _metrics(config: PretrainConfig, world_size: int) -> Collective:
    """Return the loop's one reduction: metrics, flags and each rank's step time, in float64."""
    metrics = 1
    metrics += 2 if config.loss.reconstruction_weight > 0 else 0
    metrics += 2 if config.loss.contrastive_weight > 0 else 0
    return Collective("scalars", "all_reduce", 8 * (metrics + _FLAGS + world_size), 1)


def _rounded_up(elements: int, multiple: int) -> int:
    return math.ceil(elements / multiple) * multiple
