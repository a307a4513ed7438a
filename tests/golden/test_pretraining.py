"""Pretraining against the published implementation, at full size."""

from collections.abc import Callable

import pytest

from cavmae.benchmarks.conformance.parts import Comparison
from cavmae.benchmarks.conformance.tolerances import Deviation

pytestmark = pytest.mark.golden
PARTS = ("inputs", "weights", "forward", "gradients")


def test_numbers_are_the_published_ones(
    comparison: Comparison, check_deviations_of: Callable[[list[Deviation]], None]
) -> None:
    check_deviations_of(comparison())
