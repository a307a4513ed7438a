"""The training order: a pure function from position to sample, the same on every machine.

Position `p` of the endless order belongs to lane `p % lanes` and to epoch `p // samples`. In each
epoch the shards are permuted and concatenated; the result is cut into one run per lane, and each
run is shuffled within windows of `window` samples. So

- every sample occurs exactly once an epoch, without padding; batches may span two epochs;
- a rank that owns whole lanes (`step_shares.py`) reads a contiguous part of the permuted shards
  once an epoch;
- the order does not depend on ranks, workers or machines, and any position can be computed alone:
  a resume needs a position, not a loader's state.

With weights, samples are concatenated with lengths proportional to them (systematic resampling): an
epoch has as many positions as there are samples, and a sample of `w` times the mean weight has `w`
of them, plus or minus one. Everything else stays the same.

Memory is proportional to the number of shards, plus the windows in use; weights are memory-mapped.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from cavmae.dataloaders.sampling.philox import random_permutation, random_words

MINIMUM_LANES = 64
"""A run has no fewer lanes where its batch allows it, so that later rank counts find whole ones."""
_SHARD_ORDER = 1 << 62
_WEIGHT_OFFSET = 1 << 63
"""Counters of the shard permutations and of the epochs' offsets among the weights start at these,
beyond every position that a run can reach."""


class PlannedSample(NamedTuple):
    """The location of a sample, and its epoch."""

    shard: int
    sample: int
    epoch: int


class _Epoch(NamedTuple):
    """One epoch's permuted shards.

    Attributes:
        shards: `(shards,)` in the order of this epoch.
        ends: `(shards,)` cumulative samples, or cumulative weight.
        run_starts: `(lanes,)` indexes at which the lanes' runs start.
        offset: 0 to 1, of the systematic resampling.
    """

    shards: np.ndarray
    ends: np.ndarray
    run_starts: np.ndarray
    offset: float


class SamplePlan:
    """Orders the samples of one set for a seed and a number of lanes.

    Args:
        shard_sizes: samples in each shard, in the set's order.
        seed: of the run.
        lanes: contiguous parts into which each epoch is cut; see `default_lanes`.
        window: samples of a lane among which the order is shuffled.
        weights: `(samples,)` float, 0 or more: relative frequency of each sample; may be a
            memory-mapped file. None: uniform.

    Raises:
        ValueError: there are fewer samples than lanes, a count is below 1, or weights are invalid.
    """

    def __init__(
        self,
        shard_sizes: Sequence[int],
        seed: int,
        lanes: int,
        window: int,
        weights: np.ndarray | None = None,
    ):
        self.sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.ends = np.cumsum(self.sizes)
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
        self._weights = weights
        self._lengths = self.sizes if weights is None else self._shard_weights(weights)
        self._epoch = lru_cache(2)(self._draw_epoch)
        self._window = lru_cache(2 * lanes)(self._draw_window)

    def _shard_weights(self, weights: np.ndarray) -> np.ndarray:
        """`(shards,)` float64 sum of the weights of each shard's samples."""
        if weights.shape != (self.count,):
            raise ValueError(
                f"weights has shape {weights.shape}; use ({self.count},): one per sample"
            )
        sums = np.empty(len(self.sizes))
        low = 0.0
        for shard, (end, size) in enumerate(zip(self.ends, self.sizes, strict=True)):
            part = weights[end - size : end]
            sums[shard] = part.sum(dtype=np.float64)
            low = min(low, float(part.min(initial=0)))
        if not np.isfinite(sums).all() or low < 0 or sums.sum() <= 0:
            raise ValueError("weights must be finite and 0 or more, and not all 0")
        return sums

    def samples(self, start: int, count: int) -> list[PlannedSample]:
        """Return the samples at positions `start .. start + count - 1`."""
        return self.at(np.arange(start, start + count, dtype=np.int64))

    def at(self, positions: np.ndarray) -> list[PlannedSample]:
        """Return the samples at any positions.

        Args:
            positions: `(count,)` int64, in any order.
        """
        shards = np.empty(len(positions), dtype=np.int64)
        samples = np.empty(len(positions), dtype=np.int64)
        epochs = positions // self.count
        for number in np.unique(epochs).tolist():
            chosen = np.flatnonzero(epochs == number)
            epoch = self._epoch(number)
            index = self._shuffled(number, epoch.run_starts, positions[chosen])
            shards[chosen], samples[chosen] = self._found(epoch, index)
        return [
            PlannedSample(*planned)
            for planned in zip(shards.tolist(), samples.tolist(), epochs.tolist(), strict=True)
        ]

    def _found(self, epoch: _Epoch, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shard and sample at indexes of the epoch."""
        target = index
        if self._weights is not None:
            total = epoch.ends[-1]
            target = (index + epoch.offset) * (total / self.count)
            target = np.minimum(target, np.nextafter(total, 0))
        place = np.searchsorted(epoch.ends, target, side="right")
        shards = epoch.shards[place]
        within = np.maximum(target - (epoch.ends[place] - self._lengths[shards]), 0)
        if self._weights is None:
            return shards, within
        samples = np.empty_like(index)
        for shard in np.unique(shards).tolist():
            chosen = np.flatnonzero(shards == shard)
            end, size = int(self.ends[shard]), int(self.sizes[shard])
            ends = np.cumsum(self._weights[end - size : end], dtype=np.float64)
            last = np.searchsorted(ends, ends[-1])  # Rounding must not lead to a weight of 0.
            found = np.searchsorted(ends, within[chosen], side="right")
            samples[chosen] = np.minimum(found, last)
        return shards, samples

    def substitute(self, position: int, attempt: int) -> PlannedSample:
        """Draw any sample of the set for a position whose planned sample, and `attempt` earlier
        substitutes, are in quarantine."""
        shard, sample = any_sample(self.ends, self.seed, "substitute", position, attempt)
        return PlannedSample(shard, sample, position // self.count)

    def _draw_epoch(self, number: int) -> _Epoch:
        order = random_permutation(self.seed, "order", _SHARD_ORDER + number, len(self.sizes))
        # The lane of the epoch's first position turns with the epoch when lanes do not divide
        # the set, so the lanes that are one sample longer do too.
        distance = (np.arange(self.lanes) - number * self.count) % self.lanes
        lengths = (self.count - distance + self.lanes - 1) // self.lanes
        word = random_words(self.seed, "order", _WEIGHT_OFFSET + number, 1)[0]
        return _Epoch(
            order,
            np.cumsum(self._lengths[order]),
            np.cumsum(lengths) - lengths,
            float(word) / 2**32,
        )

    def _shuffled(self, epoch: int, run_starts: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Index of each position of one epoch in its concatenated shards."""
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
            shuffled[chosen] = permutation[in_run[chosen] % self.window]
            shuffled[chosen] += start
        return shuffled

    def _draw_window(self, epoch: int, start: int, length: int) -> np.ndarray:
        """Draw the permutation of one window, which begins at index `start` of the epoch."""
        permutation = random_permutation(self.seed, "order", epoch * self.count + start, length)
        return permutation.astype(np.min_scalar_type(length))


def any_sample(
    ends: np.ndarray, seed: int, stream: str, position: int, attempt: int
) -> tuple[int, int]:
    """Draw any sample of a set for a position and a number of earlier draws at that position.

    Args:
        ends: `(shards,)` cumulative samples.

    Returns:
        Shard and sample.
    """
    block = random_words(seed, stream, position, 4 * (attempt + 1))[-4:]
    index = ((int(block[1]) << 32) | int(block[0])) % int(ends[-1])
    shard = int(np.searchsorted(ends, index, side="right"))
    return shard, index - (int(ends[shard - 1]) if shard else 0)


def default_lanes(global_batch: int, world_size: int) -> int:
    """Return the lanes of a new run: the largest divisor of the global batch up to 64, or up to the
    number of ranks where those are more, of those which the ranks share evenly if there are any."""
    divisors = [
        lanes
        for lanes in range(1, min(global_batch, max(MINIMUM_LANES, world_size)) + 1)
        if global_batch % lanes == 0
    ]
    return max([lanes for lanes in divisors if lanes % world_size == 0] or divisors)
