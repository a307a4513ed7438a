"""What is written once all shards of a set are packed: statistics, sampling weights, duplicates.

Everything comes from the reports of finished shards, read one by one, so memory is not proportional
to the set, but for one number a clip.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from cavmae.atomic_write import atomic_write, write_json, write_text
from cavmae.dataloaders.media.audio_codec import decode_sound
from cavmae.dataloaders.packing.duplicates import KnownContent, OtherSets, source_id
from cavmae.dataloaders.packing.output_folder import finished_reports
from cavmae.dataloaders.sampling.philox import random_permutation
from cavmae.dataloaders.shards.shard_set import ShardSet

LOG_MEL_CLIPS = 500
"""Clips, drawn by counter, of which mean and deviation of the log-mel are computed."""
MEL_BINS = 128


def write_statistics(out: Path, tiers: tuple[str, ...], others: OtherSets | None) -> dict[str, Any]:
    """Write `statistics.json`, `duplicates.jsonl` and each tier's `weights.npy`.

    Args:
        out: folder whose tiers are complete.
        tiers: in it.
        others: sets that were allowed to share clips with this one; the shared ones are counted.

    Returns:
        What `statistics.json` holds.
    """
    classes: Counter[str] = Counter()
    codecs: Counter[str] = Counter()
    known = KnownContent()
    duplicates: list[dict[str, str]] = []
    clips = unlabelled = shared = 0
    seconds = 0.0
    for report in finished_reports(out):
        seconds += report["seconds"]
        for clip in report["packed"]:
            clips += 1
            classes.update(clip["labels"])
            codecs[clip["codec"]] += 1
            unlabelled += not clip["labels"]
            first = known.earlier(clip["content"], int(clip["key"]))
            known.note(clip["content"], int(clip["key"]))
            if first is not None:
                duplicates.append({"key": clip["key"], "first": f"{first:09d}"})
            shared += others is not None and (
                clip["content"] in others.content or source_id(clip["source"]) in others.names
            )
    text = "".join(json.dumps(line) + "\n" for line in duplicates)
    write_text(out / "duplicates.jsonl", text)
    mean, deviation, heard = _log_mel(ShardSet(out / tiers[0]))
    statistics = {
        "clips": clips,
        "seconds": seconds,
        "source_codecs": dict(codecs.most_common()),
        "classes": dict(classes.most_common()),
        "clips_without_label": unlabelled,
        "duplicates": len(duplicates),
        "clips_in_sets_of_not_in": shared,
        "log_mel": {"mean": mean, "deviation": deviation, "clips": heard},
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


def _weights(out: Path, classes: Counter[str], clips: int) -> np.ndarray:
    """`(clips,)` float32 as the published `gen_weight_file.py` computes them."""
    of_class = {name: 1000 / (count + 0.01) for name, count in classes.items()}
    packed = (clip for report in finished_reports(out) for clip in report["packed"])
    return np.fromiter(
        (sum(of_class[label] for label in clip["labels"]) for clip in packed), np.float32, clips
    )


def _log_mel(shards: ShardSet) -> tuple[float, float, int]:
    """Mean and deviation over all values, as the published `get_norm_stats.py` averages them: of
    each clip's own, over the clips; and the number of clips."""
    import torch

    from cavmae.dataloaders.media.log_mel import HOP_SAMPLES, WINDOW_SAMPLES, log_mel

    order = random_permutation(0, "order", 0, shards.samples)[:LOG_MEL_CLIPS]
    ends = np.cumsum(shards.sizes)
    means, deviations = [], []
    for place in sorted(order.tolist()):
        shard = int(np.searchsorted(ends, place, side="right"))
        sample = place - int(ends[shard] - shards.sizes[shard])
        waveform = torch.from_numpy(decode_sound(shards.member(shard, sample, shards.audio_codec)))
        frames = 1 + (len(waveform) - WINDOW_SAMPLES) // HOP_SAMPLES
        if frames > 0:
            values = log_mel([waveform], MEL_BINS, frames, torch.device("cpu"))
            means.append(float(values.mean()))
            deviations.append(float(values.std()))
    if not means:
        return 0.0, 0.0, 0
    return float(np.mean(means)), float(np.mean(deviations)), len(means)
