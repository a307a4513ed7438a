"""Deviations of results from their references, and their limits.

All tolerances of the conformance tests are here, in `Limits`; tests, `cavmae bench golden` and the
GPU check share them.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Limits:
    """Largest deviations allowed in float32 on one machine, from the golden README, section 3.

    The README gives none for sums and single values of gradients; those here are about ten times
    what was observed.
    """

    check: float = 1e-9
    """Sum and norm of a tensor built from the recipe: both are float64 sums of equal values."""
    position: float = 1e-7
    """Largest difference of a position table: float32 rounding of values up to 1."""
    loss: float = 5e-6
    """Loss of one forward pass, relative."""
    accuracy: float = 1e-6
    """Share of pairs ranked first, absolute."""
    array: float = 1e-5
    """Largest difference of two arrays over the largest reference value."""
    gradient_norm: float = 1e-4
    """L2 norm of a parameter's gradient, relative."""
    gradient_value: float = 2e-3
    """Single value of a gradient: difference over the larger of it and a fifth of the RMS."""
    gradient_sum: float = 3e-4
    """Sum of a gradient: difference over the larger of the sum and the norm."""
    gradient_cancelling: float = 10.0
    """Factor on the three above for `norm_a.bias` and `norm_v.bias`: the samples of a batch pull
    them in opposite directions, and only about 1e-3 of each pull is left."""
    score: float = 1e-12
    """Retrieval or classification score, relative: both are float64 sums of the same ranks."""
    training_loss: float = 2e-6
    """Loss at a step of the tiny training, relative."""
    training_norm: float = 2e-4
    """L2 norm of a trained parameter, relative."""
    training_sum: float = 2e-4
    """Sum of a trained parameter: difference over the larger of the sum and the norm."""
    training_value: float = 1e-4
    """Single values of a trained parameter, absolute."""


LIMITS = Limits()


@dataclass(frozen=True)
class Deviation:
    """The deviation of one quantity from its reference, and its limit."""

    quantity: str
    value: float
    limit: float

    @property
    def within(self) -> bool:
        # Written so that a deviation that is not a number is never within.
        return self.value <= self.limit

    @property
    def share(self) -> float:
        """The deviation as a share of its limit; anything above a limit of 0 is infinite."""
        if self.limit == 0:
            return 0.0 if self.value == 0 else float("inf")
        return self.value / self.limit

    def __str__(self) -> str:
        return f"{self.quantity}: {self.value:.2e} (limit {self.limit:.0e})"


def worst(deviations: Iterable[Deviation]) -> Deviation:
    """Return the deviation that is nearest to its limit or furthest beyond it."""
    return max(deviations, key=lambda d: float("inf") if d.share != d.share else d.share)


def relative(quantity: str, measured: float, expected: float, limit: float) -> Deviation:
    """`|measured - expected| / |expected|`; a reference of exactly 0 must be met exactly."""
    if expected == 0:
        return Deviation(quantity, 0.0 if measured == 0 else float("inf"), limit)
    return Deviation(quantity, abs(measured - expected) / abs(expected), limit)


def array_deviation(
    quantity: str,
    measured: torch.Tensor | np.ndarray,
    expected: np.ndarray | Sequence[float],
    limit: float,
) -> Deviation:
    """Largest difference over the largest reference value; infinite where the shapes differ."""
    if isinstance(measured, torch.Tensor):
        measured = measured.detach().cpu().double().numpy()
    measured, expected = np.asarray(measured, np.float64), np.asarray(expected, np.float64)
    if measured.shape != expected.shape:
        return Deviation(
            f"{quantity} has shape {measured.shape}, not {expected.shape}", float("inf"), limit
        )
    difference, scale = float(np.abs(measured - expected).max()), float(np.abs(expected).max())
    return Deviation(quantity, difference / scale if scale else difference, limit)


def recorded_deviation(
    quantity: str, key: str, arrays: Mapping[str, torch.Tensor], expected: np.ndarray
) -> Deviation:
    """An array against the recorded one, or where the key ends in `_s16` each 16th of both axes."""
    measured = arrays[key.removesuffix("_s16")]
    if key.endswith("_s16"):
        measured = measured[:, ::16, ::16]
    return array_deviation(quantity, measured, expected, LIMITS.array)


def value_deviation(
    quantity: str, measured: np.ndarray, expected: Sequence[float], floor: float, limit: float
) -> Deviation:
    """Largest difference of single values, each over the larger of its reference and `floor`."""
    reference = np.array(expected, np.float64)
    if measured.shape != reference.shape:
        return Deviation(quantity, float("inf"), limit)
    scale = np.maximum(np.abs(reference), floor)
    return Deviation(quantity, float((np.abs(measured - reference) / scale).max()), limit)


def mismatches(quantity: str, measured: np.ndarray, expected: np.ndarray) -> Deviation:
    """Number of entries that are not equal; infinite where the shapes differ."""
    if measured.shape != expected.shape:
        return Deviation(quantity, float("inf"), 0)
    return Deviation(quantity, float((measured != expected).sum()), 0)


def sum_deviation(
    quantity: str, measured: float, expected: float, norm: float, limit: float
) -> Deviation:
    """Difference of sums over the larger of the sum and the norm: the digits of a sum near 0 are
    cancellation."""
    scale, difference = max(abs(expected), norm), abs(measured - expected)
    return Deviation(quantity, difference / scale if scale else difference, limit)


def check_deviations(
    name: str, tensor: torch.Tensor | np.ndarray, expected: Mapping[str, Any]
) -> list[Deviation]:
    """A tensor against its recorded sum, L2 norm and first four values, in float64."""
    if isinstance(tensor, torch.Tensor):
        tensor = tensor.detach().cpu().numpy()
    values = tensor.astype(np.float64).ravel()
    norm = float(np.sqrt(np.square(values).sum()))
    return [
        sum_deviation(f"{name} sum", float(values.sum()), expected["sum"], norm, LIMITS.check),
        relative(f"{name} l2", norm, expected["l2"], LIMITS.check),
        mismatches(f"{name} first4", values[:4], np.array(expected["first4"])),
    ]
