"""Frozen features of the clips of a packed set: what a trained model makes of sound and picture."""

from dataclasses import dataclass

import torch

from cavmae.dataloaders.batch import AudioVideoBatch
from cavmae.trainer.clip_outputs import clip_outputs
from cavmae.trainer.config import RunConfig
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

    def both(one: AudioVideoBatch) -> dict[str, torch.Tensor]:
        return {
            "sound": model.embed_audio(one.log_mel),
            "picture": model.embed_video(one.frames[:, 0]),
        }

    made = clip_outputs(
        both,
        config.data,
        config.model,
        shards,
        clips=clips,
        batch=batch,
        device=model.norm.weight.device,
    )
    audio, video = made.values.values()
    return Embeddings(audio, video, made.sample_ids, made.labels, made.left_out)
