"""Classification scores against the published evaluation."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from cavmae.benchmarks.conformance.cases import noise
from cavmae.benchmarks.conformance.tolerances import (
    Deviation,
    array_deviation,
    check_deviations,
    relative,
)
from cavmae.trainer.metrics.classification import classification_scores, mean_over_frames

pytestmark = pytest.mark.golden
LIMIT = 1e-12  # both are float64 sums of the same ranks


def single_label_clips(entry: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """(100, 10) scores and targets."""
    shape, seed = (100, 10), entry["seed"]
    target = np.eye(10)[noise("stats.single", shape, seed).argmax(axis=1)]
    return noise("stats.single_out", shape, seed) + 1.5 * target, target


def multi_label_clips(entry: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """(N, K) scores and targets."""
    shape, seed = (entry["N"], entry["K"]), entry["seed"]
    target = (noise(f"stats.target{entry['K']}", shape, seed) > 1.2).astype(np.float32)
    return noise(f"stats.output{entry['K']}", shape, seed) + 1.2 * target, target


def test_classification_scores_are_the_published_ones(
    classification_entry: dict[str, Any], check_deviations_of: Callable[[list[Deviation]], None]
) -> None:
    entry = classification_entry
    output, target = multi_label_clips(entry) if "K" in entry else single_label_clips(entry)
    output = output.astype(np.float32)
    targets = torch.from_numpy(target)
    scores = classification_scores(torch.from_numpy(output), targets, resamples=2)
    deviations = check_deviations("output", output, entry["output_check"])
    if "K" not in entry:
        accuracy = entry["single_label_acc"]
        deviations.append(relative("accuracy", scores.accuracy.value, accuracy, LIMIT))
        check_deviations_of(deviations)
        return
    frames = [
        output + 0.5 * noise(f"stats.frame{i}", output.shape, entry["seed"]).astype(np.float32)
        for i in range(3)
    ]
    probabilities = mean_over_frames(torch.from_numpy(np.stack(frames)), "bce")
    multi_frame = classification_scores(probabilities, targets, resamples=2)
    measured = {
        "mAP": scores.mean_average_precision.value,
        "mAUC": scores.mean_auc.value,
        "d_prime": scores.d_prime.value,
        "acc": scores.accuracy.value,
        "multiframe_sigmoid_mean_mAP": multi_frame.mean_average_precision.value,
    }
    deviations += check_deviations("target", target, entry["target_check"])
    deviations += [relative(key, value, entry[key], LIMIT) for key, value in measured.items()]
    deviations += [
        array_deviation(key, np.array(value), entry[key], LIMIT)
        for key, value in (("AP", scores.average_precision), ("auc", scores.auc))
    ]
    check_deviations_of(deviations)
