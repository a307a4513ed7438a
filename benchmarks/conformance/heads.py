"""Comparisons of single functions: contrastive loss, scores, patches, position tables."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cavmae.benchmarks.conformance.cases import noise
from cavmae.benchmarks.conformance.tolerances import (
    LIMITS,
    Deviation,
    array_deviation,
    check_deviations,
    mismatches,
    relative,
)
from cavmae.kernels import contrastive_loss, gather_patches, masked_reconstruction_loss
from cavmae.trainer.metrics.classification import classification_scores, mean_over_frames
from cavmae.trainer.metrics.retrieval import RetrievalScores, retrieval_scores, similarity_scores
from cavmae.trainer.model.pos_embed import position_table


def contrastive_deviations(_folder: Path, entry: Mapping[str, Any]) -> list[Deviation]:
    """Compare the contrastive head on batches larger than the full model's."""
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
    return deviations


def retrieval_deviations(folder: Path, entry: Mapping[str, Any]) -> list[Deviation]:
    """Compare recall and median rank, the published treatment of ties included."""
    if "features" in entry:
        shape, seed = (60, 64), entry["seed"]
        audio = noise("retrieval.audio", shape, seed).astype(np.float32)
        video = (noise("retrieval.video", shape, seed) + 0.3 * audio).astype(np.float32)
        scores = retrieval_scores(torch.from_numpy(audio), torch.from_numpy(video), chunk=25)
        pairs = [(result, entry[direction]) for direction, result in scores.items()]
    else:
        if "matrix" in entry:
            with np.load(folder / "retrieval_matrices.npz") as matrices:
                similarity = torch.from_numpy(matrices[entry["matrix"]])
        else:
            similarity = torch.tensor(entry["matrix_inline"])
        pairs = [(similarity_scores(similarity), entry["rows_query"])]
        if "columns_query" in entry:
            pairs.append((similarity_scores(similarity.T), entry["columns_query"]))
    return [deviation for pair in pairs for deviation in _score_deviations(*pair)]


def _score_deviations(scores: RetrievalScores, expected: Mapping[str, float]) -> list[Deviation]:
    measured = {
        "R1": scores.r1.value,
        "R5": scores.r5.value,
        "R10": scores.r10.value,
        "MR": scores.median_rank,
    }
    return [
        Deviation("names of scores", len(measured.keys() ^ expected.keys()), 0),
        *(relative(key, value, expected[key], LIMITS.score) for key, value in measured.items()),
    ]


def classification_deviations(_folder: Path, entry: Mapping[str, Any]) -> list[Deviation]:
    """Compare classification scores on clips with one label or (entries with `K`) several."""
    seed = entry["seed"]
    if "K" not in entry:
        target = np.eye(10)[noise("stats.single", (100, 10), seed).argmax(axis=1)]
        output = noise("stats.single_out", (100, 10), seed) + 1.5 * target
    else:
        shape = (entry["N"], entry["K"])
        target = (noise(f"stats.target{entry['K']}", shape, seed) > 1.2).astype(np.float32)
        output = noise(f"stats.output{entry['K']}", shape, seed) + 1.2 * target
    output = output.astype(np.float32)
    targets = torch.from_numpy(target)
    scores = classification_scores(torch.from_numpy(output), targets, resamples=2)
    deviations = check_deviations("output", output, entry["output_check"])
    if "K" not in entry:
        accuracy = entry["single_label_acc"]
        return [*deviations, relative("accuracy", scores.accuracy.value, accuracy, LIMITS.score)]
    frames = [
        output + 0.5 * noise(f"stats.frame{i}", output.shape, seed).astype(np.float32)
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
    return [
        *deviations,
        *check_deviations("target", target, entry["target_check"]),
        *(relative(key, value, entry[key], LIMITS.score) for key, value in measured.items()),
        *(
            array_deviation(key, np.array(value), entry[key], LIMITS.score)
            for key, value in (("AP", scores.average_precision), ("auc", scores.auc))
        ),
    ]


def patch_deviations(path: Path) -> list[Deviation]:
    """Compare the order of values in a patch and of patches in a grid."""
    with np.load(path) as arrays:
        files = dict(arrays)
    deviations = []
    for kind in ("image", "audio"):
        pixels = torch.from_numpy(files[kind]).float()
        expected = torch.from_numpy(files[f"{kind}_patches"]).float()
        ids = torch.arange(expected.shape[1]).expand(len(pixels), -1)
        patches = gather_patches(pixels, ids).unflatten(2, (pixels.shape[1], 16, 16))
        patches = patches.permute(0, 1, 3, 4, 2).flatten(2)  # row, column, channel
        loss = masked_reconstruction_loss(expected, pixels, ids, norm_pix=False)
        deviations += [
            mismatches(f"{kind} patches", patches.numpy(), expected.numpy()),
            # The published patches are the targets of the loss: predicting them costs nothing.
            Deviation(f"{kind} reconstruction loss", float(loss), 0),
        ]
    return deviations


def position_deviations(path: Path) -> list[Deviation]:
    """Compare the fixed position tables of one audio length."""
    audio_columns = int(path.stem.partition("_T")[2]) // 16
    with np.load(path) as arrays:
        files = dict(arrays)
    deviations = []
    for name, expected in files.items():
        tokens, channels = expected.shape
        side = round(tokens**0.5)
        grid = (tokens // audio_columns, audio_columns) if name.endswith("_a") else (side, side)
        table = position_table(8 * channels, grid)[0, :, ::8]
        deviations.append(array_deviation(name, table, expected, LIMITS.position))
    return deviations
