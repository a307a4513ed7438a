"""Scores of a classifier: average precision, AUC, d' and accuracy, with intervals.

The values are scikit-learn's, as in the published evaluation, with the classes that could not be
scored and an interval over clips.

A class without a single positive clip has no average precision, and one of only positive or only
negative clips no AUC. Such a class is skipped in the mean and listed by its number in the scores;
scikit-learn would give it an average precision of 0, which lowers the mean for a gap in the data.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Literal

import torch

from cavmae.trainer.metrics.estimate import Estimate

# Values of the part of the resampled counts that is held at a time: 4 MiB, which a cache holds.
# Parts 16 times as large took twice the time.
PART_VALUES = 2**20


@dataclass(frozen=True)
class ClassificationScores:
    """Scores of a set of clips.

    Attributes:
        clips: number of clips.
        average_precision: of each class; None where it has no positive clip.
        auc: area under the ROC curve of each class; None where it has no positive or no negative
            clip.
        mean_average_precision, mean_auc: over the classes that have one.
        d_prime: sqrt(2) times the normal quantile of the mean AUC; infinite where that is 1.
        accuracy: share of clips whose highest score is at their label. Of several labels the first
            counts, and a clip without labels counts as class 0, as published: it means something
            only where each clip has one label.
    """

    clips: int
    average_precision: tuple[float | None, ...]
    auc: tuple[float | None, ...]
    mean_average_precision: Estimate
    mean_auc: Estimate
    d_prime: Estimate
    accuracy: Estimate

    @property
    def classes_without_average_precision(self) -> tuple[int, ...]:
        """Classes skipped in `mean_average_precision`."""
        return tuple(k for k, value in enumerate(self.average_precision) if value is None)

    def as_metrics(self) -> dict[str, float]:
        """Return flat numbers for a tracker: `mean_average_precision`,
        `mean_average_precision_low`, ..., and how many classes are in each mean; without intervals
        that were not computed, and an infinite d'."""
        metrics: dict[str, float] = {}
        for name in ("mean_average_precision", "mean_auc", "d_prime", "accuracy"):
            metrics |= getattr(self, name).as_metrics(name)
        for name in ("average_precision", "auc"):
            scored = [value for value in getattr(self, name) if value is not None]
            metrics[f"classes_with_{name}"] = float(len(scored))
        return metrics


def classification_scores(
    scores: torch.Tensor, targets: torch.Tensor, *, resamples: int = 1000, seed: int = 0
) -> ClassificationScores:
    """Score a classifier on a set of clips, on the CPU in float64.

    The intervals come from a bootstrap over clips: each resample draws as many clips with
    replacement. A class of which a resample draws no positive is skipped in that resample's mean.
    Clips drawn twice help each other in the ranking, so that resampled precisions lie too high on
    the average; the quantiles are therefore taken about the mean of the resamples and moved to the
    value. An interval says how much the value varies over sets of this size and nothing else: of
    rare classes, the average precision on few clips lies above that on many.

    Args:
        scores: (clips, classes) logits or probabilities, any float dtype and device.
        targets: (clips, classes), 1 where a clip has the label and 0 elsewhere.
        resamples: of the bootstrap, 2 or more; 0: no intervals.
        seed: of the bootstrap; the same seed draws the same clips.

    Raises:
        ValueError: shapes that differ, no clips, scores that are not finite, targets other than 0
            and 1, or no class that can be scored.
    """
    # Not at the top: it takes a second, which the start of a run and `cavmae.load` need not wait.
    import sklearn
    from sklearn.metrics import average_precision_score, roc_auc_score

    scores, targets = scores.detach().cpu().double(), targets.detach().cpu().double()
    _check(scores, targets)
    correct = (scores.argmax(dim=1) == targets.argmax(dim=1)).float()  # (clips,)
    columns = list(zip(targets.T.numpy(), scores.T.numpy(), strict=True))  # of each class
    # What it checks has been checked; for 200 clips the checks take longer than the scores.
    with sklearn.config_context(assume_finite=True, skip_parameter_validation=True):
        precision = [float(average_precision_score(t, s)) if t.any() else None for t, s in columns]
        auc = [float(roc_auc_score(t, s)) if 0 < t.mean() < 1 else None for t, s in columns]
    means = [_mean("average precision", precision), _mean("AUC", auc), fmean(correct.tolist())]
    mean_ap, mean_auc, accuracy = _estimates(means, scores, targets, correct, resamples, seed)
    return ClassificationScores(
        clips=len(scores),
        average_precision=tuple(precision),
        auc=tuple(auc),
        mean_average_precision=mean_ap,
        mean_auc=mean_auc,
        d_prime=Estimate(*(d_prime(end) for end in asdict(mean_auc).values())),
        accuracy=accuracy,
    )


