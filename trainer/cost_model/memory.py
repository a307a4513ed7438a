"""Memory that a run takes on each rank, predicted before it starts: by purpose, and its peak.

The state of a run stays allocated; the parts of a step (forward and backward passes, reduction of
gradients, update) follow each other, so the largest of them adds to it. Weights, gradients and
optimizer state are laid out as DeepSpeed 0.19 does with the settings of `distributed/engine.py`.
`tests/trainer/cost_model/test_memory.py` compares them with the allocator of real ranks, and
`cavmae bench memory` all of it with the resident memory of processes.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch

from cavmae.trainer.config.configs import RunConfig
from cavmae.trainer.cost_model.activations import (
    ActivationTimeline,
    activation_bound,
    trace_activations,
)
from cavmae.trainer.cost_model.comm_volume import (
    PREFETCH_ELEMENTS,
    TensorSizes,
    element_bytes,
    micro_batches,
    tensor_sizes,
)
from cavmae.trainer.distributed.engine import LARGEST_BUCKET_ELEMENTS
from cavmae.trainer.tasks.build_model import build_model

GPU_ALLOWANCE_BYTES = 3 << 30
"""CUDA, NCCL, DALI with its decoders, and fragmentation of the caching allocator."""
CPU_ALLOWANCE_BYTES = 1 << 30
"""torch, DeepSpeed and DALI with their threads, and the reader processes of a rank."""
HEAP_BLOCK_BYTES = 32 << 20
"""glibc keeps freed blocks that are smaller (the upper limit of its dynamic `mmap` threshold)."""
HEAP_FRAGMENTATION = 1 / 8
"""Holes between those blocks, as a share of their peak, measured by `cavmae bench memory`."""
DECODED_BYTES = 3 * 448 * 256
"""A decoded frame: RGB of 16:9 at the short side that packing keeps."""
DECODED_COPIES = 9
"""On a GPU DALI's video decoder allocates 8 of them for each frame of a batch, beside its output
(`frame_buffer_` in its `frames_decoder_gpu.h`); for JPEGs this is an upper bound."""
LIVE_ELEMENTS = 1_000_000_000
"""Stage 3 releases gathered weights beyond this many: DeepSpeed's default."""

Part = Literal["passes", "reduction", "update"]


@dataclass(frozen=True)
class State:
    """Bytes of one rank that stay allocated from step to step.

    Attributes:
        weights: in the dtype of the run; in stage 3 this rank's partition and the small ones.
        optimizer: fp32 master weights and two moments.
        buckets: buffers of collectives, and persistent gradient buffers.
    """

    weights: int
    optimizer: int
    buckets: int


@dataclass(frozen=True)
class Gradients:
    """Bytes of gradients in the parts of a step, beyond the state.

    Attributes:
        before: when the last micro-batch's passes begin; in stage 3 also the gathered weights.
        stay_where_made: whether the gradients of its backward pass add to `before` one by one.
        reduction, update: most bytes in these parts.
    """

    before: int
    stay_where_made: bool
    reduction: int
    update: int


@dataclass(frozen=True)
class Footprint(State):
    """Bytes of one rank: its state, and what a step adds.

    Attributes:
        clips: of the micro-batches of a step, and those prefetched.
        decoding: on a GPU, the batches that are being decoded; on a CPU the allowance has them.
        passes: peak of activations and gradients in forward and backward passes.
        reduction: gradients and their copies while they are reduced over ranks.
        update: gradients in fp32; the fused Adam needs no temporaries.
        heap_slack: on a CPU, freed memory of other parts that glibc keeps, and its fragmentation.
        allowance: for everything but our tensors.
    """

    clips: int
    decoding: int
    passes: int
    reduction: int
    update: int
    heap_slack: int
    allowance: int

    @property
    def peak_part(self) -> Part:
        """The part of a step that needs most."""
        parts: tuple[Part, ...] = ("passes", "reduction", "update")
        return max(parts, key=lambda part: getattr(self, part))

    @property
    def tensors(self) -> int:
        """All tensors at the peak of a step."""
        stays = self.weights + self.optimizer + self.buckets + self.clips + self.decoding
        return stays + getattr(self, self.peak_part)

    @property
    def total(self) -> int:
        """The peak with heap slack and allowance."""
        return self.tensors + self.heap_slack + self.allowance


@dataclass(frozen=True)
class Sizes:
    """A model's parameters and activations."""

    tensors: TensorSizes
    activations: ActivationTimeline

    @property
    def trainable(self) -> int:
        """Elements of all trainable parameters."""
        return sum(self.tensors.trainable)


def model_sizes(config: RunConfig) -> Sizes:
    """Trace the run's model, which is not built; takes seconds.

    Args:
        config: `engine.dtype` is bf16 or fp32.
    """
    return Sizes(_tensors(config), trace_activations(config))


def sizes_at_most(config: RunConfig) -> Sizes:
    """Return the same at once, with an upper bound of the activations."""
    tensors = _tensors(config)
    return Sizes(tensors, activation_bound(config, element_bytes(config) * sum(tensors.trainable)))


def _tensors(config: RunConfig) -> TensorSizes:
    with torch.device("meta"):
        return tensor_sizes(build_model(config))


def _optimizer_share(config: RunConfig, world_size: int) -> float:
    """Return the share of the optimizer state that a rank holds."""
    return 1 / world_size if config.engine.zero_stage else 1.0


