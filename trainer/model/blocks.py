"""The transformer block of CAV-MAE: one set of attention and MLP weights, three sets of norms.

The joint encoder uses one block for three token sequences: audio alone, video alone and both. They
are packed into one sequence, so that each weight is read once and each matrix product is large.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from cavmae.kernels import attention, gather_tokens

Modality = Literal["audio", "video"]
Stream = Literal["joint", "audio", "video"]
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
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(
        self, x: torch.Tensor, lengths: list[int], wanted: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(batch, tokens, width) to the same, or to (batch, wanted, width); `lengths` are the
        tokens of each segment."""
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = qkv.unbind(2)  # (batch, tokens, heads, head width)
        if wanted is not None:
            query = gather_tokens(query.flatten(2), wanted).unflatten(2, (self.heads, -1))
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        mixed = attention(query, key, value, lengths)  # (batch, heads, wanted, head width)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers with a GELU between."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, width) to the same."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block. Every block owns all six norms, as the published weights do;
    only the joint encoder uses those of `audio` and `video`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm1_a, self.norm1_v = (nn.LayerNorm(width) for _ in range(3))
        self.attn = Attention(width, heads)
        self.norm2, self.norm2_a, self.norm2_v = (nn.LayerNorm(width) for _ in range(3))
        self.mlp = Mlp(width, 4 * width)
        self.recompute = False
        """In the backward pass, instead of keeping activations from the forward pass."""

    def forward(
        self,
        x: torch.Tensor,
        segments: dict[Stream, int] | None = None,
        wanted: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention and MLP with their norms and residuals.

        Args:
            x: (batch, tokens, width); with `segments`, the sequences of each sample end to end.
            segments: tokens of each packed stream, in order; None: one sequence of the joint
                stream.
            wanted: (batch, wanted) int64 tokens whose output is asked for, unique in a row; all
                tokens are attended to. Only without `segments`; None: every token.

        Returns:
            (batch, tokens, width), or (batch, wanted, width).
        """
        segments = segments or {"joint": x.shape[1]}
        if not (self.recompute and torch.is_grad_enabled()):
            return self._forward(x, segments, wanted)
        # Nothing in a block is drawn at random, so no random state has to be kept.
        return checkpoint(
            self._forward, x, segments, wanted, use_reentrant=False, preserve_rng_state=False
        )

    def _forward(
        self, x: torch.Tensor, segments: dict[Stream, int], wanted: torch.Tensor | None
    ) -> torch.Tensor:
        lengths = list(segments.values())
        mixed = self.attn(self._segment_norm("norm1", x, segments), lengths, wanted)
        x = mixed + (x if wanted is None else gather_tokens(x, wanted))
        return x + self.mlp(self._segment_norm("norm2", x, segments))

    def _segment_norm(
        self, name: str, x: torch.Tensor, segments: dict[Stream, int]
    ) -> torch.Tensor:
        """Statistics once over the packed sequence, then each segment's own affine."""
        norms = [getattr(self, name + _SUFFIX[stream]) for stream in segments]
        if len(norms) == 1:
            return norms[0](x)
        normalized = F.layer_norm(x, x.shape[-1:], eps=norms[0].eps)
        parts = normalized.split(list(segments.values()), dim=1)
        return torch.cat(
            [
                torch.addcmul(norm.bias, part, norm.weight)
                for norm, part in zip(norms, parts, strict=True)
            ],
            dim=1,
        )


def norm_stream(name: str) -> Stream | None:
    """The stream whose norm a parameter belongs to, by its name; None: it is no encoder norm's."""
    module = name.rpartition(".")[0].rpartition(".")[2]
    return _NORM_STREAM.get(module)


def pass_streams(
    block: nn.Module, streams: dict[Stream, torch.Tensor]
) -> dict[Stream, torch.Tensor]:
    """Each stream (batch, its tokens, width) through one `Block`, in one packed pass."""
    segments = {stream: tokens.shape[1] for stream, tokens in streams.items()}
    packed = block(torch.cat(list(streams.values()), dim=1), segments)
    return dict(zip(streams, packed.split(list(segments.values()), dim=1), strict=True))
