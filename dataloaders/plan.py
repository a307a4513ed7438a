"""Which sample is at which place of the training order: a pure function, the same on every machine.

Position `p` of the endless order belongs to lane `p % lanes` and to epoch `p // samples`. In each
epoch the shards are permuted and laid end to end; the result is cut into one run per lane, and each
run is shuffled within windows of `window` samples. So

- every sample comes exactly once an epoch, without padding; batches may straddle epochs;
- a rank owns whole lanes, hence reads a contiguous part of the permuted shards once an epoch;
- the order does not depend on ranks, workers or machines, and any position can be computed alone:
  a restart needs a position, not a loader's state.

Memory is proportional to the number of shards, plus the windows in use.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cavmae.dataloaders.random_streams import random_permutation, random_words

MAXIMUM_LANES = 64
_SHARD_ORDER = 1 << 62
"""Counters of the shard permutations start here, beyond every position that a run can reach."""


@dataclass(frozen=True)
class PlannedSample:
    """Where a sample is read, and in which epoch."""

    shard: int
    sample: int
    epoch: int


class SamplePlan:
    """The order of samples for one set, seed and number of lanes.

    Args:
        shard_sizes: samples in each shard, in the set's order.
        seed: of the run.
        lanes: contiguous parts into which each epoch is cut; see `default_lanes`.
        window: samples of a lane among which the order is shuffled.

    Raises:
        ValueError: fewer samples than lanes, or a count below 1.
    """

    def __init__(self, shard_sizes: Sequence[int], seed: int, lanes: int, window: int):
        self.sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.count = int(self.sizes.sum())
        if lanes < 1:
            raise ValueError(f"lanes is {lanes}; use 1 or more")
        if window < 1:
            raise ValueError(f"shuffle_window is {window}; use 1 or more")
        if self.count < lanes:
            raise ValueError(
                f"the set has {self.count} samples, fewer than lanes = {lanes}; "
                f"pack more clips or set lanes to {max(self.count, 1)} or less"
            )
        self.seed = seed
        self.lanes = lanes
        self.window = window
        self._epochs: OrderedDict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def sample(self, position: int) -> PlannedSample:
        """The sample at one position."""
        return self.samples(position, 1)[0]

    def samples(self, start: int, count: int) -> list[PlannedSample]:
        """The samples at positions `start .. start + count - 1`."""
        return self.at(np.arange(start, start + count, dtype=np.int64))

    def at(self, positions: np.ndarray) -> list[PlannedSample]:
        """The samples at any positions.

        Args:
            positions: `(count,)` int64, in any order.
        """
        shards = np.empty(len(positions), dtype=np.int64)
        samples = np.empty(len(positions), dtype=np.int64)
        epochs = positions // self.count
        for epoch in np.unique(epochs).tolist():
            chosen = np.flatnonzero(epochs == epoch)
            order, ends, run_starts = self._epoch(epoch)
            index = self._shuffled(epoch, run_starts, positions[chosen])
            place = np.searchsorted(ends, index, side="right")
            shards[chosen] = order[place]
            samples[chosen] = index - (ends[place] - self.sizes[order[place]])
        return [
            PlannedSample(*planned)
            for planned in zip(shards.tolist(), samples.tolist(), epochs.tolist(), strict=True)
        ]

    def substitute(self, position: int, attempt: int) -> PlannedSample:
        """What is read at `position` when the planned sample, and `attempt` substitutes before
        this one, are in quarantine: any sample of the set, drawn for the position."""
        block = random_words(self.seed, "substitute", position, 4 * (attempt + 1))[-4:]
        index = ((int(block[1]) << 32) | int(block[0])) % self.count
        ends = np.cumsum(self.sizes)
        shard = int(np.searchsorted(ends, index, side="right"))
        return PlannedSample(
            shard, index - int(ends[shard] - self.sizes[shard]), position // self.count
        )

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of one epoch: the permuted shards, where each ends, and where each lane's run starts."""
        if epoch not in self._epochs:
            order = random_permutation(self.seed, "order", _SHARD_ORDER + epoch, len(self.sizes))
            ends = np.cumsum(self.sizes[order])
            # The lane of the epoch's first position turns with the epoch when lanes do not divide
            # the set, so the lanes that are one sample longer do too.
            distance = (np.arange(self.lanes) - epoch * self.count) % self.lanes
            lengths = (self.count - distance + self.lanes - 1) // self.lanes
            self._epochs[epoch] = (order, ends, np.cumsum(lengths) - lengths)
            if len(self._epochs) > 2:
                self._epochs.popitem(last=False)
        return self._epochs[epoch]

    def _shuffled(self, epoch: int, run_starts: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Place of each position of one epoch in its permuted shards laid end to end."""
        first = epoch * self.count
        lanes = positions % self.lanes
        in_run = (positions - (first + (lanes - first) % self.lanes)) // self.lanes
        windows = run_starts[lanes] + in_run // self.window * self.window
        shuffled = np.empty(len(positions), dtype=np.int64)
        by_window = np.argsort(windows, kind="stable")
        cuts = np.flatnonzero(np.diff(windows[by_window])) + 1
        for chosen in np.split(by_window, cuts):
            lane = int(lanes[chosen[0]])
            start = int(windows[chosen[0]])
            run_end = int(run_starts[lane + 1]) if lane + 1 < self.lanes else self.count
            permutation = self._window(epoch, start, min(self.window, run_end - start))
            shuffled[chosen] = start + permutation[in_run[chosen] % self.window]
        return shuffled

    def _window(self, epoch: int, start: int, length: int) -> np.ndarray:
        """The permutation of one window, which begins at place `start` of the epoch."""
        name = (epoch, start)
        if name in self._windows:
            self._windows.move_to_end(name)
        else:
            self._windows[name] = random_permutation(
                self.seed, "order", epoch * self.count + start, length
            )
            if len(self._windows) > 2 * self.lanes:
                self._windows.popitem(last=False)
        return self._windows[name]


def default_lanes(global_batch: int) -> int:
    """The largest divisor of the global batch up to 64."""
    return max(
        lanes
        for lanes in range(1, min(global_batch, MAXIMUM_LANES) + 1)
        if global_batch % lanes == 0
    )


def check_ranks(lanes: int, world_size: int) -> None:
    """Refuse a number of ranks that does not divide the lanes.

    Raises:
        ValueError: names the next number of ranks that does.
    """
    if world_size < 1 or lanes % world_size:
        next_count = next(
            (count for count in range(max(world_size, 1), lanes + 1) if lanes % count == 0), lanes
        )
        raise ValueError(
            f"world_size is {world_size}, which does not divide the run's {lanes} lanes; "
            f"use {next_count} ranks"
        )


def rank_positions(
    step: int, rank: int, world_size: int, global_batch: int, lanes: int
) -> np.ndarray:
    """Positions of one rank in one optimizer step, ascending.

    Returns:
        `(global_batch // world_size,)` int64: all `p` of the step with `p % lanes` in the rank's
        lanes.

    Raises:
        ValueError: lanes do not divide the global batch, or ranks the lanes.
    """
    check_ranks(lanes, world_size)
    if global_batch % lanes:
        raise ValueError(
            f"lanes is {lanes}, which does not divide global_batch = {global_batch}; "
            f"use {default_lanes(global_batch)}"
        )
    owned = lanes // world_size
    rows = np.arange(global_batch, dtype=np.int64).reshape(-1, lanes)
    return step * global_batch + rows[:, rank * owned : (rank + 1) * owned].reshape(-1)