def state_bytes(config: RunConfig, tensors: TensorSizes, world_size: int, *, gpu: bool) -> State:
    """Return what stays allocated on each of `world_size` ranks.

    Args:
        config: `engine.dtype` is bf16 or fp32.
        tensors: of its model.
        world_size: ranks.
        gpu: whether an offloaded optimizer is outside the ranks' own memory.
    """
    engine, trainable = config.engine, sum(tensors.trainable)
    element, stage = element_bytes(config), engine.zero_stage
    share = _optimizer_share(config, world_size)
    masters = 4 if stage or engine.dtype == "bf16" else 0
    buckets = 0.0
    if stage == 1 and engine.dtype == "bf16":
        buckets = 4 * trainable  # summed in fp32 beside those of the micro-batch
    elif stage:
        buckets = element * min(trainable, LARGEST_BUCKET_ELEMENTS)
    weights = trainable + sum(tensors.frozen)
    if stage == 3:
        buckets += 4 * trainable * share
        weights *= share
        if world_size > 1:
            weights += sum(tensors.persistent)
    return State(
        weights=int(element * weights),
        optimizer=0 if gpu and engine.offload_optimizer else int((8 + masters) * trainable * share),
        buckets=int(buckets),
    )


def _gradients(config: RunConfig, tensors: TensorSizes, world_size: int) -> Gradients:
    """Return the gradients of each of `world_size` ranks, as test_memory.py counts them."""
    engine, trainable = config.engine, sum(tensors.trainable)
    element, stage, bf16 = element_bytes(config), engine.zero_stage, engine.dtype == "bf16"
    accumulated = micro_batches(config, world_size) > 1
    whole = element * trainable
    bucket = min(trainable, LARGEST_BUCKET_ELEMENTS)
    flat = element * bucket
    if stage == 0 or (stage == 1 and bf16):
        masters = 4 * trainable if stage == 0 and bf16 else 0
        return Gradients(
            before=whole if accumulated else 0,
            stay_where_made=not accumulated,
            reduction=whole + flat,
            update=whole + masters,
        )
    own = int(4 * trainable * _optimizer_share(config, world_size))
    largest = max(tensors.trainable)
    in_flight = element * largest
    # A model larger than the bucket is reduced while the backward pass still runs.
    early = trainable > LARGEST_BUCKET_ELEMENTS
    if stage == 3:
        live = 0 if world_size == 1 else min(sum(tensors.partitioned), LIVE_ELEMENTS)
        fetched = min(live, PREFETCH_ELEMENTS + largest)
        before, copies = element * (live + fetched), flat
        reduction = flat + max(element * live, own) + in_flight
    elif stage == 1:
        before = in_flight + (2 * whole if accumulated else 0)  # autograd's, and their sum
        copies = 2 * flat
        reduction = max(before, copies + in_flight)
    else:
        kept = own if accumulated or early else 0
        before = in_flight + kept
        copies = 4 * bucket if bf16 else 2 * flat
        # Those in bf16 are reduced in fp32.
        reduction = own + copies + 4 * largest if bf16 else kept + copies + in_flight
    return Gradients(
        before=before + (copies if early else 0),
        stay_where_made=False,
        reduction=reduction,
        update=own,
    )


def footprint(config: RunConfig, sizes: Sizes, world_size: int, *, gpu: bool) -> Footprint:
    """Predict the memory of each of `world_size` ranks.

    Args:
        config: `engine.dtype` is bf16 or fp32, `micro_batch` what a rank takes at once.
        sizes: of its model.
        world_size: ranks.
        gpu: whether the ranks have GPUs.
    """
    state = state_bytes(config, sizes.tensors, world_size, gpu=gpu)
    gradients = _gradients(config, sizes.tensors, world_size)
    passes = gradients.before + sizes.activations.peak(
        config.micro_batch, gradients_stay=gradients.stay_where_made
    )
    shape = config.model
    clip = 4 * (shape.audio_frames * shape.mel_bins + 3 * shape.image_size**2)
    clips = config.micro_batch * (micro_batches(config, world_size) + config.data.prefetch_batches)
    return Footprint(
        **dataclasses.asdict(state),
        clips=clip * clips,
        decoding=_decoding(config) if gpu else 0,
        passes=passes,
        reduction=gradients.reduction,
        update=gradients.update,
        heap_slack=0 if gpu else _heap_slack(config, sizes.activations, gradients, passes),
        allowance=GPU_ALLOWANCE_BYTES if gpu else CPU_ALLOWANCE_BYTES,
    )


def _decoding(config: RunConfig) -> int:
    """Return bytes of the frames that a rank's pipelines decode on a GPU: decoded, resized and
    normalised."""
    data, pixels = config.data, 3 * config.model.image_size**2
    frames = config.micro_batch * (2 if data.augmentation.mixup_prob else 1)
    return data.video_pipelines * frames * (DECODED_COPIES * DECODED_BYTES + pixels + 4 * pixels)


def _heap_slack(
    config: RunConfig, activations: ActivationTimeline, gradients: Gradients, passes: int
) -> int:
    """Return what a CPU rank has beyond the largest part: glibc returns large blocks to the system
    when they are freed, and small ones hardly ever, so those of the passes stay during the others.

    Args:
        config: of the run.
        activations: of its model.
        gradients: in its parts.
        passes: bytes of that part.
    """
    heap = activations.peak(config.micro_batch, gradients_stay=False, below_bytes=HEAP_BLOCK_BYTES)
    if config.engine.zero_stage == 3:
        heap += gradients.before  # gathered weight by weight
    others = max(gradients.reduction, gradients.update)
    return max(0, int((1 + HEAP_FRAGMENTATION) * heap) + others - max(passes, others))
