"""`cavmae evaluate retrieve RUN_DIR SHARDS`: does a sound retrieve its video, and vice versa?

Clips are embedded whole: no clip sees another one, no padding is compared, and the ranking does not
depend on how clips were put into batches.
"""

import sys
from dataclasses import dataclass
from typing import Annotated

import torch
import tyro

from cavmae.atomic_write import read_json
from cavmae.console import JsonOption, print_json, print_rows
from cavmae.dataloaders.shards.shard_set import ShardSet
from cavmae.field_checks import CheckedFields, NonNegativeInt, PositiveInt
from cavmae.trainer.evaluation.clip_outputs import embed
from cavmae.trainer.evaluation.leakage import check_leakage
from cavmae.trainer.evaluation.trained_run import open_trained_pair, write_evaluation
from cavmae.trainer.metrics.retrieval import RetrievalScores, retrieval_scores


@dataclass(frozen=True)
class RetrieveConfig(CheckedFields, JsonOption):
    """Rank the clips of a packed set for each other, sound to video and video to sound.

    Raises:
        ValueError: a number out of its range.
    """

    run_dir: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")]
    """Folder of a trained run."""
    shards: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SHARDS")]
    """One tier of packed shards that the run was not trained on; a folder or a URL."""
    out: str = ""
    """JSON file of the result; empty: in `evaluation` of the run folder."""
    clips: NonNegativeInt = 0
    """The first ones in packing order; 0: all."""
    per_class: NonNegativeInt = 0
    """Clips of each class, by their first label (the paper has 5); 0: all."""
    batch: PositiveInt = 64
    """Clips that are embedded together; no score depends on it."""
    allow_leakage: bool = False
    """Also score clips that were trained on, or of which that can't be known."""


def first_of_each_class(labels: tuple[tuple[str, ...], ...], per_class: int) -> list[int]:
    """Choose the first `per_class` clips of each class, by the first label of a clip.

    Raises:
        ValueError: a clip has no label.
    """
    taken: dict[str, int] = {}
    chosen = []
    for clip, of_clip in enumerate(labels):
        if not of_clip:
            raise ValueError(
                f"per_class is {per_class} and clip {clip} of the set has no label; pack the set "
                "from a list with labels, or omit per_class"
            )
        taken[of_clip[0]] = taken.get(of_clip[0], 0) + 1
        if taken[of_clip[0]] <= per_class:
            chosen.append(clip)
    return chosen


def retrieve(config: RetrieveConfig) -> None:
    """Score retrieval, print it and write the result.

    Raises:
        ValueError: the run or the set does not fit, or the set was trained on.
        OSError: a file can't be read or written.
    """
    run = open_trained_pair(config.run_dir)
    shards = ShardSet(config.shards, run.config.data.cache)
    shards.check_has("both")
    leakage = check_leakage(run, shards, allow=config.allow_leakage)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    embeddings = embed(
        run.model(device), run.config, config.shards, clips=config.clips, batch=config.batch
    )
    chosen = list(range(len(embeddings.sample_ids)))
    if config.per_class:
        chosen = first_of_each_class(embeddings.labels, config.per_class)
    if len(chosen) < 2:
        raise ValueError(f"shards {config.shards}: {len(chosen)} clip; retrieval needs 2 or more")
    scores = retrieval_scores(*(embeddings.values[name][chosen] for name in ("audio", "video")))
    result = {
        "clips": len(chosen),
        "skipped": embeddings.skipped,
        "leakage": leakage,
        **{direction: one.as_metrics() for direction, one in scores.items()},
    }
    out = write_evaluation(run, config, "retrieve", shards, result)
    if config.json:
        print_json(read_json(out))
    else:
        print_rows(_COLUMNS, _rows(scores))
    print(f"result: {out}", file=sys.stderr)


_COLUMNS = ("direction", "R@1", "R@5", "R@10", "median rank", "chance: R@1", "chance: median rank")


def _rows(scores: dict[str, RetrievalScores]) -> list[tuple[str, ...]]:
    return [
        (
            direction.replace("_", " "),
            *(recall.describe() for recall in (one.r1, one.r5, one.r10)),
            f"{one.median_rank:g}",
            f"{one.r1.chance:.2%}",
            f"{one.chance_median_rank:g}",
        )
        for direction, one in scores.items()
    ]


def main(arguments: list[str]) -> int:
    """Run the command; returns its exit code."""
    retrieve(tyro.cli(RetrieveConfig, prog="cavmae evaluate retrieve", args=arguments))
    return 0
