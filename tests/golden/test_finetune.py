"""The fine-tuning model against the published implementation: modes, gradients, eight steps."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cavmae.benchmarks.conformance.cases import read_json
from cavmae.benchmarks.conformance.finetune import FinetuneCase, FinetuneTraining
from cavmae.benchmarks.conformance.tolerances import LIMITS, Deviation, array_deviation
from cavmae.trainer.model.classifier import CAVMAEClassifier
from cavmae.trainer.model.weights import published_state

pytestmark = pytest.mark.golden
Check = Callable[[list[Deviation]], None]


def test_recorded_inputs_and_targets_are_those_of_the_recipe(
    finetune_case: FinetuneCase, check_deviations_of: Check
) -> None:
    check_deviations_of(finetune_case.input_deviations())


def test_parameters_have_the_published_names_and_shapes(finetune_shapes_case: FinetuneCase) -> None:
    case = finetune_shapes_case
    with torch.device("meta"):
        model = CAVMAEClassifier(case.config, case.entry["label_dim"])
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == read_json(case.shapes_file)
    # The published files were saved under DataParallel.
    exported = {name: list(tensor.shape) for name, tensor in published_state(model).items()}
    assert exported == {f"module.{name}": shape for name, shape in shapes.items()}


@pytest.mark.slow
def test_every_mode_gives_the_published_logits_and_features(
    finetune_case: FinetuneCase, check_deviations_of: Check
) -> None:
    check_deviations_of(finetune_case.deviations(finetune_case.run(finetune_case.build())))


@pytest.mark.slow
def test_the_audio_only_model_gives_the_published_logits(
    finetune_case: FinetuneCase, check_deviations_of: Check
) -> None:
    model = finetune_case.build(video=False)
    with torch.no_grad():
        logits = model(finetune_case.inputs()[0], None, "audioonly").logits
    expected = finetune_case.files["logits_audio_model"]
    check_deviations_of([array_deviation("logits_audio_model", logits, expected, LIMITS.array)])


@pytest.mark.slow
def test_losses_and_gradients_are_the_published_ones(
    finetune_gradient_case: FinetuneCase, check_deviations_of: Check
) -> None:
    model = finetune_gradient_case.build()
    check_deviations_of(finetune_gradient_case.gradient_deviations(model))


@pytest.mark.slow
def test_training_repeats_the_published_history_and_final_parameters(
    finetune_run: Path, check_deviations_of: Check
) -> None:
    run = FinetuneTraining(read_json(finetune_run))
    model = run.build()
    history = run.train(model)
    check_deviations_of(run.deviations(history, model.state_dict()))


def test_parameters_that_stay_are_those_that_get_frozen(finetune_run: Path) -> None:
    run = FinetuneTraining(read_json(finetune_run))
    frozen = {name for name, p in run.build().named_parameters() if not p.requires_grad}
    assert set(run.record["unchanged_parameters"]) == frozen & run.record["final_parameters"].keys()
