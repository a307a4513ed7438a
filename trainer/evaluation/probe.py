"""`cavmae evaluate probe RUN_DIR TRAIN TEST`: how well do frozen features predict labels?

A linear classifier and nearest neighbours learn from the features of one packed set with labels and
predict those of another. The same is done with the features of the same model with random weights:
what is above those is what pretraining has learned.
"""

import sys
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
import tyro

from cavmae.atomic_write import read_json
from cavmae.console import JsonOption, print_json, print_rows
from cavmae.dataloaders.constants import Modalities
from cavmae.dataloaders.shards.shard_set import ShardSet
from cavmae.field_checks import CheckedFields, NonNegativeFloat, NonNegativeInt, PositiveInt
from cavmae.trainer.evaluation.clip_outputs import embed
from cavmae.trainer.evaluation.leakage import check_leakage
from cavmae.trainer.evaluation.trained_run import open_trained, write_evaluation
from cavmae.trainer.losses.classification import classification_loss
from cavmae.trainer.metrics.classification import ClassificationScores, classification_scores
from cavmae.trainer.tasks.labels import LabelSet

_NEIGHBOUR_TEMPERATURE = 0.07
"""A neighbour's vote is exp(cosine / this), as in Wu et al., CVPR 2018."""
_PROBE_ITERATIONS = 200


@dataclass(frozen=True)
class ProbeConfig(CheckedFields, JsonOption):
    """Classify the clips of TEST from frozen features, with the labels of TRAIN.

    Raises:
        ValueError: a number out of its range.
    """

    run_dir: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")]
    """Folder of a trained run."""
    train: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TRAIN")]
    """One tier of packed shards with labels, which the classifiers learn from."""
    test: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TEST")]
    """One tier of packed shards with the same labels, of other clips."""
    out: str = ""
    """JSON file of the result; empty: in `evaluation` of the run folder."""
    clips: NonNegativeInt = 0
    """The first ones of each set in packing order; 0: all."""
    features: Modalities = "both"
    """Embedding of the sound, of the frame, or both concatenated; nothing else is read."""
    neighbours: PositiveInt = 20
    """Number of nearest neighbours."""
    weight_decay: NonNegativeFloat = 1e-3
    """L2 penalty of the linear classifier on standardised features."""
    batch: PositiveInt = 64
    """Clips that are embedded together; no score depends on it."""
    allow_leakage: bool = False
    """Also score test clips that the run or the classifiers learned from, or of which that can't be
    known."""


def nearest_neighbours(
    train: torch.Tensor, targets: torch.Tensor, test: torch.Tensor, neighbours: int
) -> torch.Tensor:
    """Classify by a vote of the nearest training clips by cosine.

    Args:
        train: (clips, width) features.
        targets: (clips, classes) of them.
        test: (test clips, width) features.
        neighbours: how many vote; at most all.

    Returns:
        (test clips, classes) float32, shares of the votes.
    """
    cosine = F.normalize(test, dim=1) @ F.normalize(train, dim=1).T  # (test clips, clips)
    nearest = cosine.topk(min(neighbours, len(train)), dim=1)
    votes = (nearest.values / _NEIGHBOUR_TEMPERATURE).softmax(dim=1)  # (test clips, neighbours)
    return torch.einsum("tn,tnc->tc", votes, targets[nearest.indices])


def linear_probe(
    train: torch.Tensor, targets: torch.Tensor, test: torch.Tensor, weight_decay: float
) -> torch.Tensor:
    """Train a linear classifier on standardised features to its optimum.

    The problem is convex, so the result depends on no seed, learning rate or batch.

    Args:
        train: (clips, width) features.
        targets: (clips, classes) of them; cross-entropy where each clip has one label, else binary
            cross-entropy.
        test: (test clips, width) features.
        weight_decay: L2 penalty.

    Returns:
        (test clips, classes) float32 logits.
    """
    mean, std = train.mean(dim=0), train.std(dim=0).clamp(min=1e-6)
    train, test = ((values - mean) / std for values in (train, test))
    weight = torch.zeros(train.shape[1], targets.shape[1], requires_grad=True)
    bias = torch.zeros(targets.shape[1], requires_grad=True)
    one_label = bool((targets.sum(dim=1) == 1).all())
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=_PROBE_ITERATIONS, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = classification_loss(
            train @ weight + bias, targets, "cross_entropy" if one_label else "bce"
        )
        loss = loss + weight_decay * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return (test @ weight + bias).detach()


def probe(config: ProbeConfig) -> None:
    """Score the features of the run and of random weights, print and write the result.

    Raises:
        ValueError: the run, the sets or their labels do not fit, or a set was learned from.
        OSError: a file can't be read or written.
        DataFaultError: too many clips are damaged.
    """
    run = open_trained(config.run_dir)
    cache = run.config.data.cache
    test_set, trained = ShardSet(config.test, cache), run.config.data.modality
    if trained not in ("both", config.features):
        raise ValueError(
            f"features is {config.features}, and run_dir {config.run_dir} was trained on {trained} "
            f"alone; pass --features {trained}"
        )
    for shards in (ShardSet(config.train, cache), test_set):
        shards.check_has(config.features, f"pass --features {shards.modality}")
    leakage = check_leakage(run, test_set, [config.train], allow=config.allow_leakage)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = {"pretrained": run.model(device), "random weights": run.untrained_model(device)}
    scores: dict[str, ClassificationScores] = {}
    classes: tuple[str, ...] = ()
    skipped: dict[str, tuple[tuple[str, str], ...]] = {}
    for name, model in models.items():
        train, test = (
            embed(
                model,
                run.config,
                folder,
                clips=config.clips,
                batch=config.batch,
                modality=config.features,
            )
            for folder in (config.train, config.test)
        )
        classes = tuple(sorted({label for labels in train.labels for label in labels}))
        labels = LabelSet(classes, classes)
        targets = labels.targets(train.labels, train.sample_ids)
        truth = labels.targets(test.labels, test.sample_ids)
        features = [torch.cat(list(one.values.values()), dim=1) for one in (train, test)]
        guesses = {
            "linear": linear_probe(features[0], targets, features[1], config.weight_decay),
            "neighbours": nearest_neighbours(features[0], targets, features[1], config.neighbours),
        }
        for kind, guess in guesses.items():
            scores[f"{name}, {kind}"] = classification_scores(guess, truth)
        skipped = {"train": train.skipped, "test": test.skipped}
    result = {
        "classes": classes,
        "skipped": skipped,
        "train_fingerprint": ShardSet(config.train, cache).fingerprint,
        "leakage": leakage,
        "scores": {
            name: one.as_metrics()
            | {"classes_skipped": [classes[k] for k in one.classes_without_average_precision]}
            for name, one in scores.items()
        },
    }
    out = write_evaluation(run, config, "probe", test_set, result)
    if config.json:
        print_json(read_json(out))
    else:
        print_rows(("features, classifier", "accuracy", "mAP", "AUC", "clips"), _rows(scores))
    print(f"result: {out}", file=sys.stderr)


def _rows(scores: dict[str, ClassificationScores]) -> list[tuple[object, ...]]:
    return [
        (
            name,
            *(v.describe() for v in (one.accuracy, one.mean_average_precision, one.mean_auc)),
            one.clips,
        )
        for name, one in scores.items()
    ]


def main(arguments: list[str]) -> int:
    """Run the command; returns its exit code."""
    probe(tyro.cli(ProbeConfig, prog="cavmae evaluate probe", args=arguments))
    return 0
