"""What a run takes from each rank, before it starts: memory by purpose, and its peak.

Some of it is there all the time; to that comes what one part of a step needs at its worst, and the
parts follow each other: the passes, the reduction of gradients, the update. Bytes of weights,
gradients and optimizer state are how DeepSpeed 0.19 lays them out with the settings of `engine.py`;
`tests/trainer/cost_model/test_memory.py` holds them against the allocator of real ranks, and
`cavmae bench memory` all of it against processes.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch

from cavmae.trainer.config.configs import RunConfig
from cavmae.trainer.cost_model.activations import ActivationTimeline, count_passes, passes_at_most
from cavmae.trainer.cost_model.comm_volume import TensorSizes, tensor_sizes
from cavmae.trainer.cost_model.gradient_memory import (
    Gradients,
    element_bytes,
    gradients_of,
    share_of,
    small,
)
from cavmae.trainer.distributed.engine import LARGEST_BUCKET_ELEMENTS
from cavmae.trainer.tasks.build_model import build_model

GPU_ALLOWANCE_BYTES = 3 << 30
"""CUDA, NCCL, DALI, and what an allocator cannot use."""
CPU_ALLOWANCE_BYTES = 1 << 30
"""torch, DeepSpeed and DALI with their threads, and the reader processes of a rank."""
HEAP_BLOCK_BYTES = 32 << 20
"""glibc keeps freed blocks that are smaller (the limit that its `mmap` threshold grows to)."""
HEAP_HOLES = 1 / 8
"""Holes between those blocks, as a share of what they are at their most: `cavmae bench memory`."""

Part = Literal["passes", "reduction", "update"]


@dataclass(frozen=True)
class State:
    """Bytes of one rank that stay from step to step.

    Attributes:
        weights: in the dtype of the run; in stage 3 what every rank keeps of them.
        optimizer: fp32 masters and two moments.
        buckets: buffers of collectives, and gradients that have a place of their own.
    """

    weights: int
    optimizer: int
    buckets: int


@dataclass(frozen=True)
class Footprint:
    """Bytes of one rank.

    Attributes:
        weights, optimizer, buckets: see `State`.
        clips: of the micro-batches of a step, and those decoded ahead.
        passes: activations and gradients when a forward and backward pass need most.
        reduction: gradients and their copies, when the ranks have summed them.
        update: gradients, in fp32; the fused Adam makes nothing on its way.
        kept: on a CPU, freed memory of other parts that the C library does not hand back, and holes
            in what it has.
        allowance: for what is no tensor of ours.
    """

    weights: int
    optimizer: int
    buckets: int
    clips: int
    passes: int
    reduction: int
    update: int
    kept: int
    allowance: int

    @property
    def peak_part(self) -> Part:
        """The part of a step that needs most."""
        parts: tuple[Part, ...] = ("passes", "reduction", "update")
        return max(parts, key=lambda part: getattr(self, part))

    @property
    def tensors(self) -> int:
        """All tensors at the peak of a step."""
        stays = self.weights + self.optimizer + self.buckets + self.clips
        return stays + getattr(self, self.peak_part)

    @property
    def total(self) -> int:
        """The peak, with what is kept and an allowance for what is no tensor of ours."""
        return self.tensors + self.kept + self.allowance


@dataclass(frozen=True)
class Sizes:
    """Of a model: its parameters, and what its passes keep."""

    tensors: TensorSizes
    passes: ActivationTimeline

    @property
    def trainable(self) -> int:
        """Elements of all trainable parameters."""
        return sum(self.tensors.trainable)


def model_sizes(config: RunConfig) -> Sizes:
    """Of the run's model, which is not built; takes seconds.

    Args:
        config: `engine.dtype` is bf16 or fp32.
    """
    return Sizes(_tensors(config), count_passes(config))


def sizes_at_most(config: RunConfig) -> Sizes:
    """The same at once, with passes that keep more than those of `model_sizes`."""
    tensors = _tensors(config)
    return Sizes(tensors, passes_at_most(config, element_bytes(config) * sum(tensors.trainable)))


def _tensors(config: RunConfig) -> TensorSizes:
    with torch.device("meta"):
        return tensor_sizes(build_model(config))


def state_bytes(config: RunConfig, tensors: TensorSizes, world_size: int, *, gpu: bool) -> State:
    """Of each of `world_size` ranks.

    Args:
        config: `engine.dtype` is bf16 or fp32.
        tensors: of its model.
        world_size: ranks.
        gpu: whether host memory, where an offloaded optimizer is, is not the ranks' own.
    """
    engine, weights = config.engine, sum(tensors.trainable)
    element, stage = element_bytes(config), engine.zero_stage
    share = share_of(config, world_size)
    masters = 4 if stage or engine.dtype == "bf16" else 0
    buckets = 0.0
    if stage == 1 and engine.dtype == "bf16":
        buckets = 4 * weights  # summed in fp32 beside those of the micro-batch
    elif stage:
        buckets = element * min(weights, LARGEST_BUCKET_ELEMENTS)
    if stage == 3:
        buckets += 4 * weights * share
    kept = sum(tensors.trainable) + sum(tensors.frozen)
    if stage == 3:
        kept = kept * share
        if world_size > 1:
            kept += sum(small(tensors))
    return State(
        weights=int(element * kept),
        optimizer=0 if gpu and engine.offload_optimizer else int((8 + masters) * weights * share),
        buckets=int(buckets),
    )


def footprint(config: RunConfig, sizes: Sizes, world_size: int, *, gpu: bool) -> Footprint:
    """Of each of `world_size` ranks.

    Args:
        config: `engine.dtype` is bf16 or fp32, `micro_batch` what a rank takes at once.
        sizes: of its model.
        world_size: ranks.
        gpu: whether the ranks have GPUs.
    """
    state = state_bytes(config, sizes.tensors, world_size, gpu=gpu)
    times = config.global_batch // world_size // config.micro_batch
    gradients = gradients_of(config, sizes.tensors, world_size, accumulated=times > 1)
    passes = gradients.before + sizes.passes.peak(
        config.micro_batch, gradients_stay=gradients.stay_where_made
    )
    peak = max(passes, gradients.reduction, gradients.update)
    shape = config.model
    clip = 4 * (shape.audio_frames * shape.mel_bins + 3 * shape.image_size**2)
    return Footprint(
        **dataclasses.asdict(state),
        clips=clip * config.micro_batch * (times + config.data.prefetch_batches),
        passes=passes,
        reduction=gradients.reduction,
        update=gradients.update,
        kept=0 if gpu else _kept(config, sizes.passes, gradients, peak, samples=config.micro_batch),
        allowance=GPU_ALLOWANCE_BYTES if gpu else CPU_ALLOWANCE_BYTES,
    )


def _kept(
    config: RunConfig, passes: ActivationTimeline, gradients: Gradients, peak: int, *, samples: int
) -> int:
    """What a CPU rank has beyond the largest part: glibc hands large blocks back when they are
    freed, and small ones hardly ever, so those of the passes stay while gradients are reduced.

    Args:
        config: of the run.
        passes: of its model.
        gradients: in its parts.
        peak: of the largest part.
        samples: of a micro-batch.
    """
    stay = gradients.stay_where_made
    heap = passes.peak(samples, gradients_stay=stay, below_bytes=HEAP_BLOCK_BYTES)
    large = passes.peak(samples, gradients_stay=stay, from_bytes=HEAP_BLOCK_BYTES)
    update = gradients.update
    if gradients.single or config.engine.zero_stage == 3:  # which gathers weight by weight
        heap += gradients.before
    else:
        large += gradients.before
    if gradients.single:
        heap, update = max(heap, update), 0
    large = max(large, gradients.reduction - gradients.single, update)
    return max(0, int((1 + HEAP_HOLES) * heap) + large - peak)
