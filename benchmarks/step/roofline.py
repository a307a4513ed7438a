"""The least time that each part of a step can take on a machine: from its operations and bytes.

Operations are those that the losses need (`trainer/cost_model/flops.py`). Bytes are the unavoidable
ones: weights, inputs and outputs of a part, once each; everything between might stay in a cache. So
a floor is never too high, and where caches are small no code reaches it.
"""

from dataclasses import asdict, dataclass

import torch

from cavmae.benchmarks.harness.timeline import Label
from cavmae.benchmarks.step.parts import part_of
from cavmae.trainer.cost_model.flops import backward_flops, forward_flops
from cavmae.trainer.model.cavmae import CAVMAE
from cavmae.trainer.model.config import ModelConfig
from cavmae.trainer.model.masking import decoded_count

_ADAM_BYTES = 28
"""Bytes of each weight. In fp32: gradient, weight and two moments read, the last three written. In
bf16 the weight has a master of 4 bytes, and gradient and weight have 2."""
_PIXEL_BYTES, _ID_BYTES = 4, 8


@dataclass(frozen=True)
class Work:
    """Work of a part. Attributes: flops and bytes of a step on one rank."""

    flops: int
    bytes: int

    def floor_seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """Return the least time, with operations and bytes fully overlapped."""
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)


def part_work(
    config: ModelConfig, batch: int, dtype: torch.dtype, *, ranks: int, zero_stage: int
) -> dict[Label, Work]:
    """Return the work of a training step at the default mask ratios, by part.

    Args:
        config: sizes of the model.
        batch: samples of a rank.
        dtype: dtype of weights and activations.
        ranks: ranks that share the negatives, and from stage 1 on the optimizer's state.
        zero_stage: at 0 each rank updates all weights.
    """
    element = dtype.itemsize
    weights = _weights(config)
    audio, video = int(config.audio_tokens * 0.25), int(config.video_tokens * 0.25)
    decoded_audio, decoded_video = (
        decoded_count(removed, config.decoded_share)
        for removed in (config.audio_tokens - audio, config.video_tokens - video)
    )
    kept = element * (audio + video) * config.width
    pixels = _PIXEL_BYTES * (256 * audio + 768 * video)
    target = _PIXEL_BYTES * (256 * decoded_audio + 768 * decoded_video)
    predicted = element * (256 * decoded_audio + 768 * decoded_video)
    # Bytes of a sample: inputs and outputs.
    passing = {
        "embed": (pixels, kept),
        "encoders": (kept, kept),
        "joint": (kept, 2 * kept),
        "decoder": (kept, predicted),
    }
    forward = forward_flops(config)
    backward = asdict(backward_flops(forward))
    work = {}
    for part, (comes, goes) in passing.items():
        held = element * weights[part]
        # Backward: inputs again, their gradient (pixels have none) and that of outputs.
        back = comes + goes + (comes if part != "embed" else 0)
        work[Label(part, "forward")] = Work(
            batch * asdict(forward)[part], held + batch * (comes + goes)
        )
        work[Label(part, "backward")] = Work(batch * backward[part], 2 * held + batch * back)
    similarities = 2 * config.width * batch * batch * ranks
    embeddings = 2 * _PIXEL_BYTES * config.width
    losses = target + predicted + embeddings
    work[Label("losses", "forward")] = Work(similarities, batch * losses)
    work[Label("losses", "backward")] = Work(
        2 * similarities, batch * (losses + predicted + embeddings)
    )
    ids = 2 * _ID_BYTES * (config.audio_tokens + config.video_tokens)
    work[Label("mask", "forward")] = Work(0, batch * ids)
    updaters = ranks if zero_stage >= 1 else 1
    work[Label("optimizer")] = Work(0, _ADAM_BYTES * sum(weights.values()) // updaters)
    return work


def _weights(config: ModelConfig) -> dict[str, int]:
    """Count trained weights by part; those outside of modules belong to no part."""
    model = CAVMAE(config)
    model.freeze_unused(reconstruct=True, contrast=True)
    weights: dict[str, int] = {}
    for name, child in model.named_children():
        own = sum(one.numel() for one in child.parameters() if one.requires_grad)
        weights[part_of(name)] = weights.get(part_of(name), 0) + own
    return weights
