"""Operations of masked audio-visual pretraining; needs torch and triton only."""

from cavmae.kernels.contrastive import ContrastiveResult, contrastive_loss
from cavmae.kernels.masking import (
    MaskIds,
    MaskMode,
    kept_count,
    mask_ids_from_shuffle,
    random_mask,
)
from cavmae.kernels.philox import STREAMS, philox4x32, random_words
from cavmae.kernels.tokens import (
    gather_patches,
    gather_tokens,
    masked_reconstruction_loss,
    restore_tokens,
)

__all__ = [
    "STREAMS",
    "ContrastiveResult",
    "MaskIds",
    "MaskMode",
    "contrastive_loss",
    "gather_patches",
    "gather_tokens",
    "kept_count",
    "mask_ids_from_shuffle",
    "masked_reconstruction_loss",
    "philox4x32",
    "random_mask",
    "random_words",
    "restore_tokens",
]
