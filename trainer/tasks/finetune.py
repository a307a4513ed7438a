"""Fine-tuning: a classifier of a run's labels, its loss and its validation."""

import logging
from collections.abc import Iterable

import torch
from torch import nn

from cavmae.dataloaders.batch import AudioVideoBatch, to_device
from cavmae.trainer.config.configs import FinetuneConfig
from cavmae.trainer.config.resolve import step_shares
from cavmae.trainer.distributed.collectives import gather_uneven, in_lockstep
from cavmae.trainer.distributed.engine import Engine, ParamGroup
from cavmae.trainer.distributed.env import Ranks
from cavmae.trainer.losses.classification import (
    classification_loss,
    mixed_targets,
    smoothed_targets,
)
from cavmae.trainer.metrics.classification import classification_scores
from cavmae.trainer.model.classifier import CAVMAEClassifier
from cavmae.trainer.model.weights import load_initial_weights
from cavmae.trainer.tasks.build_model import classifier
from cavmae.trainer.tasks.labels import LabelSet
from cavmae.trainer.tasks.task import Validation

log = logging.getLogger(__name__)


class FinetuneTask:
    """A classifier of the run's labels; a `Task`. Ranks do not meet in its forward passes.

    Args:
        config: resolved run.
        labels: its classes.
        ranks: this process's rank.
        device: this rank's device.
    """

    def __init__(
        self, config: FinetuneConfig, labels: LabelSet, ranks: Ranks, device: torch.device
    ) -> None:
        self._config, self._labels, self._device = config, labels, device
        self._shares = step_shares(config, ranks.world_size)
        self._losses: list[torch.Tensor] = []

    @property
    def description(self) -> str:
        settings = self._config.classifier
        return f"{len(self._labels)} classes, {settings.mode}, {settings.loss}"

    def build_model(self) -> tuple[CAVMAEClassifier, list[ParamGroup]]:
        """Build the classifier; the groups are the encoders, if they are trained, and the head."""
        config = self._config
        model = classifier(config, len(self._labels))
        if config.initial_weights:
            load_initial_weights(model, config.initial_weights)
        encoders, head = model.parameter_groups()
        groups = [ParamGroup(encoders, 1.0), ParamGroup(head, config.classifier.head_lr_mult)]
        return model, [group for group in groups if group.parameters]

    def begin_step(self, engine: Engine, batches: list[AudioVideoBatch]) -> None:
        self._losses = []

    def loss(self, engine: Engine, batch: AudioVideoBatch) -> torch.Tensor:
        """Compute the classification loss of a micro-batch.

        Raises:
            ValueError: a clip has no label, or one that is not a class.
        """
        settings = self._config.classifier
        output = engine(batch.log_mel, batch.frame, mode=settings.mode)
        loss = classification_loss(output.logits, self._targets(batch), settings.loss)
        loss = loss * self._shares.weight(len(batch.positions))
        self._losses.append(loss.detach())
        return loss

    def metrics(self) -> dict[str, torch.Tensor]:
        return {"loss": torch.stack(self._losses).mean()}

    @torch.no_grad()
    def validate(self, model: nn.Module, batches: Iterable[AudioVideoBatch]) -> Validation:
        """Compute loss, mAP, AUC, d' and accuracy by the middle frame of each clip.

        `cavmae evaluate classify` has confidence intervals as well, and several frames.

        Raises:
            ValueError: a clip has no label, or one that is not a class.
        """
        parts: list[torch.Tensor] = []
        for batch, counts in in_lockstep(batches, self._device):
            output = model(batch.log_mel, batch.frame, mode=self._config.classifier.mode)
            if counts:
                targets = self._labels.targets(batch.labels, batch.sample_ids).to(self._device)
                parts.append(torch.stack([output.logits, targets], dim=1))
        logits, targets = gather_uneven(torch.cat(parts)).unbind(1)
        positives = targets.sum(0)
        metrics: dict[str, float] = {}
        if ((positives > 0) & (positives < len(targets))).any():
            metrics |= classification_scores(logits, targets, resamples=0).as_metrics()
        else:
            log.warning(
                "the first %d clips of data.validation all have the same classes, so there is no "
                "mAP and no AUC; raise validation.clips, or pack the set in another order",
                len(targets),
            )
        metrics["loss"] = classification_loss(logits, targets, self._config.classifier.loss).item()
        return Validation({f"val_{name}": value for name, value in metrics.items()})

    def _targets(self, batch: AudioVideoBatch) -> torch.Tensor:
        """Return (batch, classes) float32 targets: smoothed, and mixed for mixed clips."""
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
        return to_device(targets, self._device)
