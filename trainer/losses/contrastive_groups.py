"""Which clips of a step rank each other, and which ranks hold them.

A contrastive group is `group_size` consecutive positions of the sample plan, whatever the number of
ranks and micro-batches. Where the groups lie decides what has to be exchanged:

- `local`: every group is inside one rank's micro-batch; nothing is exchanged.
- `gathered`: every group is inside one micro-batch of all ranks; embeddings are all-gathered.
- `cached`: groups span micro-batches, so embeddings of the whole step come first (`PretrainTask`).
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch

from cavmae.dataloaders.sampling.step_shares import StepShares
from cavmae.trainer.config.configs import PretrainConfig

Layout = Literal["local", "gathered", "cached"]


def group_size(config: PretrainConfig) -> int:
    """Return the clips of a contrastive group."""
    return config.loss.contrastive_group or config.global_batch


def contrastive_layout(shares: StepShares, group_size: int) -> Layout:
    """Return where the groups of a step lie."""
    places = _places(shares)
    if _span(places.micro_batch, group_size):
        return "cached"
    return "gathered" if _span(places.rank, group_size) else "local"


def groups_span_ranks(shares: StepShares, group_size: int) -> bool:
    """Return whether the clips of any group of a step lie on several ranks."""
    return _span(_places(shares).rank, group_size)


@dataclass(frozen=True)
class _Places:
    """Where each position of a step is: rank, micro-batch and row on that rank, all
    (global_batch,) int64."""

    rank: np.ndarray
    micro_batch: np.ndarray
    row: np.ndarray


@lru_cache(2)  # layout, span and exchanges of a run ask for the same
def _places(shares: StepShares) -> _Places:
    found = _Places(*(np.empty(shares.global_batch, dtype=np.int64) for _ in range(3)))
    for rank in range(shares.world_size):
        parts = shares.micro_batches(rank)
        own = np.concatenate(parts)
        found.rank[own] = rank
        found.micro_batch[own] = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        found.row[own] = np.arange(len(own))
    return found


def _span(places: np.ndarray, group_size: int) -> bool:
    """Whether any group of consecutive positions has more than one of these places."""
    groups = places.reshape(-1, group_size)
    return bool((groups != groups[:, :1]).any())


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


@dataclass(frozen=True)
class Exchange:
    """Clips whose embeddings the ranks gather at once: those of a step, or of a micro-batch.

    Attributes:
        rows: clips of the rank that has most; the others fill up to it.
        groups: those with clips of this rank, in the order of positions.
    """

    rows: int
    groups: list[OwnGroup]


def step_exchange(shares: StepShares, group_size: int, rank: int, device: torch.device) -> Exchange:
    """Return the exchange of all clips of a step."""
    return _exchange(_places(shares), np.arange(shares.global_batch), group_size, rank, device)


def micro_batch_exchanges(
    shares: StepShares, group_size: int, rank: int, device: torch.device
) -> list[Exchange]:
    """Return the exchanges of a step's micro-batches, none of which a group may span."""
    places = _places(shares)
    return [
        _exchange(places, np.flatnonzero(places.micro_batch == number), group_size, rank, device)
        for number in range(shares.accumulation)
    ]


def _exchange(
    places: _Places, positions: np.ndarray, group_size: int, rank: int, device: torch.device
) -> Exchange:
    """Build the exchange of whole groups, whose positions are ascending."""
    ranks, rows = places.rank[positions], places.row[positions]
    first_rows = np.full(places.rank.max() + 1, len(places.row))
    np.minimum.at(first_rows, ranks, rows)  # of each rank's part
    rows = rows - first_rows[ranks]
    longest = int(rows.max()) + 1
    groups = []
    for of_group, within in zip(
        ranks.reshape(-1, group_size), rows.reshape(-1, group_size), strict=True
    ):
        own = np.sort(within[of_group == rank])
        if len(own):
            groups.append(
                OwnGroup(
                    own=torch.from_numpy(own).to(device),
                    members=torch.from_numpy(np.sort(of_group * longest + within)).to(device),
                    first_own=int((of_group < rank).sum()),
                )
            )
    return Exchange(longest, groups)
