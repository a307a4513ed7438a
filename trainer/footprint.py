"""What a run takes from each rank, before it starts: memory by purpose.

Bytes of weights, gradients and optimizer state follow from how DeepSpeed lays them out, which the
tests compare with the tensors that are alive on real ranks. Activations are counted: what autograd
keeps of a forward pass of one and of two samples, on this machine's CPU.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from cavmae.trainer.config import PretrainConfig
from cavmae.trainer.engine import LARGEST_BUCKET_ELEMENTS
from cavmae.trainer.model.cavmae import CAVMAE
from cavmae.trainer.model.masking import random_masks
from cavmae.trainer.wire import TensorSizes, tensor_sizes

ALLOWANCE_BYTES = 3 << 30
"""CUDA, NCCL, DALI, and what an allocator cannot use."""


@dataclass(frozen=True)
class Footprint:
    """Bytes of one rank.

    Attributes:
        weights: in the dtype of the run.
        gradients: at their most, in the last backward pass of a step.
        optimizer: fp32 masters and two moments.
        buckets: buffers of collectives.
        activations: what a micro-batch's forward pass keeps for its backward pass.
    """

    weights: int
    gradients: int
    optimizer: int
    buckets: int
    activations: int

    @property
    def total(self) -> int:
        """All of it, with an allowance for what is no tensor of ours."""
        return sum(dataclasses.astuple(self)) + ALLOWANCE_BYTES


@dataclass(frozen=True)
class Sizes:
    """Of a model: its parameters, and bytes that a forward pass keeps for each sample."""

    tensors: TensorSizes
    activations_per_sample: int

    @property
    def trainable(self) -> int:
        """Elements of all trainable parameters."""
        return sum(self.tensors.trainable)

    @property
    def frozen(self) -> int:
        """Elements of all others."""
        return sum(self.tensors.frozen)


def model_sizes(config: PretrainConfig) -> Sizes:
    """Build the model and run it on one and on two samples; takes seconds."""
    dtype = torch.bfloat16 if config.engine.dtype == "bf16" else torch.float32
    model = CAVMAE(config.model).to(dtype)
    model.freeze_unused(
        reconstruct=config.loss.reconstruction_weight > 0,
        contrast=config.loss.contrastive_weight > 0,
    )
    one, two = (_kept_bytes(model, config, samples) for samples in (1, 2))
    return Sizes(
        tensors=tensor_sizes(model),
        activations_per_sample=two - one,
    )


def _kept_bytes(model: CAVMAE, config: PretrainConfig, samples: int) -> int:
    """Of the storages that autograd keeps, parameters left out."""
    shape = config.model
    kept: dict[int, torch.Tensor] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in own:
            kept[place] = tensor
        return tensor

    audio_mask, video_mask = random_masks(
        shape,
        torch.arange(samples),
        seed=0,
        audio_ratio=config.mask.audio_ratio,
        video_ratio=config.mask.video_ratio,
        audio_mode=config.mask.audio_mode,
    )
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(
            torch.zeros(samples, shape.audio_frames, shape.mel_bins),
            torch.zeros(samples, 3, shape.image_size, shape.image_size),
            audio_mask,
            video_mask,
            reconstruct=config.loss.reconstruction_weight > 0,
            contrast=config.loss.contrastive_weight > 0,
            norm_pix=config.loss.norm_pix,
        )
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del output
    return total


def footprint(config: PretrainConfig, sizes: Sizes, world_size: int) -> Footprint:
    """Of each of `world_size` ranks.

    Args:
        config: `engine.dtype` is bf16 or fp32, `micro_batch` what a rank takes at once.
        sizes: of its model.
    """
    engine, weights = config.engine, sizes.trainable
    element = 2 if engine.dtype == "bf16" else 4
    stage, share = engine.zero_stage, 1 / world_size
    accumulated = config.global_batch // world_size > config.micro_batch
    if stage == 0:
        gradients = element * weights
    elif stage == 1 and engine.dtype == "bf16":
        gradients = (4 + element) * weights  # summed in fp32 beside those of the micro-batch
    elif stage == 1 and accumulated:
        gradients = 8 * weights  # as autograd left them, and their sum
    else:
        gradients = 4 * weights * share
    masters = 4 if stage or engine.dtype == "bf16" else 0
    optimizer = (8 + masters) * weights * (share if stage else 1.0)
    own_reduction = stage and not (stage == 1 and engine.dtype == "bf16")
    buckets = element * min(weights, LARGEST_BUCKET_ELEMENTS) if own_reduction else 0
    return Footprint(
        weights=int(element * (weights * (share if stage == 3 else 1.0) + sizes.frozen)),
        gradients=int(gradients),
        optimizer=0 if engine.offload_optimizer else int(optimizer),
        buckets=buckets,
        activations=config.micro_batch * sizes.activations_per_sample,
    )


def what_would_fit(
    config: PretrainConfig, sizes: Sizes, world_size: int, limit_bytes: int
) -> Iterator[str]:
    """Changes each of which makes the run fit, the smallest loss of speed first."""
    per_rank = config.global_batch // world_size
    for micro_batch in range(config.micro_batch - 1, 0, -1):
        changed = dataclasses.replace(config, micro_batch=micro_batch)
        if per_rank % micro_batch == 0 and _fits(changed, sizes, world_size, limit_bytes):
            yield f"--micro-batch {micro_batch}"
            break
    stages: tuple[Literal[1, 2, 3], ...] = (1, 2, 3)
    for stage in stages:
        if stage > config.engine.zero_stage:
            engine = dataclasses.replace(config.engine, zero_stage=stage, compile=False)
            changed = dataclasses.replace(config, engine=engine)
            if _fits(changed, sizes, world_size, limit_bytes):
                yield f"--engine.zero-stage {stage}"
                break


def _fits(config: PretrainConfig, sizes: Sizes, world_size: int, limit_bytes: int) -> bool:
    return footprint(config, sizes, world_size).total <= limit_bytes
