"""A model's outputs for each clip of a packed set: logits, or frozen embeddings.

Clips are taken whole and in float32; no clip sees another one, so nothing depends on how they were
put into batches.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from cavmae.console import counted
from cavmae.dataloaders.batch import AudioVideoBatch
from cavmae.dataloaders.config import ClipShape
from cavmae.dataloaders.constants import FRAMES_PER_CLIP, MIDDLE_FRAME, Modalities
from cavmae.dataloaders.loading.loader import ValidationLoader
from cavmae.trainer.config.configs import RunConfig
from cavmae.trainer.model.encoder import AudioVideoEncoder

Forward = Callable[[AudioVideoBatch], Mapping[str, torch.Tensor]]
"""From a batch on the model's device to tensors (batch, ...) by name."""


@dataclass(frozen=True)
class OutputBatch:
    """Outputs for some clips of a set, in packing order.

    Attributes:
        values: by name, (clips, ...) on CPU.
        clips: the batch.
    """

    values: dict[str, torch.Tensor]
    clips: AudioVideoBatch


@dataclass(frozen=True)
class ClipOutputs:
    """Outputs for the clips of a set, in packing order.

    Attributes:
        values: by name, (clips, ...) float32 on CPU.
        sample_ids: of each clip.
        labels: of each clip.
        skipped: sample ids that can't be decoded, each with its reason.
    """

    values: dict[str, torch.Tensor]
    sample_ids: tuple[str, ...]
    labels: tuple[tuple[str, ...], ...]
    skipped: tuple[tuple[str, str], ...]


def whole_clips(
    config: RunConfig,
    shards: str,
    device: torch.device,
    *,
    batch: int,
    clips: int = 0,
    frames: int = 1,
    parts: Sequence[range] | None = None,
    modality: Modalities = "both",
) -> ValidationLoader:
    """Load the clips of a packed tier as a run's model takes them.

    Args:
        config: of the run: its model's sizes, and how clips are read.
        shards: a packed tier.
        device: where batches are put.
        batch: clips at a time.
        clips: the first ones; 0: all.
        frames: of each clip.
        parts: as of the loader.
        modality: what is read of them.

    Raises:
        OSError: no packed shards there.
        ValueError: a set packed for another choice of frames, or without what is read.
    """
    sizes = config.model
    return ValidationLoader(
        dataclasses.replace(config.data, frames_per_clip=frames, modality=modality),
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
        dtype: that values are rounded to.

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
                    f"{name}: the model's output for {len(bad)} clips, such as {some}, is not "
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
        batches = output_batches(forward, loader, device)
        parts = list(
            counted(
                batches, "evaluating", loader.clips, "clips", lambda one: len(one.clips.sample_ids)
            )
        )
    finally:
        loader.close()
    if not parts:
        raise ValueError(f"shards {shards}: no clip can be decoded; `cavmae verify` says why")
    return ClipOutputs(
        {name: torch.cat([part.values[name] for part in parts]) for name in parts[0].values},
        tuple(name for part in parts for name in part.clips.sample_ids),
        tuple(labels for part in parts for labels in part.clips.labels),
        tuple((one.sample_id, one.reason) for one in loader.quarantine),
    )


def middle_frame(frames: torch.Tensor) -> torch.Tensor:
    """(clips, frames, ...) to (clips, ...): the frame that is used if there is only one."""
    return frames[:, frames.shape[1] * MIDDLE_FRAME // FRAMES_PER_CLIP]


def embedding(model: AudioVideoEncoder) -> Forward:
    """Embed sound and frames, unmasked and not normalised.

    Args:
        model: set to evaluate.

    Returns:
        From a batch to `audio` (clips, width) and `frames` (clips, frames, width), each frame by
        itself; without what the batch lacks.
    """

    def forward(batch: AudioVideoBatch) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        if batch.log_mel is not None:
            found["audio"] = model.embed_audio(batch.log_mel)
        if batch.frames is not None:
            # One frame at a time: as much memory, and the same bits, as for clips of one frame.
            frames = [model.embed_video(frame) for frame in batch.frames.unbind(1)]
            found["frames"] = torch.stack(frames, dim=1)
        return found

    return forward


def embed(
    model: AudioVideoEncoder,
    config: RunConfig,
    shards: str,
    *,
    clips: int,
    batch: int,
    modality: Modalities = "both",
) -> ClipOutputs:
    """Embed the sound and one frame of each clip, unmasked, in float32.

    Args:
        model: set to evaluate.
        config: of its run: its sizes, and how frames are chosen.
        shards: a packed tier.
        clips: the first ones; 0: all.
        batch: clips at a time.
        modality: what is read and embedded.

    Returns:
        `audio` and `video`, each (clips, width), not normalised; or one of them.

    Raises:
        ValueError: no clip can be decoded, or an embedding is not finite.
        OSError: a shard can't be read.
        DataFaultError: too many clips are damaged.
    """
    device = model.norm.weight.device
    loader = whole_clips(config, shards, device, batch=batch, clips=clips, modality=modality)
    made = clip_outputs(embedding(model), loader, shards, device)
    values = dict(made.values)
    if "frames" in values:
        values["video"] = middle_frame(values.pop("frames"))
    return dataclasses.replace(made, values=values)
