"""Writes the statistics, sampling weights and duplicates of a set when all shards are packed.

Everything comes from the reports of finished shards, read one by one; memory grows by two numbers
a clip.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from cavmae.atomic_write import atomic_write, read_json, write_json, write_text
from cavmae.dataloaders.media.audio_codec import decode_audio
from cavmae.dataloaders.packing.duplicates import KnownContent, OtherSets
from cavmae.dataloaders.packing.output_folder import finished_reports
from cavmae.dataloaders.sampling.philox import random_permutation
from cavmae.dataloaders.shards.shard_set import ShardSet
from cavmae.dataloaders.shards.storage import real_place

LOG_MEL_CLIPS = 500
"""Number of randomly drawn clips for the mean and std of the log-mel."""
MEL_BINS = 128


def write_statistics(out: Path, tiers: tuple[str, ...], others: OtherSets | None) -> dict[str, Any]:
    """Write `statistics.json`, `duplicates.jsonl` and each tier's `weights.npy`.

    Args:
        out: folder whose tiers are complete.
        tiers: names of the tiers.
        others: sets whose clips shared with this one are counted.

    Returns:
        The content of `statistics.json`.
    """
    classes: Counter[str] = Counter()
    codecs: Counter[str] = Counter()
    timing: Counter[str] = Counter()
    known = KnownContent()
    duplicates: list[dict[str, str]] = []
    cropped: list[float] = []
    clips = unlabelled = shared = 0
    seconds = 0.0
    for report in finished_reports(out):
        seconds += report["seconds"]
        for clip in report["packed"]:
            clips += 1
            classes.update(clip["labels"])
            codecs.update([clip["codec"]] if clip["codec"] else [])
            timing.update(clip["timing"].keys())
            cropped.append(clip["cropped"])
            unlabelled += not clip["labels"]
            first = known.add(clip["content"], int(clip["key"]))
            if first is not None:
                duplicates.append({"key": clip["key"], "first": f"{first:09d}"})
            shared += others is not None and others.shares(clip["source"], clip["content"])
    text = "".join(json.dumps(line) + "\n" for line in duplicates)
    write_text(out / "duplicates.jsonl", text)
    shards = ShardSet(out / tiers[0])
    statistics = {
        "content_sha256": shards.content_sha256[0],
        "clips": clips,
        "seconds": seconds,
        "source_codecs": dict(codecs.most_common()),
        "timing": dict(timing.most_common()),
        "cropped": crop_statistics(cropped),
        "classes": dict(classes.most_common()),
        "clips_without_label": unlabelled,
        "duplicates": len(duplicates),
        "clips_in_not_in": shared,
        "log_mel": None if shards.modality == "video" else _log_mel_statistics(shards),
        "weights": None
        if unlabelled
        else "weights.npy of each tier: sum over a clip's labels of 1000 / (count + 0.01)",
    }
    for tier in tiers:
        (out / tier / "weights.npy").unlink(missing_ok=True)
        if not unlabelled:
            path = out / tier / "weights.npy"
            with atomic_write(path) as temporary, temporary.open("wb") as file:
                np.save(file, _weights(out, classes, clips), allow_pickle=False)
    write_json(out / "statistics.json", statistics)
    return statistics


def crop_statistics(fractions: list[float]) -> dict[str, float]:
    """Of the fraction of each clip's picture that the `video` tier lacks: the number of clips that
    lack any, the mean over all clips, and the largest."""
    return {
        "clips": sum(fraction > 0 for fraction in fractions),
        "mean": float(np.mean(fractions)),
        "max": max(fractions),
    }


def read_statistics(tier: str | Path) -> dict[str, Any] | None:
    """Read what packing counted of the clips of a tier; None where that is not beside the tier, as
    for a copy of the tier alone, even if it lies in another set's folder.

    Raises:
        OSError, ValueError: a file cannot be read.
    """
    path = Path(real_place(str(tier))).parent / "statistics.json"
    if not path.is_file():
        return None
    statistics = read_json(path)
    of_tier = ShardSet(tier).content_sha256[0]
    return statistics if statistics.get("content_sha256") == of_tier else None


def _weights(out: Path, classes: Counter[str], clips: int) -> np.ndarray:
    """Compute `(clips,)` float32 weights like the published `gen_weight_file.py`."""
    of_class = {name: 1000 / (count + 0.01) for name, count in classes.items()}
    packed = (clip for report in finished_reports(out) for clip in report["packed"])
    return np.fromiter(
        (sum(of_class[label] for label in clip["labels"]) for clip in packed), np.float32, clips
    )


def _log_mel_statistics(shards: ShardSet) -> dict[str, float]:
    """Mean and std of the log-mel of each clip, averaged over the clips like the published
    `get_norm_stats.py`; and the number of clips."""
    import torch

    from cavmae.dataloaders.media.log_mel import HOP_SAMPLES, WINDOW_SAMPLES, log_mel

    order = random_permutation(0, "order", 0, shards.samples)[:LOG_MEL_CLIPS]
    means, stds = [], []
    for position in sorted(order.tolist()):
        audio = shards.member(*shards.at(position), shards.audio_codec)
        waveform = torch.from_numpy(decode_audio(audio))
        frames = 1 + (len(waveform) - WINDOW_SAMPLES) // HOP_SAMPLES
        if frames > 0:
            values = log_mel([waveform], MEL_BINS, frames, torch.device("cpu"))
            means.append(float(values.mean()))
            stds.append(float(values.std()))
    mean, std = (float(np.mean(values)) if values else 0.0 for values in (means, stds))
    return {"mean": mean, "std": std, "clips": len(means)}
