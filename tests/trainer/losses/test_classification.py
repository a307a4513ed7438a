"""Losses of fine-tuning by their definitions, and the published smoothing of targets."""

import pytest
import torch

from cavmae.trainer.losses.classification import (
    classification_loss,
    mixed_targets,
    smoothed_targets,
)

LABELS = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0]])
OTHER = torch.tensor([[0.0, 0.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0]])
LOGITS = torch.tensor([[2.0, -1.0, 0.5, 0.0], [-0.3, 0.7, 1.5, -2.0]])


def test_binary_cross_entropy_is_the_mean_over_clips_and_classes() -> None:
    p, t = LOGITS.double().sigmoid(), smoothed_targets(LABELS, 0.1).double()
    expected = -(t * p.log() + (1 - t) * (1 - p).log()).mean()
    measured = classification_loss(LOGITS, t, "bce")
    torch.testing.assert_close(measured, expected.float())


def test_cross_entropy_is_the_mean_over_clips_of_targets_that_need_not_add_up_to_one() -> None:
    targets = smoothed_targets(LABELS, 0.1)
    expected = -(targets * LOGITS.log_softmax(dim=1)).sum(dim=1).mean()
    torch.testing.assert_close(classification_loss(LOGITS, targets, "cross_entropy"), expected)


def test_losses_of_bf16_logits_are_float32() -> None:
    loss = classification_loss(LOGITS.bfloat16(), LABELS.bfloat16(), "bce")
    assert loss.dtype == torch.float32


def test_smoothing_moves_labels_and_the_others_as_published() -> None:
    expected = torch.tensor([[0.9, 0.025, 0.025, 0.025], [0.025, 0.9, 0.9, 0.025]])
    torch.testing.assert_close(smoothed_targets(LABELS, 0.1), expected)


def test_mixed_targets_share_out_the_labels_of_both_clips() -> None:
    mixed = mixed_targets(LABELS, OTHER, torch.tensor([0.6, 0.3]), 0.1)
    expected = torch.tensor([[0.54, 0, 0, 0.36], [0, 0.9, 0.27, 0]]) + 0.025
    torch.testing.assert_close(mixed, expected)


def test_without_smoothing_targets_are_the_labels() -> None:
    assert torch.equal(smoothed_targets(LABELS.to(torch.int64), 0.0), LABELS)
    assert torch.equal(mixed_targets(LABELS, OTHER, torch.ones(2), 0.0), LABELS)


def test_another_number_of_labels_than_classes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 4\) and targets \(2, 3\).*one class a label"):
        classification_loss(LOGITS, LABELS[:, :3], "bce")
