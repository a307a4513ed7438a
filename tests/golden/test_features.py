"""Unmasked retrieval features against the published implementation, at full size."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cavmae.benchmarks.deviations import LIMITS, Deviation, array_deviation, check_deviations
from cavmae.benchmarks.golden_recipe import fill_from_recipe, recipe_inputs
from cavmae.trainer.model.cavmae import CAVMAE
from cavmae.trainer.model.config import ModelConfig

pytestmark = [pytest.mark.golden, pytest.mark.slow]


def test_unmasked_embeddings_are_the_published_features(
    golden_folder: Path,
    feature_entry: dict[str, Any],
    check_deviations_of: Callable[[list[Deviation]], None],
) -> None:
    # The fine-tuning model's encoders have the names, hence the recipe weights, of ours.
    entry = feature_entry
    config = ModelConfig(audio_frames=entry["audio_length"])
    model = CAVMAE(config)
    fill_from_recipe(model, entry["seed"], entry["pos"])
    audio, image = recipe_inputs(entry["batch"], config, entry["seed"])
    with torch.no_grad():
        features = {
            "feat_a_mean": model.embed_audio(audio),
            "feat_v_mean": model.embed_video(image),
        }
    with np.load(golden_folder / entry["file"]) as files:
        deviations = [
            array_deviation(key, value, files[key], LIMITS.array) for key, value in features.items()
        ]
    deviations += check_deviations("input audio", audio, entry["input_check"]["audio"])
    deviations += check_deviations("input image", image, entry["input_check"]["image"])
    check_deviations_of(deviations)
