"""Losses of fine-tuning and the targets that they are computed on.

AudioSet clips have several labels and are trained with binary cross-entropy, VGGSound clips one and
are trained with cross-entropy (published recipes). Smoothing follows the published loader, which
gives a clip that is mixed with another slightly more than a clip that is not.
"""

from typing import Literal

import torch
import torch.nn.functional as F

LossName = Literal["bce", "cross_entropy"]


def classification_loss(
    logits: torch.Tensor, targets: torch.Tensor, name: LossName
) -> torch.Tensor:
    """The loss of a batch in float32.

    Args:
        logits: (batch, classes), any float dtype.
        targets: (batch, classes) between 0 and 1. `cross_entropy` takes them as probabilities,
            which need not add up to 1: the published smoothing leaves them slightly below.
        name: `bce` averages over clips and classes, `cross_entropy` over clips.

    Raises:
        ValueError: shapes that differ.
    """
    if logits.ndim != 2 or logits.shape != targets.shape:
        raise ValueError(
            f"logits have shape {tuple(logits.shape)} and targets {tuple(targets.shape)}; the loss "
            "needs (batch, classes) in both: give the classifier one class a label"
        )
    logits, targets = logits.float(), targets.float()
    if name == "bce":
        return F.binary_cross_entropy_with_logits(logits, targets)
    return F.cross_entropy(logits, targets)


def smoothed_targets(labels: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Targets of clips that are not mixed: 1 - smoothing where a label is, else
    smoothing / classes.

    Args:
        labels: (batch, classes), 1 where a clip has the label and 0 elsewhere.
        smoothing: 0.1 in the published recipes, 0 in evaluation.

    Returns:
        (batch, classes) float32.
    """
    present = torch.full_like(labels, 1 - smoothing, dtype=torch.float32)
    return torch.where(labels > 0, present, smoothing / labels.shape[-1])


def mixed_targets(
    labels: torch.Tensor, other_labels: torch.Tensor, share: torch.Tensor, smoothing: float
) -> torch.Tensor:
    """Targets of mixed clips: smoothing / classes everywhere, and 1 - smoothing shared between the
    labels of the two.

    Args:
        labels, other_labels: (batch, classes), 1 where a clip has the label and 0 elsewhere.
        share: (batch,) share of the first clip, between 0 and 1.
        smoothing: as in `smoothed_targets`.

    Returns:
        (batch, classes) float32.
    """
    mixed = torch.lerp(other_labels.float(), labels.float(), share.float()[:, None])
    return mixed * (1 - smoothing) + smoothing / labels.shape[-1]
