"""The fine-tuning model against the published one: modes, gradients, eight steps."""

from collections.abc import Callable

import pytest

from cavmae.benchmarks.conformance.parts import PARTS as ALL
from cavmae.benchmarks.conformance.parts import Comparison
from cavmae.benchmarks.conformance.tolerances import Deviation

pytestmark = pytest.mark.golden
PARTS = tuple(part for part in ALL if part.startswith("finetune_"))


def test_numbers_are_the_published_ones(
    comparison: Comparison, check_deviations_of: Callable[[list[Deviation]], None]
) -> None:
    check_deviations_of(comparison())
