"""Validation of pretraining: both losses and retrieval, independent of batch size, ranks and order;
of a model of one modality, the reconstruction loss.

Clips are embedded unmasked for retrieval, as the published evaluation does, and masked for the
losses, each with the mask of its index in the set; every removed patch is decoded.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
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
from cavmae.trainer.model.masking import masks_of
from cavmae.trainer.tasks.task import Validation
from cavmae.trainer.tracking.figures import plot_reconstructions, plot_similarity

SHOWN_CLIPS = 200
"""Clips of which similarities are plotted."""


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
        ValueError: there are fewer than two clips in all, to retrieve.
    """
    reconstruct = config.loss.reconstruction_weight > 0
    modalities, paired = config.data.modalities, config.data.modality == "both"
    whole = replace(config.model, decoded_share=1.0)
    unmasked: list[Pairs] = []
    masked: list[Pairs] = []
    # Of each batch the sum over its clips of each loss, and the number of clips.
    reconstruction: list[torch.Tensor] = []
    plot_clips: Callable[[Path], None] | None = None
    for batch, counts in in_lockstep(batches, device):
        positions, log_mel, frame = batch.positions, batch.log_mel, batch.frame
        if paired:
            keep_all = full_masks(config.model, len(positions), device)
            output = model(log_mel, frame, *keep_all, reconstruct=False)
            if counts:
                unmasked.append(Pairs(output.audio_embedding, output.video_embedding, positions))

        masks = masks_of(modalities, whole, config.mask, positions, seed=config.seed)
        first = reconstruct and plot_clips is None
        output = model(
            log_mel,
            frame,
            *masks,
            reconstruct=reconstruct,
            contrast=paired,
            norm_pix=config.loss.norm_pix,
            predict_all=first,
        )
        if not counts:
            continue
        if paired:
            masked.append(Pairs(output.audio_embedding, output.video_embedding, positions))
        if reconstruct:
            parts = torch.stack([*output.reconstructions.values(), torch.ones((), device=device)])
            reconstruction.append(parts.double() * len(positions))
        if first:
            plot_clips = _plot_of_first_clips(config, log_mel, frame, masks, output)

    metrics = {"loss": 0.0}
    if reconstruct:
        total = torch.stack(reconstruction).sum(0)
        dist.all_reduce(total)
        means = (total[:-1] / total[-1]).tolist()
        named = zip(modalities, means, strict=True)
        metrics |= {f"loss_reconstruction_{modality}": mean for modality, mean in named}
        metrics["loss"] = config.loss.reconstruction_weight * sum(means)
    similarity = None
    if paired:
        everyone = _in_order(_gather_pairs(concatenate(unmasked)))
        metrics |= _val_losses(_gather_pairs(concatenate(masked)), config)
        metrics["loss"] += config.loss.contrastive_weight * metrics["loss_contrastive"]
        metrics |= _retrieval(everyone)
        similarity = _similarity(everyone)

    def draw(folder: Path, step: int) -> list[Path]:
        paths = []
        if similarity is not None:
            paths.append(folder / f"similarity-step-{step:09d}.png")
            plot_similarity(paths[-1], similarity)
        if plot_clips is not None:
            paths.append(folder / f"reconstruction-step-{step:09d}.png")
            plot_clips(paths[-1])
        return paths

    return Validation({f"val_{name}": value for name, value in metrics.items()}, draw)


def _retrieval(everyone: Pairs) -> dict[str, float]:
    """Score retrieval both ways among all clips.

    Raises:
        ValueError: there are fewer than two.
    """
    clips = len(everyone.positions)
    if clips < 2:
        raise ValueError(f"data.validation has {clips} clip; retrieval needs 2 or more")
    retrieval = retrieval_scores(everyone.audio.cpu(), everyone.video.cpu())
    return {
        f"{direction}_{name}": value
        for direction, scores in retrieval.items()
        for name, value in scores.as_metrics().items()
    }


def _similarity(everyone: Pairs) -> torch.Tensor:
    """Compute the cosines of the first clips, on the CPU."""
    audio = torch.nn.functional.normalize(everyone.audio[:SHOWN_CLIPS], dim=-1)
    video = torch.nn.functional.normalize(everyone.video[:SHOWN_CLIPS], dim=-1)
    return (audio @ video.T).cpu()


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
    log_mel: torch.Tensor | None,
    frame: torch.Tensor | None,
    masks: tuple[MaskIds | None, MaskIds | None],
    output: PretrainOutput,
) -> Callable[[Path], None]:
    """Keep the first clips of a batch on the CPU; returns what plots them."""

    def first(x: torch.Tensor | None) -> torch.Tensor | None:
        return None if x is None else x[: config.pictures].cpu()

    audio_mask, video_mask = (
        mask and MaskIds(*(ids[: config.pictures].cpu() for ids in mask)) for mask in masks
    )
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
