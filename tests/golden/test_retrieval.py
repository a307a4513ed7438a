"""Recall and median rank against the published evaluation, its treatment of ties included."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cavmae.benchmarks.conformance.cases import noise
from cavmae.benchmarks.conformance.tolerances import Deviation, relative
from cavmae.trainer.metrics.retrieval import RetrievalScores, retrieval_scores, similarity_scores

pytestmark = pytest.mark.golden


def deviations(scores: RetrievalScores, expected: dict[str, float]) -> list[Deviation]:
    measured = {
        "R1": scores.r1.value,
        "R5": scores.r5.value,
        "R10": scores.r10.value,
        "MR": scores.median_rank,
    }
    assert measured.keys() == expected.keys()
    return [relative(key, value, expected[key], 1e-12) for key, value in measured.items()]


def test_retrieval_scores_are_the_published_ones(
    golden_folder: Path,
    retrieval_entry: dict[str, Any],
    check_deviations_of: Callable[[list[Deviation]], None],
) -> None:
    entry = retrieval_entry
    if "features" in entry:
        shape, seed = (60, 64), entry["seed"]
        audio = noise("retrieval.audio", shape, seed).astype(np.float32)
        video = (noise("retrieval.video", shape, seed) + 0.3 * audio).astype(np.float32)
        scores = retrieval_scores(torch.from_numpy(audio), torch.from_numpy(video), chunk=25)
        found = [
            deviation
            for direction, result in scores.items()
            for deviation in deviations(result, entry[direction])
        ]
    else:
        if "matrix" in entry:
            with np.load(golden_folder / "retrieval_matrices.npz") as matrices:
                similarity = torch.from_numpy(matrices[entry["matrix"]])
        else:
            similarity = torch.tensor(entry["matrix_inline"])
        found = deviations(similarity_scores(similarity), entry["rows_query"])
        if "columns_query" in entry:
            found += deviations(similarity_scores(similarity.T), entry["columns_query"])
    check_deviations_of(found)
