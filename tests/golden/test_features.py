"""Unmasked retrieval features against the published implementation, at full size."""

from collections.abc import Callable

import pytest
import torch

from cavmae.benchmarks.conformance.cases import fill_from_recipe
from cavmae.benchmarks.conformance.finetune import FinetuneCase
from cavmae.benchmarks.conformance.tolerances import LIMITS, Deviation, array_deviation
from cavmae.trainer.model.cavmae import CAVMAE

pytestmark = [pytest.mark.golden, pytest.mark.slow]


def test_unmasked_embeddings_are_the_published_features(
    finetune_case: FinetuneCase, check_deviations_of: Callable[[list[Deviation]], None]
) -> None:
    # The fine-tuning model's encoders have the names, hence the recipe weights, of ours.
    model = CAVMAE(finetune_case.config)
    fill_from_recipe(model, finetune_case.entry["seed"], finetune_case.entry["pos"])
    audio, image = finetune_case.inputs()
    with torch.no_grad():
        features = {
            "feat_a_mean": model.embed_audio(audio),
            "feat_v_mean": model.embed_video(image),
        }
    check_deviations_of(
        [
            array_deviation(key, value, finetune_case.files[key], LIMITS.array)
            for key, value in features.items()
        ]
    )
