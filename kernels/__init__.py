"""Operations of masked audio-visual pretraining; needs torch and triton only."""

from cavmae.kernels.attention import AttentionBackend, attention
from cavmae.kernels.backend import Backend, default_backend
from cavmae.kernels.contrastive import ContrastiveResult, contrastive_loss
from cavmae.kernels.gather import gather_tokens
from cavmae.kernels.gelu import gelu_backward
from cavmae.kernels.layer_norm import layer_norm, layer_norm_backward
from cavmae.kernels.masking import (
    MaskIds,
    MaskMode,
    kept_count,
    mask_ids_from_shuffle,
    random_mask,
)
from cavmae.kernels.packing import pack_rows
from cavmae.kernels.patches import gather_patches
from cavmae.kernels.philox import STREAMS, philox4x32, random_words
from cavmae.kernels.reconstruction import masked_reconstruction_loss
from cavmae.kernels.restore import restore_tokens

__all__ = [
    "STREAMS",
    "AttentionBackend",
    "Backend",
    "ContrastiveResult",
    "MaskIds",
    "MaskMode",
    "attention",
    "contrastive_loss",
    "default_backend",
    "gather_patches",
    "gather_tokens",
    "gelu_backward",
    "kept_count",
    "layer_norm",
    "layer_norm_backward",
    "mask_ids_from_shuffle",
    "masked_reconstruction_loss",
    "pack_rows",
    "philox4x32",
    "random_mask",
    "random_words",
    "restore_tokens",
]
