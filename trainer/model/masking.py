"""Masks of both modalities for a batch."""

import torch

from cavmae.kernels import MaskIds, random_mask
from cavmae.trainer.model.config import MaskConfig, ModelConfig


def random_masks(
    model: ModelConfig, mask: MaskConfig, positions: torch.Tensor, *, seed: int
) -> tuple[MaskIds, MaskIds]:
    """Draw the audio and video masks, which depend on the seed and the sample positions alone.

    Args:
        model: sizes of the patch grids.
        mask: ratios of both modalities and structure of the audio mask.
        positions: (batch,) int64 positions in the sample plan; the ids are on the same device.
        seed: the run's seed.
    """
    audio = random_mask(
        positions,
        seed=seed,
        stream="mask_audio",
        grid=model.audio_grid,
        ratio=mask.audio_ratio,
        mode=mask.audio_mode,
    )
    video = random_mask(
        positions, seed=seed, stream="mask_video", grid=model.video_grid, ratio=mask.video_ratio
    )
    return audio, video