def d_prime(auc: float) -> float:
    """Compute the distance of the means of two unit normal distributions with this AUC."""
    return math.sqrt(2) * float(torch.special.ndtri(torch.tensor(auc, dtype=torch.float64)))


def probabilities(logits: torch.Tensor, loss: Literal["bce", "cross_entropy"]) -> torch.Tensor:
    """Convert logits (..., classes) to probabilities: sigmoids of a model trained with `bce`, a
    softmax of one trained with `cross_entropy`."""
    logits = logits.float()
    return logits.sigmoid() if loss == "bce" else logits.softmax(dim=-1)


def mean_over_frames(logits: torch.Tensor, loss: Literal["bce", "cross_entropy"]) -> torch.Tensor:
    """Average the probabilities of clips that were classified with each of several frames.

    Args:
        logits: (frames, clips, classes).
        loss: what the classifier was trained with, as of `probabilities`.

    Returns:
        (clips, classes) float32.
    """
    return probabilities(logits, loss).mean(dim=0)


@dataclass(frozen=True)
class _RankedClass:
    """The clips of one class from the highest score down; equal scores are one step of the curves.

    Attributes:
        order: (clips,) clips by falling score.
        positives: (positives,) positive clips in that order.
        before, after: (positives,) number of clips in `order` before the step of each positive,
            and up to its end.
        positives_before, positives_after: the same of `positives`.
    """

    order: torch.Tensor
    positives: torch.Tensor
    before: torch.Tensor
    after: torch.Tensor
    positives_before: torch.Tensor
    positives_after: torch.Tensor

    @staticmethod
    def of(scores: torch.Tensor, targets: torch.Tensor) -> "_RankedClass":
        """Rank (clips,) scores and targets of the class."""
        falling, order = scores.sort(descending=True, stable=True)
        is_positive = targets[order] == 1
        positives = falling[is_positive]
        return _RankedClass(
            order,
            order[is_positive],
            *(
                torch.searchsorted(-ranked, -positives, right=right)
                for ranked in (falling, positives)
                for right in (False, True)
            ),
        )


def _mean(name: str, of_classes: list[float | None]) -> float:
    scored = [one for one in of_classes if one is not None]
    if not scored:
        raise ValueError(
            f"no class has an {name}: each lacks clips with or without it; look at the targets "
            "or take more clips"
        )
    return fmean(scored)


def _estimates(
    means: list[float],
    scores: torch.Tensor,
    targets: torch.Tensor,
    correct: torch.Tensor,
    resamples: int,
    seed: int,
) -> list[Estimate]:
    """Compute the intervals of mean average precision, mean AUC and accuracy.

    The resampled precisions and AUCs are computed here and not by scikit-learn, which ranks the
    clips of each resample anew: per resample it took 90 times (20,000 clips) to 2,900 times (200
    clips) as long on a CPU core.
    """
    if not resamples:
        return [Estimate(mean, math.nan, math.nan) for mean in means]
    classes = [_RankedClass.of(s, t) for s, t in zip(scores.T, targets.T, strict=True)]
    resampled = torch.cat(
        [
            _means(*_class_scores(classes, counts), counts, correct)
            for counts in _resampled_counts(len(correct), resamples, seed)
        ],
        dim=1,
    )  # (3, resamples)
    offset = resampled - resampled.nanmean(dim=1, keepdim=True)
    quantiles = torch.tensor([0.025, 0.975], dtype=torch.float64)
    value = torch.tensor(means, dtype=torch.float64)
    ends = (value + offset.nanquantile(quantiles, dim=1)).clamp(0, 1)  # (2, 3)
    return [Estimate(mean, *end) for mean, end in zip(means, ends.T.tolist(), strict=True)]


