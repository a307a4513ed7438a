"""Classification scores: the definitions with ties, classes without a score, intervals."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cavmae.trainer.metrics import classification
from cavmae.trainer.metrics.classification import (
    ClassificationScores,
    classification_scores,
    d_prime,
    mean_over_frames,
)


def clips(count: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores that follow their targets a little; every class has clips with and without it."""
    generator = torch.Generator().manual_seed(seed)
    targets = (torch.rand(count, classes, generator=generator) < 0.3).float()
    targets[0], targets[1] = 1, 0
    return torch.randn(count, classes, generator=generator) + targets, targets


def point_scores(scores: torch.Tensor, targets: torch.Tensor) -> ClassificationScores:
    return classification_scores(scores, targets, resamples=2)


def average_precision(scores: np.ndarray, positive: np.ndarray) -> float:
    """Precision at each threshold, weighted by the recall that it adds."""
    total, recall = 0.0, 0.0
    for threshold in np.unique(scores)[::-1]:
        chosen = scores >= threshold
        gained = (chosen & positive).sum() / positive.sum()
        total += (gained - recall) * (chosen & positive).sum() / chosen.sum()
        recall = gained
    return total


def auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Share of pairs of a positive and a negative clip in the right order, a tie counting half."""
    difference = scores[positive][:, None] - scores[~positive][None]
    return ((difference > 0) + 0.5 * (difference == 0)).mean()


@given(count=st.integers(2, 25), levels=st.integers(1, 6), seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_scores_follow_the_definitions_with_ties(count: int, levels: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    scores = generator.integers(levels, size=(count, 1)).astype(float)
    targets = generator.integers(2, size=(count, 1))
    positive = targets[:, 0] == 1
    assume(positive.any() and not positive.all())
    result = point_scores(torch.from_numpy(scores), torch.from_numpy(targets))
    expected = average_precision(scores[:, 0], positive), auc(scores[:, 0], positive)
    assert (result.average_precision[0], result.auc[0]) == pytest.approx(expected, abs=1e-12)


@given(seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_a_clip_that_counts_twice_scores_like_two_equal_clips(seed: int) -> None:
    scores, targets = clips(12, 1, seed)
    draws = torch.randint(12, (12,), generator=torch.Generator().manual_seed(seed))
    drawn = targets[draws, 0]
    assume(0 < drawn.sum() < 12)
    ranked = classification._RankedClass.of(scores[:, 0].double(), targets[:, 0].double())
    counts = torch.bincount(draws, minlength=12).float()[None]
    weighted = torch.stack(classification._one_class(ranked, counts)).flatten().tolist()
    copied = point_scores(scores[draws], targets[draws])
    assert weighted == pytest.approx([copied.average_precision[0], copied.auc[0]], abs=1e-12)


def test_scores_depend_neither_on_the_order_of_clips_nor_on_a_rising_function() -> None:
    scores, targets = clips(60, 4)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    base = point_scores(scores, targets)
    for changed in (
        point_scores(scores[order], targets[order]),
        point_scores(scores.double().sigmoid(), targets),
    ):
        assert changed.average_precision == pytest.approx(base.average_precision, abs=1e-12)
        assert changed.auc == pytest.approx(base.auc, abs=1e-12)


def test_perfect_scores() -> None:
    targets = torch.eye(4).repeat(3, 1)
    result = classification_scores(targets, targets, resamples=50)
    for estimate in (result.mean_average_precision, result.mean_auc, result.accuracy):
        assert (estimate.value, estimate.low, estimate.high) == (1.0, 1.0, 1.0)
    assert result.d_prime.value == math.inf


def test_equal_scores_get_the_level_of_chance() -> None:
    _, targets = clips(40, 3)
    result = point_scores(torch.zeros(40, 3), targets)
    assert result.average_precision == pytest.approx(targets.double().mean(dim=0).tolist())
    assert result.mean_auc.value == 0.5
    assert result.d_prime.value == 0.0


def test_d_prime_is_the_distance_of_two_normal_distributions() -> None:
    distance = 1.7
    auc_of_distance = 0.5 * (1 + math.erf(distance / 2))
    assert d_prime(auc_of_distance) == pytest.approx(distance, rel=1e-12)


def test_accuracy_is_the_share_of_clips_with_the_label_on_top() -> None:
    targets = torch.eye(3)[[0, 1, 2, 2]]
    scores = torch.tensor([[3.0, 1, 2], [3, 1, 2], [0, 1, 2], [0, 1, 2]])
    assert point_scores(scores, targets).accuracy.value == 0.75


def test_a_class_without_positives_is_left_out_and_named() -> None:
    scores, targets = clips(50, 4)
    targets[:, 2] = 0
    result = point_scores(scores, targets)
    others = point_scores(scores[:, [0, 1, 3]], targets[:, [0, 1, 3]])
    assert result.average_precision[2] is None and result.auc[2] is None
    assert result.classes_without_average_precision == (2,)
    assert result.mean_average_precision.value == pytest.approx(others.mean_average_precision.value)
    assert result.as_metrics()["classes_with_average_precision"] == 3.0


def test_a_class_without_negatives_has_no_auc_and_is_left_out_of_its_mean_alone() -> None:
    scores, targets = clips(50, 4)
    targets[:, 1] = 1
    result = point_scores(scores, targets)
    assert (result.average_precision[1], result.auc[1]) == (1.0, None)
    assert result.classes_without_average_precision == ()
    assert result.as_metrics()["classes_with_auc"] == 3.0


def test_targets_by_which_no_class_can_be_scored_are_refused() -> None:
    with pytest.raises(ValueError, match="no class has an average precision"):
        point_scores(torch.randn(5, 2), torch.zeros(5, 2))
    with pytest.raises(ValueError, match="no class has an AUC"):
        point_scores(torch.randn(5, 2), torch.ones(5, 2))


@given(count=st.integers(4, 60), classes=st.integers(1, 5), seed=st.integers(0, 100))
@settings(max_examples=20, deadline=None)
def test_intervals_hold_their_value(count: int, classes: int, seed: int) -> None:
    result = classification_scores(*clips(count, classes, seed), resamples=100)
    for estimate in (result.mean_average_precision, result.mean_auc, result.accuracy):
        assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1
    assert result.d_prime.low <= result.d_prime.value <= result.d_prime.high


def test_intervals_hold_their_value_where_few_clips_of_many_classes_are_drawn_twice() -> None:
    generator = torch.Generator().manual_seed(0)
    targets = (torch.rand(500, 200, generator=generator) < 0.01).float()
    scores = torch.randn(500, 200, generator=generator) + 1.5 * targets
    estimate = classification_scores(scores, targets, resamples=100).mean_average_precision
    assert estimate.low < estimate.value < estimate.high


def test_intervals_are_as_wide_as_the_values_of_other_clips_vary() -> None:
    results = [classification_scores(*clips(200, 4, seed), resamples=200) for seed in range(40)]
    for name in ("mean_average_precision", "mean_auc", "accuracy"):
        estimates = [getattr(result, name) for result in results]
        deviation = np.std([estimate.value for estimate in estimates])
        width = np.mean([estimate.high - estimate.low for estimate in estimates])
        assert width == pytest.approx(2 * 1.96 * deviation, rel=0.35), name


def test_intervals_follow_the_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, targets = clips(60, 3)
    base = classification_scores(scores, targets, seed=1)
    assert classification_scores(scores, targets, seed=1) == base
    assert classification_scores(scores, targets, seed=2) != base
    monkeypatch.setattr(classification, "PART_VALUES", 500)  # parts of 8 resamples
    assert classification_scores(scores, targets, seed=1) == base


def test_frames_are_averaged_as_probabilities() -> None:
    logits = torch.tensor([[[0.0, 2.0]], [[4.0, 0.0]]])  # two frames of one clip
    sigmoid, softmax = torch.sigmoid(logits), torch.softmax(logits, dim=2)
    torch.testing.assert_close(mean_over_frames(logits, "bce"), (sigmoid[0] + sigmoid[1]) / 2)
    torch.testing.assert_close(
        mean_over_frames(logits, "cross_entropy"), (softmax[0] + softmax[1]) / 2
    )


def test_metrics_are_flat_numbers() -> None:
    metrics = point_scores(*clips(30, 3)).as_metrics()
    assert {"mean_average_precision", "mean_auc_low", "d_prime_high", "accuracy"} <= metrics.keys()
    assert all(isinstance(value, float) for value in metrics.values())


def test_scores_that_are_not_finite_are_refused_by_row() -> None:
    scores, targets = clips(10, 2)
    scores[4, 1] = float("nan")
    with pytest.raises(ValueError, match=r"scores of 1 clips are not finite \(first rows \[4\]\)"):
        point_scores(scores, targets)


def test_smoothed_targets_are_refused_by_row() -> None:
    scores, targets = clips(10, 2)
    targets[3, 0] = 0.9
    with pytest.raises(ValueError, match=r"neither 0 nor 1 \(first rows \[3\]\); give the labels"):
        point_scores(scores, targets)


@pytest.mark.parametrize("shapes", [((3, 4), (3, 5)), ((0, 4), (0, 4)), ((4,), (4,))])
def test_scores_without_one_row_a_clip_are_refused(
    shapes: tuple[tuple[int, ...], tuple[int, ...]],
) -> None:
    with pytest.raises(ValueError, match="one \\(clips, classes\\) row a clip"):
        point_scores(torch.ones(shapes[0]), torch.ones(shapes[1]))
