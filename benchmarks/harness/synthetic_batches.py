"""A loader and a model that cost next to nothing, for benchmarks of what is around them."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from cavmae.dataloaders.batch import AudioVideoBatch
from cavmae.dataloaders.config import ClipShape, DataConfig
from cavmae.dataloaders.loading.quarantine import QuarantinedSample
from cavmae.dataloaders.sampling.sample_plan import rank_positions
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
        shape, global_batch, micro_batch, lanes, rank, world_size, device: as the loader takes them.
        unused: what else the loader takes.
    """

    def __init__(
        self,
        config: DataConfig,
        shape: ClipShape,
        *,
        global_batch: int,
        micro_batch: int,
        lanes: int,
        rank: int,
        world_size: int,
        device: torch.device,
        **unused: Any,
    ) -> None:
        self.wait_seconds = 0.0
        self.quarantine: tuple[QuarantinedSample, ...] = ()
        self._micro_batch, self._global_batch = micro_batch, global_batch
        self._offsets = rank_positions(0, rank, world_size, global_batch, lanes)
        side = shape.image_size
        self._log_mel = torch.randn(micro_batch, shape.audio_frames, shape.mel_bins, device=device)
        self._frames = torch.randn(micro_batch, 1, 3, side, side, device=device)

    def __iter__(self) -> Iterator[AudioVideoBatch]:
        batch = self._micro_batch
        for step in itertools.count():
            own = step * self._global_batch + self._offsets
            for positions in np.split(own, len(own) // batch):
                yield AudioVideoBatch(
                    log_mel=self._log_mel,
                    frames=self._frames,
                    positions=torch.from_numpy(positions),
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
