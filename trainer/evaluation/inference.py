"""What a model makes of each clip of a packed set.

Clips are taken whole and in float32; no clip sees another one, so nothing depends on how they were
put into batches.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from cavmae.dataloaders.batch import AudioVideoBatch, ClipShape
from cavmae.dataloaders.config import DataConfig
from cavmae.dataloaders.loading.loader import ValidationLoader
from cavmae.trainer.model.config import ModelConfig

Forward = Callable[[AudioVideoBatch], Mapping[str, torch.Tensor]]
"""From a batch on the model's device to tensors (batch, ...) by name."""


@dataclass(frozen=True)
class OutputBatch:
    """Of some clips of a set, in packing order.

    Attributes:
        values: by name, (clips, ...) on CPU.
        batch: the clips.
    """

    values: dict[str, torch.Tensor]
    batch: AudioVideoBatch


@dataclass(frozen=True)
class ClipOutputs:
    """Of a set's clips, in packing order.

    Attributes:
        values: by name, (clips, ...) float32 on CPU.
        sample_ids: of each clip.
        labels: of each clip.
        left_out: sample ids that can't be decoded, each with its reason.
    """

    values: dict[str, torch.Tensor]
    sample_ids: tuple[str, ...]
    labels: tuple[tuple[str, ...], ...]
    left_out: tuple[tuple[str, str], ...]


def whole_clips(
    data: DataConfig,
    sizes: ModelConfig,
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
        data: of the run: how clips are read.
        sizes: of the model.
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
    return ValidationLoader(
        dataclasses.replace(data, frames_per_clip=frames),
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
def output_batches(
    forward: Forward,
    loader: ValidationLoader,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Iterator[OutputBatch]:
    """Pass the clips of a loader through a model.

    Args:
        forward: the model.
        loader: of whole clips.
        device: of the model.
        dtype: what values are rounded to.

    Raises:
        ValueError: a value is not finite.
        OSError: a shard can't be read.
        DataFaultError: too many clips are damaged.
    """
    for batch in loader:
        made = forward(batch.to(device))
        values = {name: of_clips.to(dtype).cpu() for name, of_clips in made.items()}
        for name, of_clips in values.items():
            bad = (~of_clips.flatten(1).isfinite().all(dim=1)).nonzero().flatten().tolist()
            if bad:
                some = ", ".join(batch.sample_ids[clip] for clip in bad[:5])
                raise ValueError(
                    f"{name}: what the model makes of {len(bad)} clips, such as {some}, is not "
                    f"finite in {str(dtype).removeprefix('torch.')}; look at these clips or at the "
                    "weights"
                )
        yield OutputBatch(values, batch)


def clip_outputs(
    forward: Forward, loader: ValidationLoader, shards: str, device: torch.device
) -> ClipOutputs:
    """Pass all clips of a loader through a model, and close the loader.

    Args:
        forward: the model.
        loader: of whole clips.
        shards: the loader's, for errors.
        device: of the model.

    Raises:
        ValueError: no clip can be decoded, or a value is not finite.
        OSError: a shard can't be read.
        DataFaultError: too many clips are damaged.
    """
    try:
        parts = list(output_batches(forward, loader, device))
    finally:
        loader.close()
    if not parts:
        raise ValueError(f"shards {shards}: no clip can be decoded; `cavmae verify` says why")
    return ClipOutputs(
        {name: torch.cat([part.values[name] for part in parts]) for name in parts[0].values},
        tuple(name for part in parts for name in part.batch.sample_ids),
        tuple(labels for part in parts for labels in part.batch.labels),
        tuple((one.sample_id, one.reason) for one in loader.quarantine),
    )
