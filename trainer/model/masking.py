"""Masks of both modalities for a batch."""

import torch

from cavmae.kernels import MaskIds, MaskMode, random_mask
from cavmae.trainer.model.config import ModelConfig


def random_masks(
    model: ModelConfig,
    positions: torch.Tensor,
    *,
    seed: int,
    audio_ratio: float,
    video_ratio: float,
    audio_mode: MaskMode = "unstructured",
) -> tuple[MaskIds, MaskIds]:
    """Audio and video masks, a function of seed and plan position alone.

    Args:
        model: sizes of the patch grids.
        positions: (batch,) int64 positions in the sample plan; the ids come on their device.
        seed: the run's seed.
        audio_ratio: share of audio patches removed.
        video_ratio: share of image patches removed.
        audio_mode: structure of the audio mask; image masks have none.
    """
    audio = random_mask(
        positions,
        seed=seed,
        stream="mask_audio",
        grid=model.audio_grid,
        ratio=audio_ratio,
        mode=audio_mode,
    )
    video = random_mask(
        positions, seed=seed, stream="mask_video", grid=model.video_grid, ratio=video_ratio
    )
    return audio, video
