"""`cavmae bench shuffle`: how close the plan's order is to a perfect shuffle.

Shards are permuted, but samples only move within a window, so that a node reads its own part of a
set. This measures what that costs, in the worst case: a set packed class by class. Three numbers,
each beside that of a perfect shuffle of the same set (1: as good):

- shards: different shards in a global batch;
- mixing: distance of a batch's class histogram from the set's (total variation);
- repeats: share of the pairs of a batch that are in one batch again in the next epoch.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from cavmae.benchmarks.harness.plots import plot_beside
from cavmae.benchmarks.harness.records import RecordedConfig, write_record
from cavmae.dataloaders.sampling.sample_plan import SamplePlan, default_lanes
from cavmae.field_checks import PositiveInt

CLASSES = 527


@dataclass(frozen=True)
class ShuffleConfig(RecordedConfig):
    """Compare the plan's order with a perfect shuffle.

    Raises:
        ValueError: an option out of its range.
    """

    shards: PositiveInt = 400
    """Shards of the set."""
    samples: PositiveInt = 1000
    """Samples of a shard."""
    batch: PositiveInt = 512
    """Global batch."""
    windows: tuple[int, ...] = (1, 64, 512, 4096, 16384)
    """Samples of a lane that are shuffled among each other, one turn for each number."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shards * self.samples < 2 * self.batch:
            raise ValueError(
                f"{self.shards * self.samples} samples are fewer than two batches of {self.batch}"
            )


def main(arguments: list[str]) -> int:
    """Measure every window, print, write a record and a plot; returns the exit code."""
    config = tyro.cli(ShuffleConfig, prog="cavmae bench shuffle", args=arguments)
    results: dict[str, Any] = {"perfect": _perfect(config.shards, config.samples, config.batch)}
    print(_line("perfect shuffle", results["perfect"], results["perfect"]))
    for window in config.windows:
        found = measure(config.shards, config.samples, config.batch, window)
        results[f"window_{window}"] = found
        print(_line(f"window {window}", found, results["perfect"]))
    path = write_record(config.out, "shuffle", torch.device("cpu"), vars(config), results)
    print(f"record: {path}")
    _plot(config.windows, results, path)
    return 0


def measure(shards: int, samples: int, batch: int, window: int) -> dict[str, float]:
    """Measure the three numbers of the plan.

    Args:
        shards, samples: the set has this many shards of this many samples, packed by class.
        batch: global batch.
        window: of the plan.
    """
    plan = SamplePlan([samples] * shards, seed=0, lanes=default_lanes(batch, 1), window=window)
    epochs = [
        np.array([one.shard * samples + one.sample for one in plan.samples(start, plan.count)])
        for start in (0, plan.count)
    ]
    return _numbers(epochs[0], epochs[1], samples, batch)


def _perfect(shards: int, samples: int, batch: int) -> dict[str, float]:
    rng = np.random.default_rng(0)
    epochs = [rng.permutation(shards * samples) for _ in range(2)]
    return _numbers(epochs[0], epochs[1], samples, batch)


def _numbers(first: np.ndarray, second: np.ndarray, samples: int, batch: int) -> dict[str, float]:
    """Measure two epochs, given by the numbers of their samples in packing order."""
    count = len(first)
    whole = first[: count // batch * batch].reshape(-1, batch)
    shards = np.mean([len(np.unique(row)) for row in whole // samples])
    classes = whole * CLASSES // count
    overall = np.bincount(np.arange(count) * CLASSES // count, minlength=CLASSES) / count
    distance = np.mean(
        [np.abs(np.bincount(row, minlength=CLASSES) / batch - overall).sum() / 2 for row in classes]
    )
    batch_of = np.empty(count, dtype=np.int64)
    batch_of[second] = np.arange(count) // batch
    again = sum(
        int((np.unique(batch_of[row], return_counts=True)[1] ** 2).sum()) - batch for row in whole
    )
    return {
        "shards_in_a_batch": float(shards),
        "class_distance": float(distance),
        "pairs_again": again / (len(whole) * batch * (batch - 1)),
    }


def _line(name: str, found: dict[str, float], perfect: dict[str, float]) -> str:
    ratios = {key: found[key] / perfect[key] for key in found}
    return (
        f"{name:>16}: {found['shards_in_a_batch']:.0f} shards in a batch "
        f"({ratios['shards_in_a_batch']:.2f} of perfect), class distance "
        f"{found['class_distance']:.3f} ({ratios['class_distance']:.2f}), pairs together again "
        f"{100 * found['pairs_again']:.2f}% ({ratios['pairs_again']:.2f})"
    )


def _plot(windows: tuple[int, ...], results: dict[str, Any], record: Path) -> None:
    titles = {
        "shards_in_a_batch": "different shards in a batch",
        "class_distance": "class distance of a batch",
        "pairs_again": "pairs together again",
    }
    with plot_beside(record, 12, 3.5) as figure:
        axes = figure.subplots(1, 3)
        for axis, (name, title) in zip(axes, titles.items(), strict=True):
            values = [results[f"window_{window}"][name] for window in windows]
            axis.plot(windows, values, "o-", label="plan")
            axis.axhline(results["perfect"][name], color="black", ls="--", label="perfect shuffle")
            axis.set(xscale="log", xlabel="shuffle window (samples)", title=title, ylim=(0, None))
        axes[0].legend()
