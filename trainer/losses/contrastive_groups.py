"""Which clips of a step rank each other, and which ranks hold them.

A contrastive group is `group_size` consecutive positions of the sample plan, whatever the number of
ranks and micro-batches. Where the groups lie decides what has to be exchanged:

- `local`: every group is inside one rank's micro-batch; nothing is exchanged.
- `gathered`: every group is inside one micro-batch of all ranks; embeddings are all-gathered.
- `cached`: groups span micro-batches, so embeddings of the whole step come first (`PretrainTask`).
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from cavmae.dataloaders.sampling.sample_plan import rank_positions
from cavmae.trainer.config.configs import PretrainConfig

Layout = Literal["local", "gathered", "cached"]


def contrastive_layout(
    *, group_size: int, global_batch: int, micro_batch: int, lanes: int, world_size: int
) -> Layout:
    """Return where the groups of a step lie, which depends on the batch sizes alone."""
    rank_of, row_of = _places(global_batch, lanes, world_size)
    places = np.stack([rank_of, row_of // micro_batch]).reshape(2, -1, group_size)
    span_ranks, span_micro_batches = (places != places[..., :1]).any((1, 2))
    if span_micro_batches:
        return "cached"
    return "gathered" if span_ranks else "local"


def step_layout(config: PretrainConfig, world_size: int, micro_batch: int) -> Layout:
    """Return where the groups of a run's steps lie, of which a rank takes `micro_batch` at once."""
    return contrastive_layout(
        group_size=config.loss.contrastive_group or config.global_batch,
        global_batch=config.global_batch,
        micro_batch=micro_batch,
        lanes=config.lanes,
        world_size=world_size,
    )


def _places(global_batch: int, lanes: int, world_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return each position's rank and its row on that rank; both (global_batch,)."""
    rank_of = np.empty(global_batch, dtype=np.int64)
    row_of = np.empty(global_batch, dtype=np.int64)
    for rank in range(world_size):
        positions = rank_positions(0, rank, world_size, global_batch, lanes)
        rank_of[positions] = rank
        row_of[positions] = np.arange(len(positions))
    return rank_of, row_of


@dataclass(frozen=True)
class OwnGroup:
    """A group that has clips of this rank; indices are int64 on this rank's device.

    Attributes:
        own: (own clips,) rows of this rank's clips.
        members: (group_size,) rows of all clips in tensors gathered from all ranks, by rank.
        first_own: index in `members` of this rank's first clip; its others follow.
    """

    own: torch.Tensor
    members: torch.Tensor
    first_own: int

    def select(self, gathered: torch.Tensor) -> torch.Tensor:
        """Pick the group's rows: (all ranks' rows, ...) to (group_size, ...)."""
        if len(self.members) == len(gathered):
            return gathered  # all of them, and in order: rows are ascending
        return gathered[self.members]


def own_groups(
    *,
    group_size: int,
    global_batch: int,
    lanes: int,
    rank: int,
    world_size: int,
    device: torch.device,
) -> list[OwnGroup]:
    """Return the groups of a step that have clips of this rank, in the order of positions."""
    rank_of, row_of = _places(global_batch, lanes, world_size)
    rows_per_rank = global_batch // world_size
    groups = []
    for ranks, rows in zip(
        rank_of.reshape(-1, group_size), row_of.reshape(-1, group_size), strict=True
    ):
        own = np.sort(rows[ranks == rank])
        if len(own):
            groups.append(
                OwnGroup(
                    own=torch.from_numpy(own).to(device),
                    members=torch.from_numpy(np.sort(ranks * rows_per_rank + rows)).to(device),
                    first_own=int((ranks < rank).sum()),
                )
            )
    return groups
