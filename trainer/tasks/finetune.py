"""Fine-tuning as a run sees it: the classifier, what it computes on a step's micro-batches, and its
held-out scores."""

import logging
from collections.abc import Callable, Iterable

import torch
from torch import nn

from cavmae.dataloaders.batch import AudioVideoBatch
from cavmae.trainer.config.finetune_config import FinetuneConfig
from cavmae.trainer.distributed.engine import Engine, ParamGroup
from cavmae.trainer.distributed.gathering import gather_uneven, in_step
from cavmae.trainer.losses.classification import (
    classification_loss,
    mixed_targets,
    smoothed_targets,
)
from cavmae.trainer.metrics.classification import classification_scores
from cavmae.trainer.model.classifier import CAVMAEClassifier
from cavmae.trainer.model.weights import load_classifier_weights
from cavmae.trainer.tasks.build_model import classifier
from cavmae.trainer.tasks.labels import LabelSet
from cavmae.trainer.validator import Scored

log = logging.getLogger(__name__)


class Finetuning:
    """A classifier of the run's labels.

    Args:
        config: resolved run.
        labels: its classes.
        device: this rank's device.
    """

    def __init__(self, config: FinetuneConfig, labels: LabelSet, device: torch.device) -> None:
        self._config, self._labels, self._device = config, labels, device

    def model(self) -> tuple[CAVMAEClassifier, list[ParamGroup]]:
        """The classifier with its initial weights, on CPU; what is not trained is frozen. With it
        the encoders, where they are trained, and the head, which learn at different rates.

        Raises:
            ValueError: weights that do not fit the model.
            FileNotFoundError: no such weights.
        """
        config = self._config
        model = classifier(config, len(self._labels))
        if config.initial_weights:
            load_classifier_weights(model, config.initial_weights)
        encoders, head = model.parameter_groups()
        groups = [ParamGroup(encoders, 1.0), ParamGroup(head, config.classifier.head_lr_mult)]
        return model, [group for group in groups if group.parameters]

    def task(self, before_exchange: Callable[[], None]) -> "FinetuneTask":
        """What a step computes; ranks do not meet in its forward passes."""
        return FinetuneTask(self._config, self._labels, self._device)

    @torch.no_grad()
    def score(self, model: nn.Module, batches: Iterable[AudioVideoBatch]) -> Scored:
        """Loss, mean average precision, AUC, d' and accuracy by the middle frame of each clip,
        without intervals; `cavmae evaluate classify` has them, and several frames.

        Raises:
            ValueError: a clip without a label, or with one that is no class.
        """
        parts: list[torch.Tensor] = []
        for batch, counts in in_step(batches, self._device):
            output = model(batch.log_mel, batch.frames[:, 0], mode=self._config.classifier.mode)
            if counts:
                targets = self._labels.targets(batch.labels, batch.sample_ids).to(self._device)
                parts.append(torch.stack([output.logits, targets], dim=1))
        logits, targets = gather_uneven(torch.cat(parts)).unbind(1)
        positives = targets.sum(0)
        if ((positives > 0) & (positives < len(targets))).any():
            metrics = classification_scores(logits, targets, resamples=0).as_metrics()
        else:
            log.warning(
                "the first %d clips of data.validation have no class that only some of them are "
                "of: there is no average precision and no AUC; raise evaluation.clips, or pack the "
                "set in another order",
                len(targets),
            )
            metrics = {}
        metrics["loss"] = classification_loss(logits, targets, self._config.classifier.loss).item()
        return Scored({f"val_{name}": value for name, value in metrics.items()})


class FinetuneTask:
    """Classification of a step's samples.

    Args:
        config: the run.
        labels: its classes.
        device: this rank's device.
    """

    def __init__(self, config: FinetuneConfig, labels: LabelSet, device: torch.device) -> None:
        self._config, self._labels, self._device = config, labels, device
        self._losses: list[torch.Tensor] = []

    @property
    def description(self) -> str:
        """For the log."""
        asked = self._config.classifier
        return f"{len(self._labels)} classes, {asked.mode}, {asked.loss}"

    def begin_step(self, engine: Engine, batches: list[AudioVideoBatch]) -> None:
        """Nothing spans the step's micro-batches."""
        self._losses = []

    def loss(self, engine: Engine, batch: AudioVideoBatch) -> torch.Tensor:
        """The scalar whose mean over micro-batches and ranks is the step's loss.

        Raises:
            ValueError: a clip without a label, or with one that is no class.
        """
        asked = self._config.classifier
        output = engine(batch.log_mel, batch.frames[:, 0], mode=asked.mode)
        loss = classification_loss(output.logits, self._targets(batch), asked.loss)
        self._losses.append(loss.detach())
        return loss

    def metrics(self) -> dict[str, torch.Tensor]:
        """Means over the step's micro-batches on this rank; the mean over ranks is the truth."""
        return {"loss": torch.stack(self._losses).mean()}

    def _targets(self, batch: AudioVideoBatch) -> torch.Tensor:
        """(batch, classes) float32: smoothed, and those of mixed clips shared between two."""
        smoothing = self._config.classifier.label_smoothing
        labels = self._labels.targets(batch.labels, batch.sample_ids)
        targets = smoothed_targets(labels, smoothing)
        mixed = (batch.mixup_lambda < 1).nonzero().flatten()
        if len(mixed):
            others = [batch.mixed_labels[row] for row in mixed.tolist()]
            names = [f"mixed into {batch.sample_ids[row]}" for row in mixed.tolist()]
            other_labels = self._labels.targets(others, names)
            shares = batch.mixup_lambda[mixed]
            targets[mixed] = mixed_targets(labels[mixed], other_labels, shares, smoothing)
        return targets.to(self._device)
