"""Pretraining: masked reconstruction and contrast of a step's samples (paper section 3)."""

from collections.abc import Callable, Iterable

import torch
from torch import nn

from cavmae.dataloaders.batch import AudioVideoBatch
from cavmae.kernels import ContrastiveResult
from cavmae.trainer.config.configs import PretrainConfig
from cavmae.trainer.distributed.engine import Engine, ParamGroup
from cavmae.trainer.distributed.env import Ranks
from cavmae.trainer.losses.contrastive import Pairs, concatenate, exchanged_loss, local_loss
from cavmae.trainer.losses.contrastive_groups import own_groups, step_layout
from cavmae.trainer.model.cavmae import CAVMAE, PretrainOutput
from cavmae.trainer.model.masking import random_masks
from cavmae.trainer.model.weights import load_initial_weights
from cavmae.trainer.tasks.build_model import autoencoder
from cavmae.trainer.tasks.pretrain_validation import score
from cavmae.trainer.tasks.task import Validation


class PretrainTask:
    """The masked autoencoder with its contrastive loss; a `Task`.

    In bf16 runs the similarities are those of embeddings rounded to bf16, which halves the bytes
    that ranks exchange.

    Args:
        config: resolved: `lanes` is set.
        ranks: this process's rank.
        device: this rank's device.
        before_sync: called when this rank is about to wait for the others' embeddings.
    """

    def __init__(
        self,
        config: PretrainConfig,
        ranks: Ranks,
        device: torch.device,
        before_sync: Callable[[], None] = lambda: None,
    ) -> None:
        self._config = config
        self._device = device
        self._before_sync = before_sync
        self._reconstruct = config.loss.reconstruction_weight > 0
        self._contrast = config.loss.contrastive_weight > 0
        self.group_size = config.loss.contrastive_group or config.global_batch
        self.layout = step_layout(config, ranks.world_size, config.micro_batch)
        self._groups = own_groups(
            group_size=self.group_size,
            global_batch=config.global_batch,
            lanes=config.lanes,
            rank=ranks.rank,
            world_size=ranks.world_size,
            device=device,
        )
        self._alone = all(len(group.own) == self.group_size for group in self._groups)

    @property
    def description(self) -> str:
        return f"contrastive groups of {self.group_size} ({self.layout})"

    def build_model(self) -> tuple[CAVMAE, list[ParamGroup]]:
        model = autoencoder(self._config)
        if self._config.initial_weights:
            load_initial_weights(model, self._config.initial_weights)
        return model, []

    def begin_step(self, engine: Engine, batches: list[AudioVideoBatch]) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._micro_batches = len(batches)
        if self._contrast and self.layout == "cached":
            self._cache_gradients(engine, batches)

    def loss(self, engine: Engine, batch: AudioVideoBatch) -> torch.Tensor:
        weights = self._config.loss
        output = self._forward(engine, batch, reconstruct=self._reconstruct)
        loss = torch.zeros((), device=self._device)
        if self._reconstruct:
            assert output.reconstruction_audio is not None
            assert output.reconstruction_video is not None
            reconstruction = output.reconstruction_audio + output.reconstruction_video
            loss = loss + weights.reconstruction_weight * reconstruction
            self._add("loss_reconstruction_audio", output.reconstruction_audio)
            self._add("loss_reconstruction_video", output.reconstruction_video)
        if self._contrast:
            pairs = self._pairs(output, batch.positions)
            loss = loss + weights.contrastive_weight * self._contrastive(pairs)
        self._add("loss", loss)
        return loss * weights.scale

    def metrics(self) -> dict[str, torch.Tensor]:
        return {name: total / self._micro_batches for name, total in self._sums.items()}

    def validate(self, model: nn.Module, batches: Iterable[AudioVideoBatch]) -> Validation:
        """Compute both losses and retrieval, with figures of reconstructions and similarities.

        Raises:
            ValueError: there are fewer than two clips in all.
        """
        return score(model, batches, self._config, self._device)

    def _forward(
        self, engine: Engine, batch: AudioVideoBatch, *, reconstruct: bool
    ) -> PretrainOutput:
        config = self._config
        masks = random_masks(config.model, config.mask, batch.positions, seed=config.seed)
        return engine(
            batch.log_mel,
            batch.frames[:, 0],
            *masks,
            reconstruct=reconstruct,
            contrast=self._contrast,
            norm_pix=config.loss.norm_pix,
        )

    def _pairs(self, output: PretrainOutput, positions: torch.Tensor) -> Pairs:
        assert output.audio_embedding is not None and output.video_embedding is not None
        dtype = torch.bfloat16 if self._config.engine.dtype == "bf16" else torch.float32
        return Pairs(
            output.audio_embedding.to(dtype),
            output.video_embedding.to(dtype),
            positions,
        )

    def _contrastive(self, own: Pairs) -> torch.Tensor:
        if self.layout != "cached":
            result = self._group_loss(own)
            loss = result.loss
        else:  # the step's loss as value, with this micro-batch's part of its gradient
            result = self._step_result
            audio_gradient, video_gradient = next(self._cached)
            surrogate = (own.audio * audio_gradient).sum() + (own.video * video_gradient).sum()
            loss = result.loss + (surrogate - surrogate.detach())
        self._add("loss_contrastive", result.loss)
        self._add("contrastive_accuracy", result.accuracy)
        return loss

    def _group_loss(self, own: Pairs) -> ContrastiveResult:
        """Compute the loss of whole groups: those of a micro-batch, or of the step."""
        if self._alone:
            return local_loss(own, self._config.loss, self.group_size)
        self._before_sync()
        return exchanged_loss(own, self._config.loss, self._groups)

    def _cache_gradients(self, engine: Engine, batches: list[AudioVideoBatch]) -> None:
        """Compute the step's contrastive loss and its gradient by embedding, for `loss` to use."""
        with torch.no_grad():
            parts = [
                self._pairs(self._forward(engine, batch, reconstruct=False), batch.positions)
                for batch in batches
            ]
        own = concatenate(parts)
        own.audio.requires_grad_()
        own.video.requires_grad_()
        result = self._group_loss(own)
        audio, video = torch.autograd.grad(result.loss, [own.audio, own.video])
        self._step_result = ContrastiveResult(result.loss.detach(), result.accuracy)
        # The engine takes the mean over micro-batches; each sample is in one of them.
        audio, video = audio * len(batches), video * len(batches)
        lengths = [len(batch.positions) for batch in batches]
        self._cached = iter(list(zip(audio.split(lengths), video.split(lengths), strict=True)))

    def _add(self, name: str, value: torch.Tensor) -> None:
        self._sums[name] = self._sums.get(name, 0) + value.detach()
