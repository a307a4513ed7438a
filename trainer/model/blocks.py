"""The transformer block of CAV-MAE: one set of attention and MLP weights, three sets of norms.

The joint encoder uses one block for three token sequences: audio alone, video alone and both. They
are packed into one sequence, so that each weight is read once and each matrix product is large.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from cavmae.kernels import AttentionBackend, attention, gather_tokens
from cavmae.trainer.model.branches import mlp_branch, projections

Modality = Literal["audio", "video"]
Stream = Literal["joint", "audio", "video"]
Recompute = Literal["none", "selective", "full"]
TensorFunction = Callable[..., torch.Tensor]
_SUFFIX: dict[Stream, str] = {"joint": "", "audio": "_a", "video": "_v"}
_NORM_STREAM: dict[str, Stream] = {
    norm + suffix: stream
    for stream, suffix in _SUFFIX.items()
    for norm in ("norm", "norm1", "norm2")
}


class Attention(nn.Module):
    """Multi-head self-attention; tokens attend within their own segment of a packed sequence."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.backend: AttentionBackend | None = None
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(
        self,
        x: torch.Tensor,
        norms: list[nn.LayerNorm],
        lengths: list[int],
        query_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Add attention over the normalised tokens to them.

        Args:
            x: (batch, tokens, width).
            norms, lengths: norm and tokens of each segment.
            query_ids: see `Block.forward`.

        Returns:
            (batch, tokens, width), or (batch, queries, width).
        """
        bias = self.proj.bias
        query, key, value, x = projections(x, norms, lengths, self.qkv, bias)
        if query_ids is not None:
            query, x = (gather_tokens(tokens, query_ids) for tokens in (query, x))
        query, key, value = (
            tokens.unflatten(2, (self.heads, -1)).transpose(1, 2) for tokens in (query, key, value)
        )  # (batch, heads, tokens or queries, head width)
        mixed = attention(query, key, value, lengths, backend=self.backend)
        # The gradient of this bias comes from `projections`.
        return F.linear(mixed.transpose(1, 2).flatten(2), self.proj.weight, bias.detach()) + x


class Mlp(nn.Module):
    """Two linear layers with a GELU between."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.keep = True
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(
        self, x: torch.Tensor, norms: list[nn.LayerNorm], lengths: list[int]
    ) -> torch.Tensor:
        """Add the layers' output for the normalised tokens to (batch, tokens, width)."""
        return mlp_branch(x, norms, lengths, self.fc1, self.fc2, keep=self.keep)


class Block(nn.Module):
    """Pre-norm transformer block. Every block owns all six norms, as the published weights do;
    only the joint encoder uses those of `audio` and `video`."""

    is_zero3_leaf = True
    """Its weights are read without calling their modules, so ZeRO 3 has to gather them together."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm1_a, self.norm1_v = (nn.LayerNorm(width) for _ in range(3))
        self.attn = Attention(width, heads)
        self.norm2, self.norm2_a, self.norm2_v = (nn.LayerNorm(width) for _ in range(3))
        self.mlp = Mlp(width, 4 * width)
        self._recompute_all = False

    def set_recomputed(self, how: Recompute) -> None:
        """Choose what the backward pass recomputes: nothing; the norm and the activation before the
        MLP's linear layers; or everything but the block's input."""
        self._recompute_all = how == "full"
        self.mlp.keep = how != "selective"

    def forward(
        self,
        x: torch.Tensor,
        segments: dict[Stream, int] | None = None,
        query_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Apply attention and MLP with their norms and residuals.

        Args:
            x: (batch, tokens, width); with `segments`, the sequences of each sample end to end.
            segments: tokens of each packed stream, in order; None: one sequence of the joint
                stream.
            query_ids: (batch, queries) int64 tokens whose output is computed, unique in a row; they
                attend to all tokens. Only without `segments`; None: every token.

        Returns:
            (batch, tokens, width), or (batch, queries, width).
        """
        segments = segments or {"joint": x.shape[1]}
        if not (self._recompute_all and torch.is_grad_enabled()):
            return self._forward(x, segments, query_ids)
        return recomputed(partial(self._forward, segments=segments, query_ids=query_ids), x)

    def _forward(
        self, x: torch.Tensor, segments: dict[Stream, int], query_ids: torch.Tensor | None
    ) -> torch.Tensor:
        lengths = list(segments.values())
        norm1, norm2 = (
            [getattr(self, name + _SUFFIX[stream]) for stream in segments]
            for name in ("norm1", "norm2")
        )
        x = self.attn(x, norm1, lengths, query_ids)
        return self.mlp(x, norm2, lengths if query_ids is None else [x.shape[1]])


def recomputed(function: TensorFunction, *inputs: torch.Tensor) -> torch.Tensor:
    """Return `function(*inputs)`, keeping these alone for the backward pass, which recomputes what
    it needs. The model has no random operations, so no random state is kept."""
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def norm_stream(name: str) -> Stream | None:
    """Return the stream whose norm a parameter belongs to, by its name; None for other modules."""
    module = name.rpartition(".")[0].rpartition(".")[2]
    return _NORM_STREAM.get(module)


def pass_streams(
    block: nn.Module, streams: dict[Stream, torch.Tensor]
) -> dict[Stream, torch.Tensor]:
    """Pass each stream (batch, its tokens, width) through one `Block`, packed into a sequence."""
    segments = {stream: tokens.shape[1] for stream, tokens in streams.items()}
    packed = block(torch.cat(list(streams.values()), dim=1), segments)
    return dict(zip(streams, packed.split(list(segments.values()), dim=1), strict=True))
