"""The block of the cross-attention decoder (CrossMAE: Fu et al. 2024, "Rethinking Patch Dependence
for Masked Autoencoders", section 3).

Removed patches are queries that attend to the encoders' tokens, and not to each other: what is
predicted of a patch does not depend on which others are decoded, so some of them are enough.
"""

import torch
from torch import nn

from cavmae.kernels import AttentionBackend, attention
from cavmae.trainer.model.blocks import Mlp, Recompute, recomputed


class CrossAttention(nn.Module):
    """Multi-head attention of queries to other tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.backend: AttentionBackend | None = None
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, queries: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Mix (batch, tokens, width) for each of (batch, queries, width), shaped like these."""
        query, key, value = (
            x.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for x in (self.q(queries), *self.kv(tokens).chunk(2, dim=2))
        )  # (batch, heads, queries or tokens, head width)
        mixed = attention(query, key, value, backend=self.backend)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class CrossBlock(nn.Module):
    """Pre-norm block of cross-attention and MLP. The tokens are not normalised again: they come
    from the encoders' last norm."""

    is_zero3_leaf = True
    """The MLP's weights are read without calling their modules, as in `Block`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.cross_attn = CrossAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, 4 * width)
        self._recompute_all = False

    def set_recomputed(self, how: Recompute) -> None:
        """Choose what the backward pass recomputes; see `Block.set_recomputed`."""
        self._recompute_all = how == "full"
        self.mlp.keep = how != "selective"

    def forward(self, queries: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Apply attention and MLP with their norms and residuals.

        Args:
            queries: (batch, queries, width).
            tokens: (batch, tokens, width) that they attend to.

        Returns:
            (batch, queries, width).
        """
        if not (self._recompute_all and torch.is_grad_enabled()):
            return self._forward(queries, tokens)
        return recomputed(self._forward, queries, tokens)

    def _forward(self, queries: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        queries = queries + self.cross_attn(self.norm1(queries), tokens)
        return self.mlp(queries, [self.norm2], [queries.shape[1]])
