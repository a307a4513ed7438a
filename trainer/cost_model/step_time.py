"""The time of a step on N GPUs, computed from the time of one and the speed of links.

Nothing here was measured on more than one GPU. Overlap follows from DeepSpeed's settings in
`distributed/engine.py`: `overlap_comm` is off in stages 0 to 2, and the bucket of gradients holds
the whole model, so their reduction begins after the backward pass; stages 1 and 2 gather weights
after the update. Stage 3 prefetches weights. The
logging of metrics is not counted.
"""

import math
from dataclasses import dataclass, fields

from cavmae.trainer.config.configs import PretrainConfig
from cavmae.trainer.config.resolve import step_shares
from cavmae.trainer.cost_model.comm_volume import Collective, TensorSizes, collectives, embeds_first
from cavmae.trainer.cost_model.flops import forward_flops, training_flops

CPU_CORE_FLOPS_PER_SECOND = {"fp32": 19.5e9, "bf16": 33e9}
"""The recipe `demo` on a core of an AMD EPYC, with data and communication, measured on two ranks:
`demo-2026-11-25-b10141e051.json` (no AVX512-BF16) and `demo-2026-11-23-8152ce394c.json` (with it).
The base model's layers are large enough for three times as much."""


@dataclass(frozen=True)
class Links:
    """The network between ranks.

    Attributes:
        ranks_per_node: GPUs of a node.
        within_node: bytes a second that a GPU sends to others of its node. Default: NVLink 4 of an
            H100 or H200, one direction.
        between_nodes: bytes a second of each GPU's own network card. Default: 400 Gb/s.
        share: of these speeds that large collectives are assumed to reach.
    """

    ranks_per_node: int = 8
    within_node: float = 450e9
    between_nodes: float = 50e9
    share: float = 0.8


@dataclass(frozen=True)
class Device:
    """The speed of one rank.

    Attributes:
        compute_seconds: of its passes and update in a step, without the contrastive loss.
        flops_per_second: of the products of that loss.
        clips_per_second: that its loader delivers.
    """

    compute_seconds: float
    flops_per_second: float
    clips_per_second: float = math.inf


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step's parts, on every rank; of an overlapped part, what is waited for.

    Attributes:
        compute: forward and backward passes and the update.
        contrast: similarities of a rank's clips with their groups.
        gradients, weights, embeddings, scalars: waiting for collectives.
        data: waiting for the loader, which runs beside all of these.
    """

    compute: float
    contrast: float
    gradients: float
    weights: float
    embeddings: float
    scalars: float
    data: float

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class _Algorithm:
    """One of NCCL's algorithms, with the times that its own tuning uses.

    Source: NCCL 2.19 and later, `src/graph/tuning.cc`, for Hopper GPUs.

    Attributes:
        start, within_node, between_nodes: seconds to begin, and per hop.
        share: of the links' speed.
    """

    start: float
    within_node: float
    between_nodes: float
    share: float


# Each once with large pieces ("Simple") and once with small ones that carry flags ("LL").
_RINGS = (_Algorithm(8.4e-6, 3.4e-6, 14.0e-6, 1.0), _Algorithm(6.6e-6, 0.6e-6, 2.7e-6, 0.5))
_TREES = (_Algorithm(8.4e-6, 4.0e-6, 14.0e-6, 0.92), _Algorithm(6.8e-6, 0.6e-6, 5.0e-6, 1 / 3.8))


def collective_seconds(collective: Collective, world_size: int, links: Links) -> float:
    """Return the time of all its calls, one after the other, each by the fastest algorithm.

    Rings pass every GPU of a node before they leave it, and there are as many of them as network
    cards, so a node's cards work together.

    Args:
        collective: of these ranks.
        world_size: ranks, on as few nodes as hold them.
        links: between them.
    """
    if world_size == 1:
        return 0.0
    nodes = math.ceil(world_size / links.ranks_per_node)
    cards = links.ranks_per_node * links.between_nodes
    speed = links.share * (links.within_node if nodes == 1 else min(links.within_node, cards))
    rounds = 2 if collective.kind == "all_reduce" else 1
    payload = collective.payload_bytes / collective.calls
    sent = rounds * (world_size - 1) / world_size * payload
    seconds = [
        ring.start
        + rounds * (world_size - nodes) * ring.within_node
        + rounds * (nodes - 1) * ring.between_nodes
        + sent / (speed * ring.share)
        for ring in _RINGS
    ]
    if collective.kind == "all_reduce":  # NCCL has trees for these only
        depth = math.log2(nodes)
        seconds += [
            tree.start
            + 2 * (world_size / nodes - 1) * tree.within_node
            + 2 * depth * tree.between_nodes
            + 2 * payload / (speed * tree.share)
            for tree in _TREES
        ]
    return collective.calls * min(seconds)


def step_time(
    config: PretrainConfig, tensors: TensorSizes, world_size: int, device: Device, links: Links
) -> StepTime:
    """Predict the step of `world_size` equal ranks.

    Args:
        config: see `comm_volume.collectives`.
        tensors: of its model.
        world_size: ranks.
        device: of each rank.
        links: between ranks.
    """
    rows = step_shares(config, world_size).largest
    compute = device.compute_seconds
    contrast = _contrast_flops(config, rows) / device.flops_per_second
    waits = dict.fromkeys(("gradients", "weights", "embeddings", "scalars"), 0.0)
    for one in collectives(config, tensors, world_size):
        seconds = collective_seconds(one, world_size, links)
        if one.prefetched:
            seconds = max(seconds / one.calls, seconds - compute)  # the first one is waited for
        waits[one.purpose] += seconds
    busy = compute + contrast + sum(waits.values())
    data = max(0.0, rows / device.clips_per_second - busy)
    return StepTime(compute=compute, contrast=contrast, data=data, **waits)


def sample_flops(config: PretrainConfig, world_size: int) -> int:
    """Count the operations of the passes of one sample, without the contrastive loss."""
    ratios = (config.mask.audio_ratio, config.mask.video_ratio)
    reconstruct = config.loss.reconstruction_weight > 0
    flops = training_flops(
        config.model, *ratios, reconstruct=reconstruct, modalities=config.data.modalities
    )
    if embeds_first(config, world_size):
        flops += forward_flops(config.model, *ratios, reconstruct=False).total
    return flops


def _contrast_flops(config: PretrainConfig, rows: int) -> int:
    """Count the operations of a rank's contrastive loss: similarities of each direction, then those
    of both sides again, each with a product for its gradient."""
    if config.loss.contrastive_weight == 0:
        return 0
    group = config.loss.contrastive_group or config.global_batch
    products = (2 if config.loss.bidirectional else 1) + 4
    return products * 2 * rows * group * config.model.width
