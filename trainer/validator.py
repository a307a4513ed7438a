"""Validation during a run: scores and figures on clips that are never trained on."""

import logging
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn

from cavmae.dataloaders.batch import AudioVideoBatch
from cavmae.dataloaders.config import ClipShape
from cavmae.dataloaders.loading.loader import ValidationLoader
from cavmae.trainer.config.configs import RunConfig
from cavmae.trainer.distributed.env import Ranks
from cavmae.trainer.tasks.task import Validation
from cavmae.trainer.tracking.run_logger import RunLogger

log = logging.getLogger(__name__)


class Validator:
    """Scores models on `data.validation`; does nothing if that is empty.

    Args:
        config: resolved run.
        ranks: this process's rank.
        device: this rank's device.
        validate: `Task.validate`.
        logger: gets scores and figures.

    Attributes:
        scores: metrics of the last validation.
    """

    def __init__(
        self,
        config: RunConfig,
        ranks: Ranks,
        device: torch.device,
        validate: Callable[[nn.Module, Iterable[AudioVideoBatch]], Validation],
        logger: RunLogger,
    ) -> None:
        self._config, self._ranks, self._device = config, ranks, device
        self._validate, self._logger = validate, logger
        self.scores: dict[str, float] = {}

    @property
    def enabled(self) -> bool:
        return bool(self._config.data.validation)

    def score(self, model: nn.Module, step: int, prefix: str = "val") -> None:
        """Score a model after `step` optimizer steps; all ranks call it.

        Args:
            model: the model, on this rank's device.
            step: optimizer steps done.
            prefix: what logged metrics begin with; in `scores` they always begin with `val`.
        """
        if not self.enabled:
            return
        config = self._config
        loader = ValidationLoader(
            config.data,
            ClipShape(config.model.audio_frames, config.model.mel_bins, config.model.image_size),
            folder=config.data.validation,
            batch=config.micro_batch,
            rank=self._ranks.rank,
            world_size=self._ranks.world_size,
            device=self._device,
            limit=config.validation.clips,
        )
        model.eval()
        try:
            validation = self._validate(model, (batch.to(self._device) for batch in loader))
        finally:
            model.train()
            loader.close()
        self.scores = validation.metrics
        logged = {prefix + name.removeprefix("val"): x for name, x in self.scores.items()}
        self._logger.log_scores(logged, step)
        if self._ranks.rank == 0:
            try:
                for path in validation.draw(Path(config.run_dir) / "figures", step):
                    self._logger.log_figure(path)
            except OSError as error:
                log.warning("figures of step %d could not be written: %s", step, error)
