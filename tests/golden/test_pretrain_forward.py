"""The forward pass against the published implementation, at full size."""

from collections.abc import Callable
from pathlib import Path

import pytest

from cavmae.benchmarks.conformance.cases import config_from_shapes, read_json, recipe
from cavmae.benchmarks.conformance.forward import ForwardCase
from cavmae.benchmarks.conformance.tolerances import Deviation, check_deviations
from cavmae.trainer.model.cavmae import CAVMAE

pytestmark = pytest.mark.golden
Check = Callable[[list[Deviation]], None]


def test_recorded_inputs_and_masks_are_consistent(
    forward_case: ForwardCase, check_deviations_of: Check
) -> None:
    check_deviations_of(forward_case.input_deviations() + forward_case.mask_deviations())


@pytest.mark.slow
def test_forward_pass_gives_the_published_numbers(
    forward_case: ForwardCase,
    golden_model: Callable[[ForwardCase], CAVMAE],
    check_deviations_of: Check,
) -> None:
    numbers = forward_case.run(golden_model(forward_case))
    check_deviations_of(forward_case.deviations(numbers))


@pytest.mark.slow
def test_parameters_have_the_published_names_shapes_and_recipe_values(
    weights_check: Path, check_deviations_of: Check
) -> None:
    check = read_json(weights_check)
    shapes = {name: tuple(shape) for name, shape in check["shapes"].items()}
    model = CAVMAE(config_from_shapes(shapes))
    state = model.state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == shapes

    assert weights_check.stem.startswith(f"weights_seed{check['seed']}_")
    assert weights_check.stem.endswith(f"_{check['pos']}_check")
    deviations = []
    for name, expected in check["parameter_checks"].items():
        if check["pos"] == "sincos" and "pos_embed" in name:
            deviations += check_deviations(name, state[name], expected)
        else:
            deviations += check_deviations(
                name, recipe(name, shapes[name], check["seed"]), expected
            )
    check_deviations_of(deviations)
