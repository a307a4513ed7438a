"""Scores and pictures on clips that are never trained on, during a run."""

from pathlib import Path

import torch

from cavmae.dataloaders.batch import ClipShape
from cavmae.dataloaders.loader import ValidationLoader
from cavmae.trainer.config import PretrainConfig
from cavmae.trainer.engine import Engine
from cavmae.trainer.evaluate import Evaluation, evaluate
from cavmae.trainer.pictures import reconstruction_picture, similarity_picture
from cavmae.trainer.ranks import Ranks
from cavmae.trainer.report import RunReport


class HeldOut:
    """Evaluates the run's model on `data.validation`; does nothing where that is empty.

    Args:
        config: resolved run.
        shape: what the model takes.
        ranks: this process's place.
        engine: the model.
        report: where scores and pictures go.
        device: this rank's device.

    Attributes:
        scores: metrics of the last evaluation.
    """

    def __init__(
        self,
        config: PretrainConfig,
        shape: ClipShape,
        ranks: Ranks,
        engine: Engine,
        report: RunReport,
        *,
        device: torch.device,
    ) -> None:
        self._config, self._shape, self._ranks = config, shape, ranks
        self._engine, self._report, self._device = engine, report, device
        self.scores: dict[str, float] = {}

    def score(self, step: int) -> None:
        """Evaluate after `step` optimizer steps; all ranks call it."""
        config = self._config
        if not config.data.validation:
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
        try:
            evaluation = evaluate(
                self._engine,
                (batch.to(self._device) for batch in loader),
                config,
                pictures=config.evaluation.pictures,
                device=self._device,
            )
        finally:
            loader.close()
        self.scores = evaluation.metrics
        self._report.scores(evaluation.metrics, step)
        if self._ranks.rank == 0:
            for path in self._draw(evaluation, step):
                self._report.picture(path)

    def _draw(self, evaluation: Evaluation, step: int) -> list[Path]:
        folder = Path(self._config.run_dir) / "pictures"
        paths = [folder / f"similarity-step-{step:09d}.png"]
        similarity_picture(paths[0], evaluation.similarity)
        clips = evaluation.pictures
        if clips.predicted_audio is not None and clips.predicted_video is not None:
            paths.append(folder / f"reconstruction-step-{step:09d}.png")
            reconstruction_picture(
                paths[1],
                clips.log_mel,
                clips.frame,
                clips.audio_mask,
                clips.video_mask,
                clips.predicted_audio,
                clips.predicted_video,
                norm_pix=self._config.loss.norm_pix,
            )
        return paths
