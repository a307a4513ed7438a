"""`cavmae evaluate classify RUN_DIR SHARDS`: score a fine-tuned run as a classifier.

A run that was fine-tuned on sound and video is scored with both, and with one of them missing. With
ten frames the probabilities of a clip are averaged over them, as published.
"""

import csv
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from cavmae.atomic_write import atomic_write, read_json
from cavmae.console import JsonOption, counted, print_json, print_rows
from cavmae.dataloaders.batch import AudioVideoBatch
from cavmae.dataloaders.constants import Modalities
from cavmae.dataloaders.shards.shard_set import ShardSet
from cavmae.field_checks import CheckedFields, NonNegativeInt, PositiveInt
from cavmae.trainer.config.configs import FinetuneConfig
from cavmae.trainer.evaluation.clip_outputs import ClipOutputs, clip_outputs, whole_clips
from cavmae.trainer.evaluation.leakage import check_leakage
from cavmae.trainer.evaluation.trained_run import (
    TrainedClassifier,
    open_trained_classifier,
    write_evaluation,
)
from cavmae.trainer.metrics.classification import (
    ClassificationScores,
    classification_scores,
    mean_over_frames,
)
from cavmae.trainer.model.blocks import Modality
from cavmae.trainer.model.classifier import STREAMS, CAVMAEClassifier, Mode
from cavmae.trainer.tasks.labels import LabelSet, label_counts
from cavmae.trainer.tracking.figures import plot_classes


