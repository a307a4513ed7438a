"""How the ranks and their micro-batches share the samples of an optimizer step.

Any number of ranks shares a step, as a cluster that loses a node goes on with what is left. Each
rank owns whole lanes where their number allows it, else its part of the step's samples, listed lane
by lane: shares differ by one sample at most, and so do the micro-batches of a rank, of which all
ranks have equally many. The mean of a step is one over samples, so a mean over the samples of a
micro-batch is weighted by their number.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from cavmae.dataloaders.sampling.sample_plan import default_lanes


@dataclass(frozen=True)
class StepShares:
    """The shares of one run and rank count.

    Attributes:
        global_batch: samples of a step.
        lanes: of the sample plan.
        world_size: ranks.
        micro_batch: most samples that a rank takes at once. A rank that would have none left for a
            micro-batch of the others takes one more (only where this is 1).

    Raises:
        ValueError: there are fewer samples than ranks, or lanes do not divide the samples.
    """

    global_batch: int
    lanes: int
    world_size: int
    micro_batch: int

    def __post_init__(self) -> None:
        check_ranks(self.global_batch, self.world_size)
        if self.lanes < 1 or self.global_batch % self.lanes:
            raise ValueError(
                f"lanes is {self.lanes}, which does not divide global_batch = {self.global_batch}; "
                f"use {default_lanes(self.global_batch, self.world_size)}"
            )
        if self.micro_batch < 1:
            raise ValueError(f"micro_batch is {self.micro_batch}; use 1 or more")

    @property
    def largest(self) -> int:
        """Samples of the rank that has most."""
        return math.ceil(self.global_batch / self.world_size)

    @property
    def accumulation(self) -> int:
        """Micro-batches of each rank."""
        smallest = self.global_batch // self.world_size
        return min(smallest, math.ceil(self.largest / self.micro_batch))

    @property
    def largest_micro_batch(self) -> int:
        """Samples of the largest micro-batch."""
        return math.ceil(self.largest / self.accumulation)

    def offsets(self, rank: int) -> np.ndarray:
        """Return the positions of a rank in a step, relative to the step's first.

        Returns:
            (samples of the rank,) int64, ascending.
        """
        bounds = [one * self.global_batch // self.world_size for one in (rank, rank + 1)]
        return np.sort(_lane_by_lane(self.global_batch, self.lanes)[slice(*bounds)])

    def micro_batches(self, rank: int) -> list[np.ndarray]:
        """Cut the `offsets` of a rank into its micro-batches."""
        return np.array_split(self.offsets(rank), self.accumulation)

    def weight(self, samples: int) -> float:
        """Return what a mean over the samples of a micro-batch is multiplied by, so that the mean
        over micro-batches and ranks is the mean over the step's samples; 1 where all are equal."""
        return samples * self.world_size * self.accumulation / self.global_batch


def check_ranks(global_batch: int, world_size: int) -> None:
    """Refuse more ranks than a step has samples.

    Raises:
        ValueError: the ranks are too many, or there is none.
    """
    if not 1 <= world_size <= global_batch:
        raise ValueError(
            f"there are {world_size} ranks and global_batch is {global_batch}; use 1 to "
            f"{global_batch} ranks, or a larger global_batch"
        )


@lru_cache(8)
def _lane_by_lane(global_batch: int, lanes: int) -> np.ndarray:
    """Return the offsets of a step, those of the first lane first."""
    return np.arange(global_batch, dtype=np.int64).reshape(-1, lanes).T.reshape(-1)
