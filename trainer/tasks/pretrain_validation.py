"""Validation of pretraining: both losses and retrieval, independent of batch size, ranks and order.

Clips are embedded unmasked for retrieval, as the published evaluation does, and masked for the
losses, each with the mask of its index in the set.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from cavmae.dataloaders.batch import AudioVideoBatch
from cavmae.kernels import MaskIds, mask_ids_from_shuffle
from cavmae.trainer.config.configs import PretrainConfig
from cavmae.trainer.distributed.collectives import gather_uneven, in_lockstep
from cavmae.trainer.losses.contrastive import Pairs, concatenate, local_loss
from cavmae.trainer.metrics.retrieval import retrieval_scores
from cavmae.trainer.model.config import ModelConfig
from cavmae.trainer.model.masking import random_masks


@dataclass(frozen=True)
class PretrainScores:
    """Scores on the validation clips.

    Attributes:
        metrics: values by name, `val_...`.
        similarity: (clips, clips) cosines, audio by video, of the first 200 clips, on CPU.
        pictures: the first clips of this rank, as `figures.plot_reconstructions` shows them.
    """

    metrics: dict[str, float]
    similarity: torch.Tensor
    pictures: "PictureClips"


@dataclass(frozen=True)
class PictureClips:
    """The first validation clips, masked and reconstructed; tensors on CPU."""

    log_mel: torch.Tensor
    frame: torch.Tensor
    audio_mask: MaskIds
    video_mask: MaskIds
    predicted_audio: torch.Tensor | None
    predicted_video: torch.Tensor | None


def full_masks(model: ModelConfig, batch: int, device: torch.device) -> tuple[MaskIds, MaskIds]:
    """Return masks that keep every patch."""
    audio, video = (
        mask_ids_from_shuffle(torch.arange(tokens, device=device).expand(batch, -1), 0.0)
        for tokens in (model.audio_tokens, model.video_tokens)
    )
    return audio, video


@torch.no_grad()
def score(
    model: nn.Module,
    batches: Iterable[AudioVideoBatch],
    config: PretrainConfig,
    *,
    pictures: int,
    device: torch.device,
) -> PretrainScores:
    """Score the model on validation clips; all ranks call it and get the same numbers.

    Args:
        model: the pretraining model in evaluation mode, this rank's part of it if sharded.
        batches: this rank's clips; positions are the clips' indexes in the set.
        config: resolved run.
        pictures: clips of this rank's first batch to return reconstructed.
        device: this rank's device.

    Raises:
        ValueError: there are fewer than two clips in all.
    """
    reconstruct = config.loss.reconstruction_weight > 0
    unmasked: list[Pairs] = []
    masked: list[Pairs] = []
    reconstruction: list[torch.Tensor] = []
    shown: PictureClips | None = None
    for batch, counts in in_lockstep(batches, device):
        positions = batch.positions.to(device)
        log_mel, frame = batch.log_mel, batch.frames[:, 0]
        keep_all = full_masks(config.model, len(positions), device)
        output = model(log_mel, frame, *keep_all, reconstruct=False)
        if counts:
            unmasked.append(Pairs(output.audio_embedding, output.video_embedding, positions))

        masks = random_masks(config.model, config.mask, positions, seed=config.seed)
        first = shown is None
        output = model(
            log_mel,
            frame,
            *masks,
            reconstruct=reconstruct,
            norm_pix=config.loss.norm_pix,
            predict_all=first and reconstruct,
        )
        if not counts:
            continue
        masked.append(Pairs(output.audio_embedding, output.video_embedding, positions))
        if reconstruct:
            parts = torch.stack([output.reconstruction_audio, output.reconstruction_video])
            reconstruction.append(parts.double() * len(positions))
        if first:
            shown = _first_clips(pictures, log_mel, frame, masks, output)
    assert shown is not None

    everyone = _in_order(_gather_pairs(concatenate(unmasked)))
    metrics = _val_losses(_gather_pairs(concatenate(masked)), config)
    clips = len(everyone.positions)
    if clips < 2:
        raise ValueError(f"data.validation has {clips} clip; retrieval needs 2 or more")
    if reconstruct:
        total = torch.stack(reconstruction).sum(0)
        dist.all_reduce(total)
        audio, video = (total / clips).tolist()
        metrics |= {"loss_reconstruction_audio": audio, "loss_reconstruction_video": video}
        metrics["loss"] = config.loss.reconstruction_weight * (audio + video)
    else:
        metrics["loss"] = 0.0
    metrics["loss"] += config.loss.contrastive_weight * metrics["loss_contrastive"]

    retrieval = retrieval_scores(everyone.audio.cpu(), everyone.video.cpu())
    for direction, scores in retrieval.items():
        for name, value in scores.as_metrics().items():
            metrics[f"{direction}_{name}"] = value
    shown_clips = min(clips, 200)
    audio = torch.nn.functional.normalize(everyone.audio[:shown_clips], dim=-1)
    video = torch.nn.functional.normalize(everyone.video[:shown_clips], dim=-1)
    return PretrainScores(
        metrics={f"val_{name}": value for name, value in metrics.items()},
        similarity=(audio @ video.T).cpu(),
        pictures=shown,
    )


def _gather_pairs(own: Pairs) -> Pairs:
    """Gather the pairs of all ranks on every rank."""
    return Pairs(*(gather_uneven(part) for part in (own.audio, own.video, own.positions)))


def _val_losses(pairs: Pairs, config: PretrainConfig) -> dict[str, float]:
    """Compute the contrastive loss over consecutive whole groups, skipping the clips after them."""
    group = min(config.loss.contrastive_group or config.global_batch, len(pairs.positions))
    whole = len(pairs.positions) // group * group
    pairs = _in_order(pairs)
    pairs = Pairs(pairs.audio[:whole], pairs.video[:whole], pairs.positions[:whole])
    result = local_loss(pairs, config.loss, group)
    return {
        "loss_contrastive": result.loss.item(),
        "contrastive_accuracy": result.accuracy.item(),
    }


def _in_order(pairs: Pairs) -> Pairs:
    order = torch.argsort(pairs.positions)
    return Pairs(pairs.audio[order], pairs.video[order], pairs.positions[order])


def _first_clips(
    count: int,
    log_mel: torch.Tensor,
    frame: torch.Tensor,
    masks: tuple[MaskIds, MaskIds],
    output: object,
) -> PictureClips:
    def cut(x: torch.Tensor | None) -> torch.Tensor | None:
        return None if x is None else x[:count].float().cpu()

    audio_mask, video_mask = (MaskIds(*(ids[:count].cpu() for ids in mask)) for mask in masks)
    return PictureClips(
        log_mel=log_mel[:count].cpu(),
        frame=frame[:count].cpu(),
        audio_mask=audio_mask,
        video_mask=video_mask,
        predicted_audio=cut(getattr(output, "predicted_audio", None)),
        predicted_video=cut(getattr(output, "predicted_video", None)),
    )