@dataclass(frozen=True)
class ClassifyConfig(CheckedFields, JsonOption):
    """Classify the clips of a packed set with a fine-tuned run, and score that.

    Raises:
        ValueError: a field out of its range.
    """

    run_dir: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")]
    """Folder of a trained fine-tuning run."""
    shards: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SHARDS")]
    """One tier of packed shards with labels that the run was not trained on; a folder or a URL."""
    out: str = ""
    """JSON file of the result, with a table (.csv) and a figure (.png) of the classes beside it;
    empty: in `evaluation` of the run folder."""
    clips: NonNegativeInt = 0
    """The first ones in packing order; 0: all."""
    frames: Literal[1, 10] = 1
    """Of each clip: the middle one, as during training, or the mean over all ten, as published."""
    modes: str = ""
    """Input modes to score, separated by commas: multimodal, missingaudioonly, missingvideoonly,
    audioonly, videoonly; empty: all that the run was fine-tuned for and the set has. What no mode
    takes is not read."""
    batch: PositiveInt = 64
    """Clips that are classified together; no score depends on it."""
    resamples: NonNegativeInt = 1000
    """Bootstrap resamples over clips, for the intervals; 0: no intervals."""
    allow_empty_classes: bool = False
    """Score a set that has no clip of some classes; the means skip these."""
    allow_leakage: bool = False
    """Also score clips that were trained on, or of which that can't be known."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resamples == 1:
            raise ValueError("resamples is 1; use 2 or more, or 0 for no intervals")
        if self.out and not self.out.endswith(".json"):
            raise ValueError(f"out is {self.out}; give the name of a .json file")


@dataclass(frozen=True)
class ModeScores:
    """Scores of a run in one mode.

    Attributes:
        frames: number of frames averaged; 1 if the mode sees none.
        scores: of that mean.
        by_frame: scores of each frame alone, without intervals; empty if there is one.
    """

    frames: int
    scores: ClassificationScores
    by_frame: tuple[ClassificationScores, ...]


def modes_to_score(asked: str, run: FinetuneConfig, shards: ShardSet) -> tuple[Mode, ...]:
    """Parse the modes of `asked`; empty: all of the run's that the set has the input of.

    Raises:
        ValueError: a mode that the run was not fine-tuned for, or that the set lacks the input of.
    """
    trained = run.classifier.mode
    of_run: tuple[Mode, ...] = tuple(STREAMS) if trained == "multimodal" else (trained,)
    fitting: list[Mode] = [
        mode for mode in of_run if shards.modality in ("both", modality_of([mode]))
    ]
    if not asked and fitting:
        return tuple(fitting)
    if not asked or not fitting:
        shards.check_has(modality_of(of_run), f"a run that takes {shards.modality}")
    modes = [word.strip() for word in asked.split(",")]
    other = [mode for mode in modes if mode not in of_run]
    if other:
        raise ValueError(
            f"modes has {other[0]!r}; the run was fine-tuned with classifier.mode {trained} and "
            f"can be scored in {', '.join(of_run)}"
        )
    chosen: tuple[Mode, ...] = tuple(mode for mode in of_run if mode in modes)
    shards.check_has(modality_of(chosen), f"pass --modes {','.join(fitting)}")
    return chosen


def modality_of(modes: Iterable[Mode]) -> Modalities:
    """Return what some modes read."""
    read: set[Modality] = set()
    for mode in modes:
        read.update(*STREAMS[mode].values())
    return "both" if len(read) == 2 else read.pop()


def check_no_empty_class(labels: LabelSet, shards: str) -> None:
    """Refuse a set that has no clip of a class, where packing's counts can be read.

    Raises:
        ValueError: names some of the classes.
    """
    counts = label_counts([shards])
    empty = [] if counts is None else [one for one in labels.labels if not counts.get(one)]
    if empty:
        raise ValueError(
            f"{shards} has no clip of {len(empty)} of the run's {len(labels)} classes, such as "
            f"{', '.join(map(repr, empty[:5]))}; give a set that has them, or pass "
            "--allow-empty-classes, which skips them in the means"
        )


def classified(
    run: TrainedClassifier, modes: Sequence[Mode], config: ClassifyConfig
) -> ClipOutputs:
    """Compute logits (clips, frames, classes) of each mode, and `targets` (clips, classes).

    Raises:
        ValueError: weights that do not fit the run, or a clip without a label of its classes.
        OSError: a file can't be read.
        DataFaultError: too many clips are damaged.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, labels = run.model(device), run.labels

    def forward(batch: AudioVideoBatch) -> dict[str, torch.Tensor]:
        targets = labels.targets(batch.labels, batch.sample_ids)
        return {"targets": targets} | {mode: _logits(model, batch, mode) for mode in modes}

    batch, clips, frames = config.batch, config.clips, config.frames
    loader = whole_clips(
        run.config,
        config.shards,
        device,
        batch=batch,
        clips=clips,
        frames=frames,
        modality=modality_of(modes),
    )
    return clip_outputs(forward, loader, config.shards, device)


def score_modes(
    logits: dict[Mode, torch.Tensor], targets: torch.Tensor, run: FinetuneConfig, resamples: int
) -> dict[Mode, ModeScores]:
    """Score the logits of each mode.

    Args:
        logits: (clips, frames, classes) of each mode.
        targets: (clips, classes), 1 where a clip has the class and 0 elsewhere.
        run: whose loss says how frames are averaged.
        resamples: of the bootstrap; 0: no intervals.
    """
    scores: dict[Mode, ModeScores] = {}
    for mode, of_clips in counted(logits.items(), "scoring", len(logits), "modes"):
        frames = of_clips.transpose(0, 1)  # (frames, clips, classes)
        # One frame is scored as during training: a softmax over classes would change the order of
        # clips within a class.
        mean = frames[0] if len(frames) == 1 else mean_over_frames(frames, run.classifier.loss)
        alone = frames if len(frames) > 1 else ()
        scores[mode] = ModeScores(
            len(frames),
            classification_scores(mean, targets, resamples=resamples),
            tuple(classification_scores(one, targets, resamples=0) for one in alone),
        )
    return scores


