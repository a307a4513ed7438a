"""Ten steps of training, and single functions, against the published implementation."""

from collections.abc import Callable

import pytest

from cavmae.benchmarks.conformance.parts import PARTS as ALL
from cavmae.benchmarks.conformance.parts import Comparison
from cavmae.benchmarks.conformance.tolerances import Deviation

pytestmark = pytest.mark.golden
ELSEWHERE = ("inputs", "weights", "forward", "gradients")
PARTS = [part for part in ALL if part not in ELSEWHERE and not part.startswith("finetune_")]


def test_numbers_are_the_published_ones(
    comparison: Comparison, check_deviations_of: Callable[[list[Deviation]], None]
) -> None:
    check_deviations_of(comparison())
