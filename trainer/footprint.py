"""What a run takes from each rank, before it starts: memory by purpose, and its peak.

Some of it is there all the time; to that comes what one part of a step needs at its worst, and the
parts follow each other: the passes, the reduction of gradients, the update. Bytes of weights,
gradients and optimizer state are how DeepSpeed 0.19 lays them out with the settings of `engine.py`;
`tests/trainer/test_footprint.py` holds them against the allocator of real ranks, and
`cavmae bench memory` all of it against processes.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from cavmae.trainer.activations import Passes, count_passes, passes_at_most
from cavmae.trainer.config import PretrainConfig
from cavmae.trainer.engine import LARGEST_BUCKET_ELEMENTS
from cavmae.trainer.model.cavmae import CAVMAE
from cavmae.trainer.wire import (
    PERSISTENT_ELEMENTS,
    PREFETCH_ELEMENTS,
    TensorSizes,
    tensor_sizes,
)

GPU_ALLOWANCE_BYTES = 3 << 30
"""CUDA, NCCL, DALI, and what an allocator cannot use."""
CPU_ALLOWANCE_BYTES = 1 << 30
"""torch, DeepSpeed and DALI with their threads, and the reader processes of a rank."""
LIVE_ELEMENTS = 1_000_000_000
"""Stage 3 lets go of gathered weights where they would be more: DeepSpeed's default."""

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
        kept: on a CPU, what the C library keeps of freed memory where the others have no use for
            it: the whole model's gradients are one block, which needs a hole of its size.
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
    passes: Passes

    @property
    def trainable(self) -> int:
        """Elements of all trainable parameters."""
        return sum(self.tensors.trainable)


def model_sizes(config: PretrainConfig) -> Sizes:
    """Of the run's model, which is not built; takes seconds.

    Args:
        config: `engine.dtype` is bf16 or fp32.
    """
    return Sizes(_tensors(config), count_passes(config))


def sizes_at_most(config: PretrainConfig) -> Sizes:
    """The same at once, with passes that keep more than those of `model_sizes`."""
    tensors = _tensors(config)
    return Sizes(tensors, passes_at_most(config, _element_bytes(config) * sum(tensors.trainable)))


def _tensors(config: PretrainConfig) -> TensorSizes:
    with torch.device("meta"):
        model = CAVMAE(config.model)
    model.freeze_unused(
        reconstruct=config.loss.reconstruction_weight > 0,
        contrast=config.loss.contrastive_weight > 0,
    )
    return tensor_sizes(model)


def state_bytes(config: PretrainConfig, tensors: TensorSizes, world_size: int) -> State:
    """Of each of `world_size` ranks.

    Args:
        config: `engine.dtype` is bf16 or fp32.
        tensors: of its model.
    """
    engine, weights = config.engine, sum(tensors.trainable)
    element, stage = _element_bytes(config), engine.zero_stage
    share = _share(config, world_size)
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
            kept += sum(_small(tensors))
    return State(
        weights=int(element * kept),
        optimizer=0 if engine.offload_optimizer else int((8 + masters) * weights * share),
        buckets=int(buckets),
    )


def footprint(config: PretrainConfig, sizes: Sizes, world_size: int, *, gpu: bool) -> Footprint:
    """Of each of `world_size` ranks.

    Args:
        config: `engine.dtype` is bf16 or fp32, `micro_batch` what a rank takes at once.
        sizes: of its model.
        world_size: ranks.
        gpu: whether the ranks have GPUs.
    """
    state = state_bytes(config, sizes.tensors, world_size)
    times = config.global_batch // world_size // config.micro_batch
    gradients = _gradients(config, sizes.tensors, world_size, accumulated=times > 1)
    passes = gradients.before + sizes.passes.peak(
        config.micro_batch, gradients_stay=gradients.stay_where_made
    )
    shape = config.model
    clip = 4 * (shape.audio_frames * shape.mel_bins + 3 * shape.image_size**2)
    return Footprint(
        **dataclasses.asdict(state),
        clips=clip * config.micro_batch * (times + config.data.prefetch_batches),
        passes=passes,
        reduction=gradients.reduction,
        update=gradients.update,
        kept=0 if gpu else _kept(passes, gradients, config.engine.zero_stage),
        allowance=GPU_ALLOWANCE_BYTES if gpu else CPU_ALLOWANCE_BYTES,
    )


@dataclass(frozen=True)
class _Gradients:
    """Bytes of gradients in the parts of a step, beyond the state.

    Attributes:
        before: when the last micro-batch's passes begin; in stage 3 also the gathered weights.
        stay_where_made: whether those of its backward pass come to that one by one.
        reduction, update: most bytes in these parts.
    """

    before: int
    stay_where_made: bool
    reduction: int
    update: int


