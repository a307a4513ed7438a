"""Frozen features of the clips of a packed set: what a trained model makes of sound and picture.

Clips are embedded whole and in float32; no clip sees another one, so nothing depends on how they
were put into batches. Scores take them from memory (`embed`), `cavmae embed` writes them to disk.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from cavmae.dataloaders.batch import ClipShape
from cavmae.dataloaders.loader import ValidationLoader
from cavmae.dataloaders.reader import MIDDLE_FRAME
from cavmae.dataloaders.shards import FRAMES_PER_CLIP
from cavmae.trainer.config import PretrainConfig
from cavmae.trainer.model.cavmae import CAVMAE


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
        return self.frames[:, self.frames.shape[1] * MIDDLE_FRAME // FRAMES_PER_CLIP]


def loader_of(
    config: PretrainConfig,
    shards: str,
    device: torch.device,
    *,
    batch: int,
    clips: int = 0,
    frames: int = 1,
    parts: Sequence[range] | None = None,
) -> ValidationLoader:
    """The clips of a packed tier as a run's model takes them.

    Args:
        config: of the run: its sizes, and how frames are chosen.
        shards: a packed tier.
        device: where batches come out.
        batch: clips at a time.
        clips: the first ones; 0: all.
        frames: of each clip.
        parts: as of the loader.

    Raises:
        OSError: no packed shards there.
        ValueError: a set packed for another choice of frames.
    """
    sizes = config.model
    return ValidationLoader(
        dataclasses.replace(config.data, frames_per_clip=frames),
        ClipShape(sizes.audio_frames, sizes.mel_bins, sizes.image_size),
        folder=shards,
        batch=batch,
        rank=0,
        world_size=1,
        device=device,
        limit=clips,
        parts=parts,
    )


@torch.no_grad()
def embedded_batches(
    model: CAVMAE, loader: ValidationLoader, dtype: torch.dtype = torch.float32
) -> Iterator[EmbeddedBatch]:
    """Embed the sound and each frame of the loader's clips, unmasked, in float32.

    Args:
        model: set to evaluate.
        loader: on the model's device.
        dtype: what the embeddings are rounded to.

    Raises:
        ValueError: an embedding is not finite.
        OSError: a shard can't be read.
        DataFaultError: too many clips are damaged.
    """
    device = model.norm.weight.device
    for batch in loader:
        batch = batch.to(device)
        # One frame at a time: as much memory, and the same bits, as for clips of one frame.
        frames = [model.embed_video(frame) for frame in batch.frames.unbind(1)]
        embedded = EmbeddedBatch(
            audio=model.embed_audio(batch.log_mel).to(dtype).cpu(),
            frames=torch.stack(frames, dim=1).to(dtype).cpu(),
            frame_seconds=batch.frame_seconds,
            positions=batch.positions,
            sample_ids=batch.sample_ids,
            labels=batch.labels,
        )
        for name, values in (("sound", embedded.audio), ("picture", embedded.frames)):
            bad = (~values.flatten(1).isfinite().all(dim=1)).nonzero().flatten().tolist()
            if bad:
                raise ValueError(
                    f"the {name} of {', '.join(batch.sample_ids[clip] for clip in bad[:5])} has an "
                    f"embedding that is not finite in {str(dtype).removeprefix('torch.')}; look at "
                    "these clips or at the weights"
                )
        yield embedded


def embed(
    model: CAVMAE, config: PretrainConfig, shards: str, *, clips: int, batch: int
) -> Embeddings:
    """Embed the sound and one frame of each clip.

    Args:
        model: set to evaluate.
        config: of its run.
        shards: a packed tier.
        clips: the first ones; 0: all.
        batch: clips at a time.

    Raises:
        ValueError: no clip can be decoded, or an embedding is not finite.
        OSError: a shard can't be read.
        DataFaultError: too many clips are damaged.
    """
    loader = loader_of(config, shards, model.norm.weight.device, batch=batch, clips=clips)
    try:
        parts = list(embedded_batches(model, loader))
    finally:
        loader.close()
    if not parts:
        raise ValueError(f"shards {shards}: no clip can be decoded; `cavmae verify` says why")
    return Embeddings(
        audio=torch.cat([part.audio for part in parts]),
        video=torch.cat([part.video for part in parts]),
        sample_ids=tuple(name for part in parts for name in part.sample_ids),
        labels=tuple(labels for part in parts for labels in part.labels),
        left_out=tuple((one.sample_id, one.reason) for one in loader.quarantine),
    )
