"""Masks of both modalities for a batch, or of one."""

from collections.abc import Collection

import torch

from cavmae.kernels import MaskIds, random_mask
from cavmae.trainer.model.blocks import Modality
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
    return _audio_mask(model, mask, positions, seed), _video_mask(model, mask, positions, seed)


def masks_of(
    modalities: Collection[Modality],
    model: ModelConfig,
    mask: MaskConfig,
    positions: torch.Tensor,
    *,
    seed: int,
) -> tuple[MaskIds | None, MaskIds | None]:
    """Draw the masks of `random_masks` of some modalities; None for another."""
    drawn = (model, mask, positions, seed)
    audio = _audio_mask(*drawn) if "audio" in modalities else None
    return audio, _video_mask(*drawn) if "video" in modalities else None


def _audio_mask(
    model: ModelConfig, mask: MaskConfig, positions: torch.Tensor, seed: int
) -> MaskIds:
    return random_mask(
        positions,
        seed=seed,
        stream="mask_audio",
        grid=model.audio_grid,
        ratio=mask.audio_ratio,
        mode=mask.audio_mode,
    )


def _video_mask(
    model: ModelConfig, mask: MaskConfig, positions: torch.Tensor, seed: int
) -> MaskIds:
    return random_mask(
        positions, seed=seed, stream="mask_video", grid=model.video_grid, ratio=mask.video_ratio
    )
