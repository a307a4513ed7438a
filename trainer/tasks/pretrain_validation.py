"""Validation of pretraining: both losses and retrieval, independent of batch size, ranks and order.

Clips are embedded unmasked for retrieval, as the published evaluation does, and masked for the
losses, each with the mask of its index in the set.
"""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from cavmae.dataloaders.batch import AudioVideoBatch
from cavmae.kernels import MaskIds, mask_ids_from_shuffle
from cavmae.trainer.config.configs import PretrainConfig
from cavmae.trainer.distributed.collectives import gather_uneven, in_lockstep
from cavmae.trainer.losses.contrastive import Pairs, concatenate, local_loss
from cavmae.trainer.metrics.retrieval import retrieval_scores
from cavmae.trainer.model.cavmae import PretrainOutput
from cavmae.trainer.model.config import ModelConfig
from cavmae.trainer.model.masking import random_masks
from cavmae.trainer.tasks.task import Validation
from cavmae.trainer.tracking.figures import plot_reconstructions, plot_similarity


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
    device: torch.device,
) -> Validation:
    """Score the model on validation clips; all ranks call it and get the same numbers.

    Args:
        model: the pretraining model in evaluation mode, this rank's part of it if sharded.
        batches: this rank's clips; positions are the clips' indexes in the set.
        config: resolved run.
        device: this rank's device.

    Returns:
        The scores, with figures of the similarities of the first 200 clips and, of this rank's
        first ones, reconstructions.

    Raises:
        ValueError: there are fewer than two clips in all.
    """
    reconstruct = config.loss.reconstruction_weight > 0
    unmasked: list[Pairs] = []
    masked: list[Pairs] = []
    reconstruction: list[torch.Tensor] = []
    plot_clips: Callable[[Path], None] | None = None
    for batch, counts in in_lockstep(batches, device):
        positions, log_mel, frame = batch.positions, batch.log_mel, batch.frames[:, 0]
        keep_all = full_masks(config.model, len(positions), device)
        output = model(log_mel, frame, *keep_all, reconstruct=False)
        if counts:
            unmasked.append(Pairs(output.audio_embedding, output.video_embedding, positions))

        masks = random_masks(config.model, config.mask, positions, seed=config.seed)
        first = reconstruct and plot_clips is None
        output = model(
            log_mel,
            frame,
            *masks,
            reconstruct=reconstruct,
            norm_pix=config.loss.norm_pix,
            predict_all=first,
        )
        if not counts:
            continue
        masked.append(Pairs(output.audio_embedding, output.video_embedding, positions))
        if reconstruct:
            parts = torch.stack([output.reconstruction_audio, output.reconstruction_video])
            reconstruction.append(parts.double() * len(positions))
        if first:
            plot_clips = _plot_of_first_clips(config, log_mel, frame, masks, output)

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
    similarity = (audio @ video.T).cpu()

    def draw(folder: Path, step: int) -> list[Path]:
        paths = [folder / f"similarity-step-{step:09d}.png"]
        plot_similarity(paths[0], similarity)
        if plot_clips is not None:
            paths.append(folder / f"reconstruction-step-{step:09d}.png")
            plot_clips(paths[1])
        return paths

    return Validation({f"val_{name}": value for name, value in metrics.items()}, draw)


def _gather_pairs(own: Pairs) -> Pairs:
    """Gather the pairs of all ranks on every rank."""
    return Pairs(*map(gather_uneven, own))


def _val_losses(pairs: Pairs, config: PretrainConfig) -> dict[str, float]:
    """Compute the contrastive loss over consecutive whole groups, skipping the clips after them."""
    group = min(config.loss.contrastive_group or config.global_batch, len(pairs.positions))
    whole = len(pairs.positions) // group * group
    pairs = Pairs(*(part[:whole] for part in _in_order(pairs)))
    result = local_loss(pairs, config.loss, group)
    return {
        "loss_contrastive": result.loss.item(),
        "contrastive_accuracy": result.accuracy.item(),
    }


def _in_order(pairs: Pairs) -> Pairs:
    order = torch.argsort(pairs.positions)
    return Pairs(*(part[order] for part in pairs))


def _plot_of_first_clips(
    config: PretrainConfig,
    log_mel: torch.Tensor,
    frame: torch.Tensor,
    masks: tuple[MaskIds, MaskIds],
    output: PretrainOutput,
) -> Callable[[Path], None]:
    """Keep the first clips of a batch on the CPU; returns what plots them."""

    def first(x: torch.Tensor | None) -> torch.Tensor:
        assert x is not None
        return x[: config.pictures].cpu()

    audio_mask, video_mask = (MaskIds(*map(first, mask)) for mask in masks)
    return partial(
        plot_reconstructions,
        log_mel=first(log_mel),
        frame=first(frame),
        audio_mask=audio_mask,
        video_mask=video_mask,
        predicted_audio=first(output.predicted_audio),
        predicted_video=first(output.predicted_video),
        norm_pix=config.loss.norm_pix,
    )