def _gradients(
    config: PretrainConfig, tensors: TensorSizes, world_size: int, *, accumulated: bool
) -> _Gradients:
    """As the allocator of real ranks counts them (DeepSpeed 0.19)."""
    engine, weights = config.engine, sum(tensors.trainable)
    element, stage, share = _element_bytes(config), engine.zero_stage, _share(config, world_size)
    largest = max(tensors.trainable)
    whole, own = element * weights, int(4 * weights * share)
    flat = element * min(weights, LARGEST_BUCKET_ELEMENTS)
    if stage == 0:
        masters = 4 * weights if engine.dtype == "bf16" else 0
        return _Gradients(
            before=whole if accumulated else 0,
            stay_where_made=not accumulated,
            reduction=whole + flat,
            update=whole + masters,
        )
    if stage == 1 and engine.dtype == "bf16":
        return _Gradients(
            before=whole if accumulated else 0,
            stay_where_made=not accumulated,
            reduction=whole + flat,
            update=whole,
        )
    in_flight = element * largest
    # A model larger than the bucket is reduced while the backward pass still runs.
    early = weights > LARGEST_BUCKET_ELEMENTS
    if stage == 3:
        live = 0 if world_size == 1 else min(sum(_shared(tensors)), LIVE_ELEMENTS)
        fetched = min(live, PREFETCH_ELEMENTS + largest)
        reduction = flat + max(element * live, own) + in_flight
        return _Gradients(
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
    return _Gradients(
        before=before + in_flight + (copies if early else 0),
        stay_where_made=False,
        reduction=reduction,
        update=own,
    )


def _kept(passes: int, gradients: _Gradients, zero_stage: int) -> int:
    """Of what the smaller parts of a step have freed, for the largest one (`keep_freed_memory`).

    Stage 0 updates a tensor after the other, in what the activations have left; the others make
    blocks as large as all of them together, and each part its own.
    """
    if zero_stage == 0:
        separate = (max(passes, gradients.update), gradients.reduction)
    else:
        separate = (passes, gradients.reduction, gradients.update)
    return sum(separate) - max(separate)


def _small(tensors: TensorSizes) -> list[int]:
    """Sizes of what stage 3 keeps whole."""
    return [one for one in tensors.trainable + tensors.frozen if one <= PERSISTENT_ELEMENTS]


def _shared(tensors: TensorSizes) -> list[int]:
    """Sizes of what stage 3 gathers when it is needed."""
    return [one for one in tensors.trainable + tensors.frozen if one > PERSISTENT_ELEMENTS]


def _element_bytes(config: PretrainConfig) -> int:
    return 2 if config.engine.dtype == "bf16" else 4


def _share(config: PretrainConfig, world_size: int) -> float:
    return 1 / world_size if config.engine.zero_stage else 1.0


def what_would_fit(
    config: PretrainConfig, sizes: Sizes, world_size: int, limit_bytes: int, *, gpu: bool
) -> Iterator[str]:
    """Changes each of which makes the run fit, the smallest loss of speed first."""

    def fits(changed: PretrainConfig) -> bool:
        return footprint(changed, sizes, world_size, gpu=gpu).total <= limit_bytes

    per_rank, engine = config.global_batch // world_size, config.engine
    for micro_batch in range(config.micro_batch - 1, 0, -1):
        changed = dataclasses.replace(config, micro_batch=micro_batch)
        if per_rank % micro_batch == 0 and fits(changed):
            yield f"--micro-batch {micro_batch}"
            break
    stages: tuple[Literal[1, 2, 3], ...] = (1, 2, 3)
    for stage in stages:
        if stage > engine.zero_stage:
            changed = dataclasses.replace(engine, zero_stage=stage, compile=False)
            if fits(dataclasses.replace(config, engine=changed)):
                yield f"--engine.zero-stage {stage}"
                break
    if not engine.activation_checkpointing:
        changed = dataclasses.replace(engine, activation_checkpointing=True)
        recomputed = dataclasses.replace(config, engine=changed)
        counted = Sizes(sizes.tensors, count_passes(recomputed))
        if footprint(recomputed, counted, world_size, gpu=gpu).total <= limit_bytes:
            yield "--engine.activation-checkpointing"
    if gpu and engine.zero_stage and not engine.offload_optimizer:
        changed = dataclasses.replace(engine, offload_optimizer=True)
        if fits(dataclasses.replace(config, engine=changed)):
            yield "--engine.offload-optimizer"
