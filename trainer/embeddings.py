"""Frozen features of the clips of a packed set: what a trained model makes of sound and picture.

Clips are embedded whole and in float32; no clip sees another one, so nothing depends on how they
were put into batches.
"""

from dataclasses import dataclass

import torch

from cavmae.dataloaders.batch import ClipShape
from cavmae.dataloaders.loader import ValidationLoader
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


@torch.no_grad()
def embed(
    model: CAVMAE, config: PretrainConfig, shards: str, *, clips: int, batch: int
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
    device, sizes = model.norm.weight.device, config.model
    loader = ValidationLoader(
        config.data,
        ClipShape(sizes.audio_frames, sizes.mel_bins, sizes.image_size),
        folder=shards,
        batch=batch,
        rank=0,
        world_size=1,
        device=device,
        limit=clips,
    )
    audio: list[torch.Tensor] = []
    video: list[torch.Tensor] = []
    sample_ids: list[str] = []
    labels: list[tuple[str, ...]] = []
    try:
        for part in loader:
            part = part.to(device)
            audio.append(model.embed_audio(part.log_mel).cpu())
            video.append(model.embed_video(part.frames[:, 0]).cpu())
            sample_ids += part.sample_ids
            labels += part.labels
    finally:
        loader.close()
    if not audio:
        raise ValueError(f"shards {shards}: no clip can be decoded; `cavmae verify` says why")
    embeddings = Embeddings(
        audio=torch.cat(audio),
        video=torch.cat(video),
        sample_ids=tuple(sample_ids),
        labels=tuple(labels),
        left_out=tuple((one.sample_id, one.reason) for one in loader.quarantine),
    )
    for name, values in (("sound", embeddings.audio), ("picture", embeddings.video)):
        bad = (~values.isfinite().all(dim=1)).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"the {name} of {len(bad)} clips of {shards} has embeddings that are not finite, "
                f"such as {', '.join(sample_ids[clip] for clip in bad[:5])}; look at these clips "
                "or at the weights"
            )
    return embeddings
