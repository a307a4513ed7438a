"""Ten steps of training against the published implementation, in plain torch."""

from collections.abc import Callable
from pathlib import Path

import pytest

from cavmae.benchmarks.conformance.tiny_train import TinyTrain
from cavmae.benchmarks.conformance.tolerances import Deviation

pytestmark = pytest.mark.golden


def test_training_repeats_the_published_history_and_final_parameters(
    golden_folder: Path, tiny_run: str, check_deviations_of: Callable[[list[Deviation]], None]
) -> None:
    run = TinyTrain.load(golden_folder, tiny_run)
    check_deviations_of(run.check_masks())
    model = run.build()
    history = run.train(model)
    check_deviations_of(run.check_history(history) + run.check_final(model.state_dict()))


def test_parameters_that_stay_are_those_without_gradient(
    golden_folder: Path, tiny_run: str
) -> None:
    run = TinyTrain.load(golden_folder, tiny_run)
    final = run.record["final_parameters"].keys()
    frozen = {n for n, parameter in run.build().named_parameters() if not parameter.requires_grad}
    assert set(run.record["unchanged_parameters"]) == frozen & final
