"""What the ranks send each other in a step: every collective of it, to the byte.

This is what DeepSpeed 0.19 does with the settings of `engine.py`, counted in real runs by
`test_comm_volume.py`. In two places it is not what the ZeRO paper (Rajbhandari et al., 2020,
section 7) says: stages 1 and 2 reduce gradients with an all-reduce, whose bytes are twice those of
a reduce-scatter, and stage 3 gathers weights once for forward and backward pass together, because
it lets go of none that are used again within 1e9 elements.
"""

import math
from dataclasses import dataclass
from typing import Literal

from torch import nn

from cavmae.trainer.config.configs import PretrainConfig
from cavmae.trainer.distributed.engine import LARGEST_BUCKET_ELEMENTS
from cavmae.trainer.losses.contrastive_groups import contrastive_layout, groups_span_ranks

Kind = Literal["all_reduce", "reduce_scatter", "all_gather"]
Purpose = Literal["gradients", "weights", "embeddings", "scalars"]

# DeepSpeed's defaults, in elements.
PERSISTENT_ELEMENTS = 100_000
"""Stage 3 keeps parameters of so many elements or fewer whole on every rank."""
PREFETCH_ELEMENTS = 50_000_000
"""Stage 3 gathers so many elements at once, or a parameter more."""
_ALIGNED_ELEMENTS = 2
"""A rank's part of a flat buffer of stages 1 and 2 is a multiple of this."""

_FLAGS = 2
"""Numbers that the loop sums in every step beside the metrics: who leaves, who still writes."""


@dataclass(frozen=True)
class Collective:
    """Equal calls of one step.

    Attributes:
        purpose: what they are for.
        kind: what they do.
        payload_bytes: of all calls: what every rank has at the end of an all-reduce or gather, or
            at the beginning of a reduce-scatter.
        calls: how many there are.
        ahead: whether they are begun before what they bring is needed.
    """

    purpose: Purpose
    kind: Kind
    payload_bytes: int
    calls: int
    ahead: bool = False


@dataclass(frozen=True)
class TensorSizes:
    """Elements of each parameter of a model.

    Attributes:
        trainable: of those that are trained.
        frozen: of those that are not.
    """

    trainable: tuple[int, ...]
    frozen: tuple[int, ...]


def tensor_sizes(model: nn.Module) -> TensorSizes:
    """Of a model that DeepSpeed has not taken apart."""
    parameters = list(model.parameters())
    return TensorSizes(
        trainable=tuple(one.numel() for one in parameters if one.requires_grad),
        frozen=tuple(one.numel() for one in parameters if not one.requires_grad),
    )


def sent_bytes(collective: Collective, world_size: int) -> int:
    """Bytes that each rank sends where collectives go around a ring (NCCL's and gloo's way).

    Args:
        collective: of these ranks.
        world_size: ranks.
    """
    rounds = 2 if collective.kind == "all_reduce" else 1
    return rounds * (world_size - 1) * collective.payload_bytes // world_size


