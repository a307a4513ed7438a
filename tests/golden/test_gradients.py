"""Gradients of the weighted loss against the published implementation, at full size."""

from collections.abc import Callable

import pytest
import torch

from cavmae.benchmarks.conformance.forward import ForwardCase
from cavmae.benchmarks.conformance.tolerances import Deviation
from cavmae.trainer.model.cavmae import CAVMAE

pytestmark = pytest.mark.golden


@pytest.mark.slow
def test_gradients_are_the_published_ones(
    gradient_case: ForwardCase,
    golden_model: Callable[[ForwardCase], CAVMAE],
    check_deviations_of: Callable[[list[Deviation]], None],
) -> None:
    model = golden_model(gradient_case)
    gradient_case.backward(model)
    check_deviations_of(gradient_case.gradient_deviations(model))
    model.zero_grad(set_to_none=True)


def test_parameters_without_a_published_gradient_are_those_that_get_frozen(
    gradient_case: ForwardCase,
) -> None:
    with torch.device("meta"):
        model = CAVMAE(gradient_case.config)
    model.freeze_unused(
        reconstruct=gradient_case.entry["mae_loss_weight"] != 0,
        contrast=gradient_case.entry["contrast_loss_weight"] != 0,
    )
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, value in gradient_case.gradients.items() if value is None}
