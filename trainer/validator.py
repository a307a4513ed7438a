"""Scores and figures on clips that are never trained on, during a run."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from cavmae.dataloaders.batch import AudioVideoBatch, ClipShape
from cavmae.dataloaders.loading.loader import ValidationLoader
from cavmae.trainer.config.configs import RunConfig
from cavmae.trainer.distributed.env import Ranks
from cavmae.trainer.tracking.run_logger import RunLogger


@dataclass(frozen=True)
class Scored:
    """Held-out clips, scored.

    Attributes:
        metrics: by name, the same on all ranks.
        draw: writes figures to a folder, named for a step, and returns their paths; one rank
            calls it.
    """

    metrics: dict[str, float]
    draw: Callable[[Path, int], list[Path]] = lambda folder, step: []


Scorer = Callable[[nn.Module, Iterable[AudioVideoBatch]], Scored]
"""Scores a model on this rank's part of the clips; all ranks call it. Positions of the batches are
the clips' places in the set."""


class Validator:
    """Scores the run's model on `data.validation`; does nothing where that is empty.

    Args:
        config: resolved run.
        shape: what the model takes.
        ranks: this process's place.
        scorer: what is scored.
        logger: where scores and figures go.
        device: this rank's device.

    Attributes:
        scores: metrics of the last evaluation.
    """

    def __init__(
        self,
        config: RunConfig,
        shape: ClipShape,
        ranks: Ranks,
        scorer: Scorer,
        logger: RunLogger,
        *,
        device: torch.device,
    ) -> None:
        self._config, self._shape, self._ranks = config, shape, ranks
        self._scorer, self._logger, self._device = scorer, logger, device
        self.scores: dict[str, float] = {}

    @property
    def there(self) -> bool:
        """Whether there are held-out clips."""
        return bool(self._config.data.validation)

    def score(self, model: nn.Module, step: int, kind: str = "val") -> None:
        """Evaluate after `step` optimizer steps; all ranks call it.

        Args:
            model: what is scored.
            step: of the run.
            kind: what the scores are reported as; `scores` has them as `val_`.
        """
        config = self._config
        if not self.there:
            return
        loader = ValidationLoader(
            config.data,
            self._shape,
            folder=config.data.validation,
            batch=config.micro_batch,
            rank=self._ranks.rank,
            world_size=self._ranks.world_size,
            device=self._device,
            limit=config.evaluation.clips,
        )
        model.eval()
        try:
            scored = self._scorer(model, (batch.to(self._device) for batch in loader))
        finally:
            model.train()
            loader.close()
        self.scores = scored.metrics
        reported = {name.replace("val", kind, 1): value for name, value in scored.metrics.items()}
        self._logger.log_scores(reported, step)
        if self._ranks.rank == 0:
            for path in scored.draw(Path(config.run_dir) / "figures", step):
                self._logger.log_figure(path)
