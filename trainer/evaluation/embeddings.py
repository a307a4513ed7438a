"""Frozen features of the clips of a packed set: what a trained model makes of sound and picture.

Scores take them from memory (`embed`), `cavmae embed` writes them to disk.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from cavmae.dataloaders.batch import AudioVideoBatch
from cavmae.dataloaders.constants import FRAMES_PER_CLIP, MIDDLE_FRAME
from cavmae.dataloaders.loading.loader import ValidationLoader
from cavmae.trainer.config.configs import RunConfig
from cavmae.trainer.evaluation.inference import (
    Forward,
    clip_outputs,
    output_batches,
    whole_clips,
)
from cavmae.trainer.model.encoder import AudioVideoEncoder


@dataclass(frozen=True)
class Embeddings:
    """Of a set's clips, in packing order.

    Attributes:
        audio, video: (clips, width) float32 on CPU, not normalised.
        sample_ids: of each clip.
        labels: of each clip.
        left_out: sample ids that can't be decoded, each with its reason.
    """

    audio: torch.Tensor
    video: torch.Tensor
    sample_ids: tuple[str, ...]
    labels: tuple[tuple[str, ...], ...]
    left_out: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class EmbeddedBatch:
    """Some clips of a set, in packing order.

    Attributes:
        audio: (clips, width) on CPU, not normalised.
        frames: (clips, frames, width) on CPU, not normalised: each frame by itself.
        frame_seconds: (clips, frames) float32, when each is shown.
        positions: (clips,) int64, places in packing order.
        sample_ids: of each clip.
        labels: of each clip.
    """

    audio: torch.Tensor
    frames: torch.Tensor
    frame_seconds: torch.Tensor
    positions: torch.Tensor
    sample_ids: tuple[str, ...]
    labels: tuple[tuple[str, ...], ...]

    @property
    def video(self) -> torch.Tensor:
        """(clips, width): of the frame that is used where there is one only."""
        return middle_frame(self.frames)


def middle_frame(frames: torch.Tensor) -> torch.Tensor:
    """(clips, frames, ...) to (clips, ...): of the frame that is used where there is one only."""
    return frames[:, frames.shape[1] * MIDDLE_FRAME // FRAMES_PER_CLIP]


def embedded_batches(
    model: AudioVideoEncoder, loader: ValidationLoader, dtype: torch.dtype
) -> Iterator[EmbeddedBatch]:
    """Embed the sound and each frame of the loader's clips, unmasked, in float32.

    Args:
        model: set to evaluate.
        loader: of whole clips.
        dtype: what the embeddings are rounded to.

    Raises:
        ValueError: an embedding is not finite.
        OSError: a shard can't be read.
        DataFaultError: too many clips are damaged.
    """
    device = model.norm.weight.device
    for made in output_batches(_embedding(model), loader, device, dtype):
        yield EmbeddedBatch(
            audio=made.values["sound"],
            frames=made.values["picture"],
            frame_seconds=made.batch.frame_seconds,
            positions=made.batch.positions,
            sample_ids=made.batch.sample_ids,
            labels=made.batch.labels,
        )


def embed(
    model: AudioVideoEncoder, config: RunConfig, shards: str, *, clips: int, batch: int
) -> Embeddings:
    """Embed the sound and one frame of each clip, unmasked, in float32.

    Args:
        model: set to evaluate.
        config: of its run: its sizes, and how frames are chosen.
        shards: a packed tier.
        clips: the first ones; 0: all.
        batch: clips at a time.

    Raises:
        ValueError: no clip can be decoded, or an embedding is not finite.
        OSError: a shard can't be read.
        DataFaultError: too many clips are damaged.
    """
    device = model.norm.weight.device
    loader = whole_clips(config.data, config.model, shards, device, batch=batch, clips=clips)
    made = clip_outputs(_embedding(model), loader, shards, device)
    audio, video = made.values["sound"], middle_frame(made.values["picture"])
    return Embeddings(audio, video, made.sample_ids, made.labels, made.left_out)


def _embedding(model: AudioVideoEncoder) -> Forward:
    def forward(batch: AudioVideoBatch) -> dict[str, torch.Tensor]:
        # One frame at a time: as much memory, and the same bits, as for clips of one frame.
        frames = [model.embed_video(frame) for frame in batch.frames.unbind(1)]
        return {"sound": model.embed_audio(batch.log_mel), "picture": torch.stack(frames, dim=1)}

    return forward
