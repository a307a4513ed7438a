"""The order of a mixture of sets with given weights; a pure function of the position, too.

Lanes are those of `SamplePlan`. A lane consists of blocks of `BLOCK` slots; each set has the same
number of slots in every block, in an order drawn for the lane and block. The `n`-th slot of a set
in a lane reads the `n`-th position of that lane in the set's own plan. So each set keeps its epochs
and its locality, and sets of very different sizes can be mixed.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import numpy as np

from cavmae.dataloaders.config import DataConfig
from cavmae.dataloaders.sampling.philox import random_permutation
from cavmae.dataloaders.sampling.sample_plan import PlannedSample, SamplePlan
from cavmae.dataloaders.shards.shard_set import ShardSet

BLOCK = 1000
"""Slots of a lane in which each set has its exact weight; the resolution of weights."""


class MixturePlan:
    """Orders the samples of several sets.

    Args:
        plans: one for each set, all with the same seed and lanes.
        weights: one for each set, in any unit.

    Raises:
        ValueError: the weights are invalid.
    """

    def __init__(self, plans: Sequence[SamplePlan], weights: Sequence[float]):
        self.plans = plans
        self.seed, self.lanes = plans[0].seed, plans[0].lanes
        self.ends = np.cumsum(np.concatenate([plan.sizes for plan in plans]))
        self.count = int(self.ends[-1])
        self._first_shard = np.cumsum([0, *(len(plan.sizes) for plan in plans)]).tolist()
        self.quotas = _quotas(weights)
        if len(weights) != len(plans) or min(self.quotas) < 1:
            raise ValueError(
                f"data.mixture is {tuple(weights)}; use a share of at least 1 in {BLOCK} for each "
                f"of the {len(plans)} sets"
            )
        self._block = lru_cache(2 * self.lanes)(self._draw_block)

    def at(self, positions: np.ndarray) -> list[PlannedSample]:
        """Return the samples at any positions.

        Args:
            positions: `(count,)` int64, in any order.
        """
        which, inside = self._places(positions)
        planned: list[PlannedSample] = [PlannedSample(0, 0, 0)] * len(positions)
        for number, plan in enumerate(self.plans):
            chosen = np.flatnonzero(which == number)
            for place, sample in zip(chosen.tolist(), plan.at(inside[chosen]), strict=True):
                planned[place] = self._numbered(number, sample)
        return planned

    def substitute(self, position: int, attempt: int) -> PlannedSample:
        """Draw a substitute, like `SamplePlan.substitute`, from the position's set."""
        which, inside = self._places(np.array([position]))
        number = int(which[0])
        sample = self.plans[number].substitute(position, attempt)
        epoch = int(inside[0]) // self.plans[number].count
        return self._numbered(number, PlannedSample(sample.shard, sample.sample, epoch))

    def _numbered(self, number: int, sample: PlannedSample) -> PlannedSample:
        return PlannedSample(self._first_shard[number] + sample.shard, sample.sample, sample.epoch)

    def _places(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the set of each position, and the position in that set's own plan."""
        rows, lanes = np.divmod(positions, self.lanes)
        numbers, slots = np.divmod(rows, BLOCK)
        which = np.empty(len(positions), dtype=np.int64)
        inside = np.empty(len(positions), dtype=np.int64)
        quotas = np.array(self.quotas)
        for place, (lane, number, slot) in enumerate(
            zip(lanes.tolist(), numbers.tolist(), slots.tolist(), strict=True)
        ):
            set_of_slot, before = self._block(lane, number)
            which[place] = chosen = set_of_slot[slot]
            inside[place] = (number * quotas[chosen] + before[slot]) * self.lanes + lane
        return which, inside

    def _draw_block(self, lane: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Draw the set of each slot of a block, and the number of the set's earlier ones."""
        drawn = random_permutation(self.seed, "mixture", number * self.lanes + lane, BLOCK)
        which = np.searchsorted(np.cumsum(self.quotas), drawn, side="right")
        before = np.empty(BLOCK, dtype=np.int64)
        for of_set in range(len(self.plans)):
            before[which == of_set] = np.arange(self.quotas[of_set])
        return which, before


def _quotas(weights: Sequence[float]) -> list[int]:
    """Round the weights to numbers of slots that add up to `BLOCK`."""
    exact = np.array(weights, dtype=np.float64) / np.sum(weights) * BLOCK
    quotas = np.floor(exact).astype(np.int64)
    by_rest = np.argsort(quotas - exact, kind="stable")
    quotas[by_rest[: BLOCK - quotas.sum()]] += 1
    return quotas.tolist()


def training_plan(
    config: DataConfig, shards: ShardSet, seed: int, lanes: int
) -> SamplePlan | MixturePlan:
    """Make the plan of the training sets.

    Raises:
        ValueError: a set is too small, or weights are invalid.
    """

    def plan(first_shard: int, last_shard: int, weights: np.ndarray | None) -> SamplePlan:
        sizes = shards.sizes[first_shard:last_shard]
        return SamplePlan(sizes, seed, lanes, config.shuffle_window, weights)

    weights = [
        shards.weights(number) if config.sampling == "weighted" else None
        for number in range(len(shards.set_shards))
    ]
    if not config.mixture:
        every = [one for one in weights if one is not None]
        joined = np.concatenate(every) if len(every) > 1 else weights[0]
        return plan(0, len(shards.sizes), joined)
    ends = list(accumulate(shards.set_shards))
    starts = [0, *ends[:-1]]
    return MixturePlan([*map(plan, starts, ends, weights)], config.mixture)
