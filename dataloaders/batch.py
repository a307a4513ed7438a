"""Batches that the loaders yield to the trainer."""

from dataclasses import dataclass, replace

import torch


@dataclass
class AudioVideoBatch:
    """The clips of one micro-batch and their origin; None for what a run of one modality does not
    read."""

    log_mel: torch.Tensor | None
    """`(batch, audio_frames, mel_bins)` float32, `(log-mel - mean) / std`; padding was zero before
    normalisation."""
    frames: torch.Tensor | None
    """`(batch, frames_per_clip, 3, image_size, image_size)` float32 RGB, normalised with
    ImageNet's mean and std."""
    positions: torch.Tensor
    """`(batch,)` int64: position in the sample plan; in CPU memory as the loaders yield it."""
    epochs: torch.Tensor
    """`(batch,)` int64 in CPU memory."""
    sample_ids: tuple[str, ...]
    """Shard and key of each clip, such as `000003/000003017`."""
    labels: tuple[tuple[str, ...], ...]
    """Labels of each clip, as packed."""
    frame_seconds: torch.Tensor | None
    """`(batch, frames_per_clip)` float32 in CPU memory: presentation time of each frame."""
    audio_seconds: torch.Tensor | None
    """`(batch, 2)` float32 in CPU memory: start and length of the audio window."""
    mixup_lambda: torch.Tensor
    """`(batch,)` float32 in CPU memory: weight of the clip itself, against the clip mixed into its
    audio and frames; 1: no mixup."""
    mixed_labels: tuple[tuple[str, ...], ...]
    """Labels of the clip mixed into each; empty without mixup."""

    @property
    def frame(self) -> torch.Tensor | None:
        """`(batch, 3, image_size, image_size)`: the first frame of each clip."""
        return None if self.frames is None else self.frames[:, 0]

    def to(self, device: torch.device) -> "AudioVideoBatch":
        """Copy log-mel, frames and positions to `device`; everything else stays in CPU memory."""
        return replace(
            self,
            log_mel=None if self.log_mel is None else to_device(self.log_mel, device),
            frames=None if self.frames is None else to_device(self.frames, device),
            positions=to_device(self.positions, device),
        )


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor to `device`. To a GPU it goes through pinned memory: from any other, the host
    would wait until the copy is done."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
