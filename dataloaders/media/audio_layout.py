"""Places the blocks of a sound by their time stamps, which tell less than the samples do.

Samples that a decoder gives one after the other are a sound without holes. Stamps are rounded,
wobble by tens of milliseconds in recordings, are wrong by a factor in broken files; yet they alone
tell of a pause, of samples twice, and of a clock that runs faster than the one of the pictures. So
a shift counts where it comes at once and stays; slow drift up to 2% is followed; all else is noise.
"""

from dataclasses import dataclass

import numpy as np

SMALLEST_SHIFT_SECONDS = 0.005
"""Shifts up to this are not told from noise."""
ROUNDING_SECONDS = 0.001
"""Containers round stamps to a millisecond; the first of a run stands if it differs by no more."""
NEIGHBOURS = 16
"""Blocks on each side of a shift over whose stamps the median is taken."""
STAYING_BLOCKS = 3
STAYING_SECONDS = 0.2
"""A shift stays if so many blocks, or as much sound, have it."""
ANCHORS = 9
"""First stamps that say together where a sound begins, so that one wrong one does not."""
MAXIMUM_DRIFT = 0.02
"""Beyond it, the samples are right and the stamps wrong."""
MAXIMUM_OVERLAP_SECONDS = 1.0
"""Stamps that go back by more are wrong: the sound goes on where it is."""


@dataclass(frozen=True)
class AudioLayout:
    """Where blocks of samples lie on the timeline."""

    hz: int
    """Samples per second of the timeline: the stated rate, corrected by the drift."""
    starts: list[int]
    """First block of each unbroken run of blocks."""
    positions: list[int]
    """Position of each run's first sample, at `hz`."""
    disagree: bool
    """Whether stamps and samples differ by more than a drift."""


def lay_out(stated: np.ndarray, lengths: np.ndarray, hz: int) -> AudioLayout:
    """Find the unbroken runs of blocks, and the place of each.

    Args:
        stated: `(blocks,)` float64 seconds, from the stamps; NaN where there is none.
        lengths: `(blocks,)` int64, samples of each block.
        hz: stated samples per second.
    """
    known = np.isfinite(stated)
    if not known.any():
        return AudioLayout(hz, [0], [0], disagree=False)
    heard = (np.cumsum(lengths) - lengths) / hz
    shift = np.interp(heard, heard[known], (stated - heard)[known])
    starts = _shifts(shift, lengths / hz)
    drift = _drift(heard, shift, starts)
    disagree = abs(drift) > MAXIMUM_DRIFT
    if disagree:
        return AudioLayout(hz, [0], [round(first_shift(shift) * hz)], disagree=True)
    actual_hz = round(hz / (1 + drift))
    heard *= hz / actual_hz
    unbroken, positions = [], []
    for first, end in zip(starts, [*starts[1:], len(shift)], strict=True):
        offsets = (stated - heard)[first:end][known[first:end]]
        offset = float(np.median(offsets))
        if abs(offsets[0] - offset) < ROUNDING_SECONDS:
            offset = float(offsets[0])
        position = round((heard[first] + offset) * actual_hz)
        if unbroken:
            reached = positions[-1] + lengths[unbroken[-1] : first].sum()
            if position < reached - MAXIMUM_OVERLAP_SECONDS * actual_hz:
                continue  # The sound goes on where it is.
        unbroken.append(first)
        positions.append(position)
    return AudioLayout(actual_hz, unbroken, positions, disagree=len(unbroken) < len(starts))


def first_shift(shift: np.ndarray) -> float:
    """Where a sound begins, by its first stamps.

    Args:
        shift: `(blocks,)` seconds, each stamp less the sound before it; these grow by as much from
            block to block where the stamps are wrong by a factor.
    """
    shift = shift[:ANCHORS]
    growth = float(np.median(np.diff(shift))) if len(shift) > 1 else 0.0
    return float(np.median(shift - growth * np.arange(len(shift))))


def _shifts(shift: np.ndarray, seconds: np.ndarray) -> list[int]:
    """First blocks of runs that are shifted against the one before, at once and to stay."""
    starts = [0]
    for block in np.nonzero(np.abs(np.diff(shift)) > SMALLEST_SHIFT_SECONDS / 2)[0] + 1:
        before = shift[max(starts[-1], block - NEIGHBOURS) : block]
        after = shift[block : block + NEIGHBOURS]
        step, jump = float(np.median(after) - np.median(before)), shift[block] - shift[block - 1]
        around = shift[max(0, block - NEIGHBOURS) : block + NEIGHBOURS]
        noise = float(np.median(np.abs(np.diff(around))))
        if (
            abs(step) > SMALLEST_SHIFT_SECONDS + 2.5 * noise
            and jump / step > 0.5
            and _stays(seconds[block:])
            and _stays(seconds[starts[-1] : block])
        ):
            starts.append(int(block))
    return starts


def _stays(seconds: np.ndarray) -> bool:
    return len(seconds) >= STAYING_BLOCKS or float(seconds.sum()) >= STAYING_SECONDS


def _drift(heard: np.ndarray, shift: np.ndarray, starts: list[int]) -> float:
    """Seconds that stamps gain on samples in a second; 0 where noise explains it."""
    runs = list(zip(starts, [*starts[1:], len(shift)], strict=True))
    x = np.concatenate([heard[a:b] - heard[a:b].mean() for a, b in runs])
    y = np.concatenate([shift[a:b] - np.median(shift[a:b]) for a, b in runs])
    spread = np.abs(y - np.median(y))
    usual = spread <= 5 * np.median(spread) + 1e-3
    x, y = x[usual], y[usual]
    if len(x) < 2 or not (span := float(x.max() - x.min())):
        return 0.0
    y = y - y.mean()
    drift = float((x * y).sum() / (x * x).sum())
    explained = 1 - float(((y - drift * x) ** 2).sum()) / max(float((y * y).sum()), 1e-18)
    return drift if abs(drift) * span > SMALLEST_SHIFT_SECONDS and explained > 0.75 else 0.0
