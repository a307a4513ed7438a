"""Pretraining: masked reconstruction and contrast of a step's samples (paper section 3)."""

from collections.abc import Callable, Iterable

import torch
from torch import nn

from cavmae.dataloaders.batch import AudioVideoBatch
from cavmae.kernels import ContrastiveResult
from cavmae.trainer.config.configs import PretrainConfig
from cavmae.trainer.config.resolve import step_shares
from cavmae.trainer.distributed.engine import Engine, ParamGroup
from cavmae.trainer.distributed.env import Ranks
from cavmae.trainer.losses.contrastive import Pairs, concatenate, exchanged_loss, local_loss
from cavmae.trainer.losses.contrastive_groups import (
    Exchange,
    contrastive_layout,
    group_size,
    groups_span_ranks,
    micro_batch_exchanges,
    step_exchange,
)
from cavmae.trainer.model.cavmae import CAVMAE, PretrainOutput
from cavmae.trainer.model.masking import masks_of
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
        self._zero = torch.zeros((), device=device)
        self._reconstruct = config.loss.reconstruction_weight > 0
        self._contrast = config.loss.contrastive_weight > 0
        self._shares = shares = step_shares(config, ranks.world_size)
        self.group_size = group_size(config)
        self.layout = contrastive_layout(shares, self.group_size)
        # One for each exchange of a step; none where the ranks do not meet.
        self._exchanges: list[Exchange] = []
        if self._contrast and groups_span_ranks(shares, self.group_size):
            place = self.group_size, ranks.rank, device
            if self.layout == "cached":
                self._exchanges = [step_exchange(shares, *place)]
            else:
                self._exchanges = micro_batch_exchanges(shares, *place)

    @property
    def description(self) -> str:
        if self._contrast:
            return f"contrastive groups of {self.group_size} ({self.layout})"
        return f"masked reconstruction of {' and '.join(self._config.data.modalities)}"

    def build_model(self) -> tuple[CAVMAE, list[ParamGroup]]:
        model = autoencoder(self._config)
        if self._config.initial_weights:
            load_initial_weights(
                model, self._config.initial_weights, new_decoder=self._config.new_decoder
            )
        return model, []

    def begin_step(self, engine: Engine, batches: list[AudioVideoBatch]) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._next_exchange = iter(self._exchanges)
        if self._contrast and self.layout == "cached":
            self._cache_gradients(engine, batches)

    def loss(self, engine: Engine, batch: AudioVideoBatch) -> torch.Tensor:
        weights, weight = self._config.loss, self._shares.weight(len(batch.positions))
        output = self._forward(engine, batch, reconstruct=self._reconstruct)
        loss = self._zero
        if self._reconstruct:
            losses = output.reconstructions
            reconstruction = sum(losses.values(), self._zero)
            loss = loss + weights.reconstruction_weight * weight * reconstruction
            for modality, of_modality in losses.items():
                self._add(f"loss_reconstruction_{modality}", of_modality, weight)
        if self._contrast:
            result = self._contrastive(self._pairs(output, batch.positions))
            loss = loss + weights.contrastive_weight * weight * result.loss
            self._add("loss_contrastive", result.loss, weight)
            self._add("contrastive_accuracy", result.accuracy, weight)
        self._add("loss", loss)
        return loss * weights.scale

    def metrics(self) -> dict[str, torch.Tensor]:
        return {name: total / self._shares.accumulation for name, total in self._sums.items()}

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
        masks = masks_of(
            config.data.modalities, config.model, config.mask, batch.positions, seed=config.seed
        )
        return engine(
            batch.log_mel,
            batch.frame,
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

    def _contrastive(self, own: Pairs) -> ContrastiveResult:
        """Compute the mean over the clips of a micro-batch."""
        if self.layout != "cached":
            return self._group_loss(own)
        # The rank's mean over the step as value, with this micro-batch's part of its gradient.
        audio_gradient, video_gradient = next(self._cached)
        surrogate = (own.audio * audio_gradient).sum() + (own.video * video_gradient).sum()
        result = self._step_result
        loss = result.loss + (surrogate - surrogate.detach())
        return ContrastiveResult(loss, result.accuracy)

    def _group_loss(self, own: Pairs) -> ContrastiveResult:
        """Compute the mean over this rank's clips of whole groups: those of a micro-batch, or of
        the step."""
        exchange = next(self._next_exchange, None)
        if exchange is None:
            return local_loss(own, self._config.loss, self.group_size)
        self._before_sync()
        return exchanged_loss(own, self._config.loss, exchange)

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
        lengths = [len(batch.positions) for batch in batches]
        # A clip's part in the mean of its micro-batch is larger than in that of all.
        self._cached = iter(
            [
                (of_audio * (len(own.positions) / count), of_video * (len(own.positions) / count))
                for of_audio, of_video, count in zip(
                    audio.split(lengths), video.split(lengths), lengths, strict=True
                )
            ]
        )

    def _add(self, name: str, value: torch.Tensor, weight: float = 1.0) -> None:
        before = self._sums.get(name, self._zero)
        self._sums[name] = torch.add(before, value.detach(), alpha=weight)
