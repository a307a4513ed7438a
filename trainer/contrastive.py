"""The contrastive loss over groups of the sample plan, whatever ranks and accumulation do.

A group is `group_size` consecutive positions of the plan. Where the groups lie decides what has to
be exchanged:

- `local`: every group is inside one rank's micro-batch; nothing is.
- `gathered`: every group is inside one micro-batch of all ranks; its embeddings are gathered.
- `cached`: groups span micro-batches. Embeddings of the whole step are computed first without
  gradients, the loss and its gradients with respect to them follow, and each micro-batch's forward
  then gets its own part of those gradients (GradCache, Gao et al. 2021): exact, for one more
  encoder forward.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist

from cavmae.dataloaders.plan import rank_positions
from cavmae.kernels import ContrastiveResult, contrastive_loss
from cavmae.trainer.config import LossConfig

Layout = Literal["local", "gathered", "cached"]


def contrastive_layout(
    *, group_size: int, global_batch: int, micro_batch: int, lanes: int, world_size: int
) -> Layout:
    """Where the groups of a step lie; a pure function of the batch sizes."""
    rank_of = np.empty(global_batch, dtype=np.int64)
    micro_of = np.empty(global_batch, dtype=np.int64)
    for rank in range(world_size):
        positions = rank_positions(0, rank, world_size, global_batch, lanes)
        rank_of[positions] = rank
        micro_of[positions] = np.arange(len(positions)) // micro_batch
    rank_of, micro_of = rank_of.reshape(-1, group_size), micro_of.reshape(-1, group_size)
    if (micro_of != micro_of[:, :1]).any():
        return "cached"
    return "gathered" if (rank_of != rank_of[:, :1]).any() else "local"


@dataclass
class Pairs:
    """Attributes: audio, video (batch, width) embeddings; positions (batch,) int64 in the plan."""

    audio: torch.Tensor
    video: torch.Tensor
    positions: torch.Tensor


def concatenate(parts: list[Pairs]) -> Pairs:
    """The pairs of several micro-batches as one."""
    return Pairs(
        torch.cat([part.audio for part in parts]),
        torch.cat([part.video for part in parts]),
        torch.cat([part.positions for part in parts]),
    )


def gather(own: Pairs) -> Pairs:
    """The pairs of all ranks, on every rank; gradients flow into this rank's own ones only."""
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    if world_size == 1:
        return own
    everyone = Pairs(*(_all_gather(x.detach()) for x in (own.audio, own.video, own.positions)))
    start = dist.get_rank() * len(own.positions)
    stop = start + len(own.positions)

    def with_own(all_of: torch.Tensor, mine: torch.Tensor) -> torch.Tensor:
        return torch.cat([all_of[:start], mine, all_of[stop:]])

    return Pairs(
        with_own(everyone.audio, own.audio),
        with_own(everyone.video, own.video),
        everyone.positions,
    )


def _all_gather(x: torch.Tensor) -> torch.Tensor:
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def group_loss(pairs: Pairs, config: LossConfig, group_size: int) -> ContrastiveResult:
    """Mean loss over the groups of consecutive positions in `pairs`."""
    order = torch.argsort(pairs.positions)
    return contrastive_loss(
        pairs.audio[order], pairs.video[order], config.temperature, config.bidirectional, group_size
    )


def scale_gradient(x: torch.Tensor, factor: float) -> torch.Tensor:
    """The same value with `factor` times the gradient."""
    return x if factor == 1 else x.detach() + factor * (x - x.detach())