def collectives(
    config: PretrainConfig, tensors: TensorSizes, world_size: int
) -> tuple[Collective, ...]:
    """Of a step that is reported, once the first two steps are over (in which stage 3 learns the
    order of modules); none for one rank.

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
    """Whether a step has forward passes without gradients before those with them."""
    return (
        config.loss.contrastive_weight > 0
        and contrastive_layout(
            group_size=config.loss.contrastive_group or config.global_batch,
            global_batch=config.global_batch,
            micro_batch=config.micro_batch,
            lanes=config.lanes,
            world_size=world_size,
        )
        == "cached"
    )


def sent_by_purpose(found: tuple[Collective, ...], world_size: int) -> dict[Purpose, int]:
    """Bytes that each rank sends in a step, for each purpose."""
    totals: dict[Purpose, int] = {"gradients": 0, "weights": 0, "embeddings": 0, "scalars": 0}
    for one in found:
        totals[one.purpose] += sent_bytes(one, world_size)
    return totals


def embedding_gathers(
    *,
    world_size: int,
    rows: int,
    width: int,
    value_bytes: int,
    bidirectional: bool,
    log_sum_bytes: int = 4,
) -> Collective:
    """Return the collectives of one contrastive loss over ranks and its gradient.

    Args:
        world_size: ranks.
        rows: clips of each rank.
        width: of an embedding.
        value_bytes: of one value of an embedding.
        bidirectional: whether both directions are in the loss.
        log_sum_bytes: of one statistic: 4, or 8 for float64 embeddings.
    """
    directions = 2 if bidirectional else 1
    own = 2 * rows * width * value_bytes + directions * rows * log_sum_bytes
    return Collective("embeddings", "all_gather", world_size * own, 2 + directions)


def _embeddings(config: PretrainConfig, world_size: int, *, cached: bool) -> tuple[Collective, ...]:
    group_size = config.loss.contrastive_group or config.global_batch
    if not groups_span_ranks(
        group_size=group_size,
        global_batch=config.global_batch,
        lanes=config.lanes,
        world_size=world_size,
    ):
        return ()
    times = 1 if cached else _micro_batches(config, world_size)
    gathers = embedding_gathers(
        world_size=world_size,
        rows=config.global_batch // world_size // times,
        width=config.model.width,
        value_bytes=_element_bytes(config),
        bidirectional=config.loss.bidirectional,
    )
    return times * (gathers,)


def _replicated(
    config: PretrainConfig, tensors: TensorSizes, world_size: int
) -> tuple[Collective, ...]:
    """Stages 0 to 2, in which every rank has all weights.

    Source: `deepspeed/runtime/engine.py`, `bf16_optimizer.py` and `zero/stage_1_and_2.py`.
    """
    stage, bf16 = config.engine.zero_stage, config.engine.dtype == "bf16"
    element, elements = _element_bytes(config), sum(tensors.trainable)
    padded = _rounded_up(elements, _ALIGNED_ELEMENTS * world_size)
    # Stage 1 in bf16 is an optimizer of its own, which reduces the flat buffer with its padding.
    reduced = padded if stage == 1 and bf16 else elements
    times = _micro_batches(config, world_size) if stage == 2 else 1
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
    """Stage 3, of models of fewer than 5e8 parameters: larger ones would be let go and gathered
    again between forward and backward pass.

    Source: `deepspeed/runtime/zero/stage3.py` and `partitioned_param_coordinator.py`.
    """
    element, times = _element_bytes(config), _micro_batches(config, world_size)
    everything = tensors.trainable + tensors.frozen
    shared = [size for size in everything if size > PERSISTENT_ELEMENTS]
    small = [size for size in everything if size <= PERSISTENT_ELEMENTS]

    def padded(sizes: list[int] | tuple[int, ...]) -> int:
        """Each tensor is shared out by itself."""
        return element * sum(_rounded_up(size, world_size) for size in sizes)

    fetches = math.ceil(sum(shared) / PREFETCH_ELEMENTS)
    passes = 2 if cached else 1
    gathered = padded(shared)
    found = [
        Collective("gradients", "reduce_scatter", times * padded(tensors.trainable), times),
        Collective(
            "weights", "all_gather", passes * times * gathered, passes * times * fetches, ahead=True
        ),
        Collective("weights", "all_gather", padded(small), len(small)),  # after the update
        Collective("scalars", "all_reduce", 8, 1),
    ]
    if cached:
        # A pass without gradients makes DeepSpeed forget that a backward pass comes: it lets go of
        # the weights after the forward pass, and gathers them again when each is needed. (Not the
        # decoder's, which that pass does not use; a large decoder is counted here all the same.)
        found.append(Collective("weights", "all_gather", times * gathered, times * len(shared)))
    return tuple(one for one in found if one.calls)


def _metrics(config: PretrainConfig, world_size: int) -> Collective:
    """The loop's one reduction: metrics, flags and each rank's own time, in float64."""
    metrics = 1
    metrics += 2 if config.loss.reconstruction_weight > 0 else 0
    metrics += 2 if config.loss.contrastive_weight > 0 else 0
    return Collective("scalars", "all_reduce", 8 * (metrics + _FLAGS + world_size), 1)


def _micro_batches(config: PretrainConfig, world_size: int) -> int:
    return config.global_batch // world_size // config.micro_batch


def _element_bytes(config: PretrainConfig) -> int:
    return 2 if config.engine.dtype == "bf16" else 4


def _rounded_up(elements: int, multiple: int) -> int:
    return math.ceil(elements / multiple) * multiple
