"""Pretraining as a run sees it: the model, what a step computes, held-out scores and pictures."""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn

from cavmae.dataloaders.batch import AudioVideoBatch
from cavmae.trainer.config.configs import PretrainConfig
from cavmae.trainer.distributed.engine import ParamGroup
from cavmae.trainer.distributed.env import Ranks
from cavmae.trainer.model.cavmae import CAVMAE
from cavmae.trainer.model.weights import load_initial_weights
from cavmae.trainer.tasks.build_model import autoencoder
from cavmae.trainer.tasks.pretrain import PretrainTask
from cavmae.trainer.tasks.pretrain_validation import Evaluation, evaluate
from cavmae.trainer.tracking.figures import plot_reconstructions, plot_similarity
from cavmae.trainer.validator import Scored


class Pretraining:
    """The masked autoencoder with its contrastive loss.

    Args:
        config: resolved run.
        ranks: this process's place.
        device: this rank's device.
    """

    def __init__(self, config: PretrainConfig, ranks: Ranks, device: torch.device) -> None:
        self._config, self._ranks, self._device = config, ranks, device

    def model(self) -> tuple[CAVMAE, list[ParamGroup]]:
        """The model with its initial weights, on CPU; what no loss uses is frozen. All parameters
        learn alike.

        Raises:
            ValueError: weights that do not fit the model.
            FileNotFoundError: no such weights.
        """
        model = autoencoder(self._config)
        if self._config.initial_weights:
            load_initial_weights(model, self._config.initial_weights)
        return model, []

    def task(self, before_exchange: Callable[[], None]) -> PretrainTask:
        """What a step computes.

        Args:
            before_exchange: called when the ranks are about to exchange embeddings.
        """
        return PretrainTask(
            self._config,
            rank=self._ranks.rank,
            world_size=self._ranks.world_size,
            device=self._device,
            before_exchange=before_exchange,
        )

    def score(self, model: nn.Module, batches: Iterable[AudioVideoBatch]) -> Scored:
        """Both losses and retrieval; pictures of reconstructions and similarities.

        Raises:
            ValueError: fewer than two clips in all.
        """
        evaluation = evaluate(
            model, batches, self._config, pictures=self._config.pictures, device=self._device
        )
        return Scored(evaluation.metrics, lambda folder, step: self._draw(evaluation, folder, step))

    def _draw(self, evaluation: Evaluation, folder: Path, step: int) -> list[Path]:
        paths = [folder / f"similarity-step-{step:09d}.png"]
        plot_similarity(paths[0], evaluation.similarity)
        clips = evaluation.pictures
        if clips.predicted_audio is not None and clips.predicted_video is not None:
            paths.append(folder / f"reconstruction-step-{step:09d}.png")
            plot_reconstructions(
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
