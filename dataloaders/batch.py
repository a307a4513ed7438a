"""What the loaders hand out and the trainer takes."""

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class ClipShape:
    """The shape that a model wants its clips in."""

    audio_frames: int
    """Frames of the log-mel, one each 10 ms; shorter clips are padded, longer ones cut."""
    mel_bins: int
    """Mel filters."""
    image_size: int
    """Height and width of a video frame in pixels."""


@dataclass
class AudioVideoBatch:
    """Clips of one micro-batch with where they come from."""

    log_mel: torch.Tensor
    """`(batch, audio_frames, mel_bins)` float32, `(log-mel - mean) / deviation`; padding was zero
    before that."""
    frames: torch.Tensor
    """`(batch, frames_per_clip, 3, image_size, image_size)` float32 RGB, normalised with
    ImageNet's mean and deviation."""
    positions: torch.Tensor
    """`(batch,)` int64 in CPU memory: place in the sample plan."""
    epochs: torch.Tensor
    """`(batch,)` int64 in CPU memory."""
    sample_ids: tuple[str, ...]
    """Shard and key of each clip, such as `000003/000003017`."""
    labels: tuple[tuple[str, ...], ...]
    """Labels of each clip, as packed."""
    frame_seconds: torch.Tensor
    """`(batch, frames_per_clip)` float32 in CPU memory: presentation time of each frame."""
    audio_seconds: torch.Tensor
    """`(batch, 2)` float32 in CPU memory: start and length of the audio that was heard."""
    shares: torch.Tensor
    """`(batch,)` float32 in CPU memory: share of the clip itself where another one is mixed into
    sound and frames; 1 where none is."""
    mixed_labels: tuple[tuple[str, ...], ...]
    """Labels of the clip that is mixed into each; empty where none is."""

    def to(self, device: torch.device) -> "AudioVideoBatch":
        """The batch with log-mel and frames on `device`; everything else stays in CPU memory."""
        return replace(
            self,
            log_mel=self.log_mel.to(device, non_blocking=True),
            frames=self.frames.to(device, non_blocking=True),
        )
