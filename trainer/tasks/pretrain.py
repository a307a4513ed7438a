"""What pretraining computes on a step's micro-batches; the loop and engine know nothing of it."""

from collections.abc import Callable

import torch

from cavmae.dataloaders.batch import AudioVideoBatch
from cavmae.kernels import ContrastiveResult
from cavmae.trainer.config.configs import PretrainConfig
from cavmae.trainer.distributed.engine import Engine
from cavmae.trainer.losses.contrastive import Pairs, concatenate, exchanged_loss, local_loss
from cavmae.trainer.losses.contrastive_groups import contrastive_layout, own_groups
from cavmae.trainer.model.cavmae import PretrainOutput
from cavmae.trainer.model.masking import random_masks


class PretrainTask:
    """Masked reconstruction and contrast of a step's samples.

    In bf16 runs the similarities are those of embeddings rounded to bf16, which halves what ranks
    exchange.

    Args:
        config: resolved: `lanes` is set.
        rank, world_size: this process among the run's ranks.
        device: this rank's device.
        before_exchange: called when the ranks are about to exchange embeddings.
    """

    def __init__(
        self,
        config: PretrainConfig,
        *,
        rank: int,
        world_size: int,
        device: torch.device,
        before_exchange: Callable[[], None] = lambda: None,
    ) -> None:
        self._config = config
        self._before_exchange = before_exchange
        self._device = device
        self._reconstruct = config.loss.reconstruction_weight > 0
        self._contrast = config.loss.contrastive_weight > 0
        self.group_size = config.loss.contrastive_group or config.global_batch
        self.layout = contrastive_layout(
            group_size=self.group_size,
            global_batch=config.global_batch,
            micro_batch=config.micro_batch,
            lanes=config.lanes,
            world_size=world_size,
        )
        self._groups = own_groups(
            group_size=self.group_size,
            global_batch=config.global_batch,
            lanes=config.lanes,
            rank=rank,
            world_size=world_size,
            device=device,
        )
        self._alone = all(len(group.own) == self.group_size for group in self._groups)
        self._cached: dict[int, Pairs] = {}

    @property
    def description(self) -> str:
        """For the log."""
        return f"contrastive groups of {self.group_size} ({self.layout})"

    def begin_step(self, engine: Engine, batches: list[AudioVideoBatch]) -> None:
        """Prepare what spans the step's micro-batches; called once with all of them."""
        self._cached = {}
        self._sums: dict[str, torch.Tensor] = {}
        self._micro_batches = len(batches)
        if self._contrast and self.layout == "cached":
            self._cache_gradients(engine, batches)

    def loss(self, engine: Engine, batch: AudioVideoBatch) -> torch.Tensor:
        """The scalar whose mean over micro-batches and ranks is the step's loss."""
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
            loss = loss + weights.contrastive_weight * self._contrastive(output, batch.positions)
        self._add("loss", loss)
        return loss * weights.scale

    def metrics(self) -> dict[str, torch.Tensor]:
        """Means over the step's micro-batches on this rank; the mean over ranks is the truth."""
        return {name: total / self._micro_batches for name, total in self._sums.items()}

    def _forward(
        self, engine: Engine, batch: AudioVideoBatch, *, reconstruct: bool
    ) -> PretrainOutput:
        config = self._config
        audio_mask, video_mask = random_masks(
            config.model,
            batch.positions.to(self._device),
            seed=config.seed,
            audio_ratio=config.mask.audio_ratio,
            video_ratio=config.mask.video_ratio,
            audio_mode=config.mask.audio_mode,
        )
        return engine(
            batch.log_mel,
            batch.frames[:, 0],
            audio_mask,
            video_mask,
            reconstruct=reconstruct,
            contrast=self._contrast,
            norm_pix=config.loss.norm_pix,
        )

    def _contrastive(self, output: PretrainOutput, positions: torch.Tensor) -> torch.Tensor:
        own = self._pairs(output, positions)
        if self.layout == "cached":
            return self._cached_contrastive(own)
        result = self._group_loss(own)
        self._add("loss_contrastive", result.loss)
        self._add("contrastive_accuracy", result.accuracy)
        return result.loss

    def _group_loss(self, own: Pairs) -> ContrastiveResult:
        """Loss of whole groups: those of a micro-batch, or of the step."""
        if self._alone:
            return local_loss(own, self._config.loss, self.group_size)
        self._before_exchange()
        return exchanged_loss(own, self._config.loss, self._groups)

    def _cached_contrastive(self, own: Pairs) -> torch.Tensor:
        """The step's loss as value, with this micro-batch's part of its gradient."""
        cached = self._cached[int(own.positions[0])]
        surrogate = (own.audio * cached.audio).sum() + (own.video * cached.video).sum()
        self._add("loss_contrastive", self._step_contrastive.loss)
        self._add("contrastive_accuracy", self._step_contrastive.accuracy)
        return self._step_contrastive.loss + (surrogate - surrogate.detach())

    def _cache_gradients(self, engine: Engine, batches: list[AudioVideoBatch]) -> None:
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
        result.loss = result.loss.detach()
        self._step_contrastive = result
        # The engine takes the mean over micro-batches; each sample is in one of them.
        factor = len(batches)
        lengths = [len(batch.positions) for batch in batches]
        for batch, of_audio, of_video in zip(
            batches, audio.split(lengths), video.split(lengths), strict=True
        ):
            first = int(batch.positions[0])
            self._cached[first] = Pairs(of_audio * factor, of_video * factor, batch.positions)

    def _pairs(self, output: PretrainOutput, positions: torch.Tensor) -> Pairs:
        assert output.audio_embedding is not None and output.video_embedding is not None
        dtype = torch.bfloat16 if self._config.engine.dtype == "bf16" else torch.float32
        return Pairs(
            output.audio_embedding.to(dtype),
            output.video_embedding.to(dtype),
            positions.to(self._device),
        )

    def _add(self, name: str, value: torch.Tensor) -> None:
        self._sums[name] = self._sums.get(name, 0) + value.detach()
