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
        model: sizes of the patch grids, and the share of removed patches that is decoded: where it
            is below 1, `removed` of the masks has those alone, in random order.
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


def decoded_count(removed: int, share: float) -> int:
    """Return how many of a modality's removed patches are decoded: the nearest whole number (a half
    becomes the even one), but one at least where there is one."""
    return min(removed, max(1, round(removed * share)))


def _decoded(
    mask: MaskIds, share: float, positions: torch.Tensor, seed: int, stream: str
) -> MaskIds:
    """Leave a random share of the removed patches. The mask's own order would not do: structured
    masks have patches outside of their rows and columns first."""
    removed = mask.removed.shape[1]
    count = decoded_count(removed, share)
    if count == removed:
        return mask
    shuffled = random_mask(positions, seed=seed, stream=stream, grid=(1, removed), ratio=0.0).keep
    return mask._replace(removed=mask.removed.gather(1, shuffled[:, :count]))


def _audio_mask(
    model: ModelConfig, mask: MaskConfig, positions: torch.Tensor, seed: int
) -> MaskIds:
    drawn = random_mask(
        positions,
        seed=seed,
        stream="mask_audio",
        grid=model.audio_grid,
        ratio=mask.audio_ratio,
        mode=mask.audio_mode,
    )
    return _decoded(drawn, model.decoded_share, positions, seed, "decoded_audio")


def _video_mask(
    model: ModelConfig, mask: MaskConfig, positions: torch.Tensor, seed: int
) -> MaskIds:
    drawn = random_mask(
        positions, seed=seed, stream="mask_video", grid=model.video_grid, ratio=mask.video_ratio
    )
    return _decoded(drawn, model.decoded_share, positions, seed, "decoded_video")
