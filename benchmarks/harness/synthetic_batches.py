"""A loader and a model that cost next to nothing, for benchmarks of what is around them."""

import itertools
from collections.abc import Iterator
from typing import Any

import torch

from cavmae.dataloaders.batch import AudioVideoBatch
from cavmae.dataloaders.config import ClipShape, DataConfig
from cavmae.dataloaders.loading.quarantine import QuarantinedSample
from cavmae.dataloaders.sampling.step_shares import StepShares
from cavmae.trainer.model.config import ModelConfig

TINY_MODEL = ModelConfig(
    audio_frames=192,
    mel_bins=32,
    image_size=32,
    width=32,
    modality_depth=1,
    heads=4,
    decoder_width=32,
    decoder_depth=1,
    decoder_heads=4,
)


class SyntheticBatches:
    """Stands for `TrainLoader`: the same random clips in every batch, on the device before they are
    asked for, at the positions of the plan.

    Args:
        config: not used: nothing is read.
        shape, shares, rank, device: as the loader takes them.
        unused: what else the loader takes.
    """

    def __init__(
        self,
        config: DataConfig,
        shape: ClipShape,
        *,
        shares: StepShares,
        rank: int,
        device: torch.device,
        **unused: Any,
    ) -> None:
        self.wait_seconds = 0.0
        self.quarantine: tuple[QuarantinedSample, ...] = ()
        self._global_batch, self._parts = shares.global_batch, shares.micro_batches(rank)
        side = shape.image_size
        most = shares.largest_micro_batch
        self._log_mel = torch.randn(most, shape.audio_frames, shape.mel_bins, device=device)
        self._frames = torch.randn(most, 1, 3, side, side, device=device)

    def __iter__(self) -> Iterator[AudioVideoBatch]:
        for step in itertools.count():
            for offsets in self._parts:
                batch = len(offsets)
                yield AudioVideoBatch(
                    log_mel=self._log_mel[:batch],
                    frames=self._frames[:batch],
                    positions=torch.from_numpy(step * self._global_batch + offsets),
                    epochs=torch.zeros(batch, dtype=torch.int64),
                    sample_ids=("synthetic",) * batch,
                    labels=((),) * batch,
                    frame_seconds=torch.zeros(batch, 1),
                    audio_seconds=torch.zeros(batch, 2),
                    mixup_lambda=torch.ones(batch),
                    mixed_labels=((),) * batch,
                )

    def close(self) -> None:
        """Nothing is open."""