def classify(config: ClassifyConfig) -> None:
    """Score the run in its modes, print it and write the result.

    Raises:
        ValueError: the run, the set or its labels do not fit, or the set was trained on.
        OSError: a file can't be read or written.
        DataFaultError: too many clips are damaged.
    """
    run = open_trained_classifier(config.run_dir)
    labels = run.labels
    shards = ShardSet(config.shards, run.config.data.cache)
    modes = modes_to_score(config.modes, run.config, shards)
    leakage = check_leakage(run, shards, allow=config.allow_leakage)
    if not config.allow_empty_classes and not config.clips:
        check_no_empty_class(labels, config.shards)
    made = classified(run, modes, config)
    targets = made.values["targets"]
    logits: dict[Mode, torch.Tensor] = {mode: made.values[mode] for mode in modes}
    scores = score_modes(logits, targets, run.config, config.resamples)
    clips_of_class = [int(count) for count in targets.sum(dim=0).tolist()]
    result = {
        "clips": len(targets),
        "skipped": made.skipped,
        "leakage": leakage,
        "classes": labels.labels,
        "clips_of_class": clips_of_class,
        "modes": {mode: _as_json(one, labels) for mode, one in scores.items()},
    }
    kind = "classify" if config.frames == 1 else f"classify-{config.frames}-frames"
    out = write_evaluation(run, config, kind, shards, result)
    _write_classes(out.with_suffix(".csv"), labels, clips_of_class, scores)
    first = scores[modes[0]].scores
    plot_classes(
        out.with_suffix(".png"),
        f"{modes[0]}: mean average precision {first.mean_average_precision.value:.1%}, "
        f"{first.clips} clips",
        labels.names,
        clips_of_class,
        first.average_precision,
    )
    if config.json:
        print_json(read_json(out))
    else:
        print_rows(("mode", "frames", "mAP", "AUC", "d'", "accuracy"), _rows(scores))
    skipped = first.classes_without_average_precision
    if skipped:
        said = f"skipped in the means: {len(skipped)} of {len(labels)} classes, without a clip"
        print(said, file=sys.stderr)
    files = f"{out}, classes: {out.with_suffix('.csv')}, {out.with_suffix('.png')}"
    print(f"result: {files}", file=sys.stderr)


def _logits(model: CAVMAEClassifier, batch: AudioVideoBatch, mode: Mode) -> torch.Tensor:
    """Compute (batch, frames, classes); one frame if the mode sees none."""
    frames: Sequence[torch.Tensor | None] = [None]
    if batch.frames is not None and modality_of([mode]) != "audio":
        frames = batch.frames.unbind(1)
    made = [model(batch.log_mel, frame, mode).logits for frame in frames]
    return torch.stack(made, dim=1)


def _as_json(one: ModeScores, labels: LabelSet) -> dict[str, Any]:
    scores = one.scores
    return {
        "frames": one.frames,
        **scores.as_metrics(),
        "average_precision": scores.average_precision,
        "auc": scores.auc,
        "classes_skipped": [labels.labels[k] for k in scores.classes_without_average_precision],
        "by_frame": [frame.as_metrics() for frame in one.by_frame],
    }


def _write_classes(
    path: Path, labels: LabelSet, clips: Sequence[int], scores: dict[Mode, ModeScores]
) -> None:
    """Write a row for each class in each mode; empty cells where a class has no such score."""
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["mode", "index", "label", "name", "clips", "average_precision", "auc"])
        for mode, one in scores.items():
            columns = (labels.labels, labels.names, clips)
            of_class = (one.scores.average_precision, one.scores.auc)
            for number, row in enumerate(zip(*columns, *of_class, strict=True)):
                writer.writerow([mode, number, *row])


def _rows(scores: dict[Mode, ModeScores]) -> list[tuple[object, ...]]:
    return [
        (
            mode,
            one.frames,
            one.scores.mean_average_precision.describe(),
            one.scores.mean_auc.describe(),
            one.scores.d_prime.describe(".2f"),
            one.scores.accuracy.describe(),
        )
        for mode, one in scores.items()
    ]


def main(arguments: list[str]) -> int:
    """Run the command; returns its exit code."""
    classify(tyro.cli(ClassifyConfig, prog="cavmae evaluate classify", args=arguments))
    return 0
