"""What a model makes of each clip of a packed set.

Clips are taken whole and in float32; no clip sees another one, so nothing depends on how they were
put into batches.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from cavmae.dataloaders.batch import AudioVideoBatch, ClipShape
from cavmae.dataloaders.config import DataConfig
from cavmae.dataloaders.loader import ValidationLoader
from cavmae.trainer.model.config import ModelConfig


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


@torch.no_grad()
def clip_outputs(
    forward: Callable[[AudioVideoBatch], Mapping[str, torch.Tensor]],
    data: DataConfig,
    sizes: ModelConfig,
    shards: str,
    *,
    clips: int,
    batch: int,
    device: torch.device,
) -> ClipOutputs:
    """Pass the clips of a set through a model.

    Args:
        forward: from a batch on `device` to tensors (batch, ...) by name.
        data: how clips are read; each comes with `frames_per_clip` frames.
        sizes: of the model.
        shards: a packed tier.
        clips: the first ones; 0: all.
        batch: clips at a time.
        device: of the model.

    Raises:
        ValueError: no clip can be decoded, or a value is not finite.
        OSError: a shard can't be read.
        DataFaultError: too many clips are damaged.
    """
    loader = ValidationLoader(
        data,
        ClipShape(sizes.audio_frames, sizes.mel_bins, sizes.image_size),
        folder=shards,
        batch=batch,
        rank=0,
        world_size=1,
        device=device,
        limit=clips,
    )
    parts: list[Mapping[str, torch.Tensor]] = []
    sample_ids: list[str] = []
    labels: list[tuple[str, ...]] = []
    try:
        for one in loader:
            made = forward(one.to(device))
            parts.append({name: values.float().cpu() for name, values in made.items()})
            sample_ids += one.sample_ids
            labels += one.labels
    finally:
        loader.close()
    if not parts:
        raise ValueError(f"shards {shards}: no clip can be decoded; `cavmae verify` says why")
    values = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    for name, of_clips in values.items():
        finite = of_clips.flatten(1).isfinite().all(dim=1)
        bad = (~finite).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"{name}: what the model makes of {len(bad)} clips of {shards} is not finite, such "
                f"as {', '.join(sample_ids[clip] for clip in bad[:5])}; look at these clips or at "
                "the weights"
            )
    return ClipOutputs(
        values,
        tuple(sample_ids),
        tuple(labels),
        tuple((one.sample_id, one.reason) for one in loader.quarantine),
    )
