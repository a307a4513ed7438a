"""The contrastive head alone, on larger batches than the full model's cases."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from cavmae.benchmarks.conformance.cases import noise
from cavmae.benchmarks.conformance.tolerances import LIMITS, Deviation, check_deviations, relative
from cavmae.kernels import contrastive_loss

pytestmark = pytest.mark.golden


def test_contrastive_loss_and_accuracy_are_the_published_ones(
    contrastive_entry: dict[str, Any], check_deviations_of: Callable[[list[Deviation]], None]
) -> None:
    entry = contrastive_entry
    shape, seed = (entry["batch"], entry["dim"]), entry["seed"]
    audio = noise("contrastive.audio", shape, seed).astype(np.float32)
    video = noise("contrastive.video", shape, seed).astype(np.float32)
    video = (0.15 * audio + video).astype(np.float32)
    deviations = check_deviations("video", video, entry["check_video"])
    for kind, bidirectional in (("single", False), ("bidirect", True)):
        result = contrastive_loss(
            torch.from_numpy(audio), torch.from_numpy(video), 0.05, bidirectional
        )
        loss, accuracy = entry[f"nce_{kind}"], entry[f"acc_{kind}"]
        deviations += [
            relative(f"nce_{kind}", float(result.loss), loss, LIMITS.loss),
            Deviation(f"acc_{kind}", abs(float(result.accuracy) - accuracy), LIMITS.accuracy),
        ]
    check_deviations_of(deviations)