def _class_scores(
    classes: list[_RankedClass], counts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute average precision and AUC of every class; NaN where there is none.

    Args:
        classes: the clips of each class in order.
        counts: (resamples, clips) float32, how often each clip counts; whole numbers, whose sums
            are exact up to 2^24 clips.

    Returns:
        Two (resamples, classes) float64.
    """
    columns = [_one_class(ranked, counts) for ranked in classes]
    precision, auc = (torch.stack(column, dim=1) for column in zip(*columns, strict=True))
    return precision, auc


def _one_class(ranked: _RankedClass, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    clips_up_to = _cumulative(counts.index_select(1, ranked.order))  # (resamples, clips + 1)
    drawn = counts[:, ranked.positives].double()  # (resamples, positives)
    positives_up_to = _cumulative(drawn)  # (resamples, positives + 1)

    clips_after = clips_up_to[:, ranked.after].double()  # (resamples, positives)
    positives_after = positives_up_to[:, ranked.positives_after]
    positives = positives_up_to[:, -1]  # (resamples,)
    # A step without clips has no positives either: any divisor will do.
    precision = (drawn * positives_after / clips_after.clamp(min=1)).sum(dim=1) / positives

    negatives = clips_up_to[:, -1].double() - positives  # (resamples,)
    higher_after = clips_after - positives_after  # negatives, (resamples, positives)
    higher_before = (
        clips_up_to[:, ranked.before].double() - positives_up_to[:, ranked.positives_before]
    )
    # Half of a tie with a negative clip is won.
    lost = (drawn * (higher_after + higher_before) / 2).sum(dim=1)
    return precision, 1 - lost / (positives * negatives)


def _cumulative(counts: torch.Tensor) -> torch.Tensor:
    """Compute sums of the first 0, 1, ..., n: (resamples, n) to (resamples, n + 1)."""
    return torch.nn.functional.pad(counts, (1, 0)).cumsum(dim=1)


def _means(
    precision: torch.Tensor, auc: torch.Tensor, counts: torch.Tensor, correct: torch.Tensor
) -> torch.Tensor:
    """Compute (3, resamples) float64: mean average precision, mean AUC, accuracy."""
    accuracy = (counts @ correct).double() / counts.shape[1]
    return torch.stack([precision.nanmean(dim=1), auc.nanmean(dim=1), accuracy])


def _resampled_counts(clips: int, resamples: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield (part of the resamples, clips) float32: how often each clip is drawn."""
    generator = torch.Generator().manual_seed(seed)
    part = max(1, PART_VALUES // clips)
    for start in range(0, resamples, part):
        draws = torch.randint(clips, (min(part, resamples - start), clips), generator=generator)
        yield torch.zeros(draws.shape).scatter_add_(1, draws, torch.ones(draws.shape))


def _check(scores: torch.Tensor, targets: torch.Tensor) -> None:
    if scores.ndim != 2 or scores.shape != targets.shape or scores.numel() == 0:
        raise ValueError(
            f"scores have shape {tuple(scores.shape)} and targets {tuple(targets.shape)}; "
            "classification needs one (clips, classes) row a clip in both"
        )
    bad = (~scores.isfinite().all(dim=1)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"the scores of {len(bad)} clips are not finite (first rows {bad[:5]}); look at these "
            "clips or at the weights"
        )
    soft = ((targets != 0) & (targets != 1)).any(dim=1).nonzero().flatten().tolist()
    if soft:
        raise ValueError(
            f"the targets of {len(soft)} clips are neither 0 nor 1 (first rows {soft[:5]}); give "
            "the labels without smoothing and without mixing"
        )
