"""`cavmae reconstruct RUN_DIR SHARDS OUT`: reconstruct masked clips with a trained run.

For each clip a figure, the sound, and the error of the removed patches beside that of two
baselines, which show whether the model has learned more than means. Patches of both modalities are
removed as in training, or all of one and none of the other.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from cavmae.atomic_write import write_bytes, write_json
from cavmae.dataloaders.batch import AudioVideoBatch
from cavmae.dataloaders.constants import AUDIO_HZ, HOP_SAMPLES, IMAGE_STD, WINDOW_SAMPLES
from cavmae.dataloaders.media.audio_codec import encode_audio
from cavmae.field_checks import CheckedFields, Limit, PositiveInt
from cavmae.kernels import MaskIds, kept_count, mask_ids_from_shuffle
from cavmae.trainer.config.configs import PretrainConfig
from cavmae.trainer.evaluation.griffin_lim import waveform_from_log_mel
from cavmae.trainer.evaluation.inference import whole_clips
from cavmae.trainer.evaluation.trained_run import TrainedRun, open_trained_run
from cavmae.trainer.model.cavmae import CAVMAE
from cavmae.trainer.model.masking import random_masks
from cavmae.trainer.tracking.figures import masked_and_reconstructed, patchify, plot_reconstructions

ERRORS = (
    "mean_squared_error",
    "mean_squared_error_of_kept_mean",
    "mean_squared_error_of_patch_mean",
)


_Ratio = Annotated[float | None, Limit(lambda x: 0 <= x <= 1, "0 to 1")]


@dataclass(frozen=True)
class ReconstructConfig(CheckedFields):
    """Reconstruct unseen clips with a trained run: figures, sound, errors beside baselines.

    Raises:
        ValueError: a field out of its range, or ratios where the direction gives them.
    """

    run_dir: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")]
    """Folder of a trained run."""
    shards: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SHARDS")]
    """One tier of packed shards that the run was not trained on; a folder or a URL."""
    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder for figures, sounds and `reconstructions.json`; new or empty."""
    direction: Literal["joint", "audio-to-video", "video-to-audio"] = "joint"
    """`joint`: patches of both are removed. The others remove all of one modality and nothing of
    the other."""
    audio_ratio: _Ratio = None
    """Share of audio patches removed, with `joint`; None: that of the run."""
    video_ratio: _Ratio = None
    """Share of image patches removed, with `joint`; None: that of the run."""
    clips: PositiveInt = 8
    """The first ones in packing order."""
    seed: int = 0
    """Of masks, and of the phases that the sound begins with."""
    sound_iterations: PositiveInt = 100
    """Griffin-Lim iterations of each sound."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("audio_ratio", "video_ratio"):
            ratio = getattr(self, name)
            if ratio is not None and self.direction != "joint":
                raise ValueError(
                    f"{name} is {ratio} and direction {self.direction}, which removes all of one "
                    f"modality; omit {name}, or use direction joint"
                )


def run_with_decoder(run_dir: str) -> TrainedRun:
    """Open a run whose decoder was trained.

    Raises:
        ValueError: the run has not finished, or trained no decoder.
        OSError: a file can't be read.
    """
    run = open_trained_run(run_dir)
    if run.config.loss.reconstruction_weight == 0:
        raise ValueError(
            f"run_dir is {run_dir}, whose loss.reconstruction_weight is 0: its decoder was not "
            "trained; give a run that reconstructs"
        )
    return run


def removed_ratios(config: ReconstructConfig, run: PretrainConfig) -> tuple[float, float]:
    """Return the shares of audio and of image patches to remove.

    Raises:
        ValueError: nothing would be kept, or nothing removed.
    """
    if config.direction != "joint":
        return (0.0, 1.0) if config.direction == "audio-to-video" else (1.0, 0.0)
    audio = run.mask.audio_ratio if config.audio_ratio is None else config.audio_ratio
    video = run.mask.video_ratio if config.video_ratio is None else config.video_ratio
    tokens = run.model.audio_tokens, run.model.video_tokens
    kept = kept_count(tokens[0], audio) + kept_count(tokens[1], video)
    if kept in (0, sum(tokens)):
        happens = "keeps no patch" if kept == 0 else "removes none"
        raise ValueError(
            f"audio_ratio is {audio} and video_ratio {video}, which {happens} of {sum(tokens)}; "
            "change one of them"
        )
    return audio, video


def removal_masks(
    run: PretrainConfig, positions: torch.Tensor, ratios: tuple[float, float], seed: int
) -> tuple[MaskIds, MaskIds]:
    """Draw audio and video masks in the run's mode, of ratios up to 1 (nothing kept).

    Args:
        run: sizes and mode.
        positions: (batch,) int64 positions in packing order; the ids come on their device.
        ratios: shares of audio and of image patches removed.
        seed: of the masks.
    """
    below_one = [ratio if ratio < 1 else 0.0 for ratio in ratios]
    mask = dataclasses.replace(run.mask, audio_ratio=below_one[0], video_ratio=below_one[1])
    masks = random_masks(run.model, mask, positions, seed=seed)
    audio, video = (
        mask_ids_from_shuffle(mask.keep, 1.0) if ratio == 1 else mask
        for mask, ratio in zip(masks, ratios, strict=True)
    )
    return audio, video


def errors_of_removed(
    pixels: torch.Tensor,
    mask: MaskIds,
    predicted: torch.Tensor,
    *,
    norm_pix: bool,
    std: torch.Tensor,
    present_columns: int,
) -> dict[str, float] | None:
    """Compute mean squared errors of removed patches: of the prediction and of two baselines.

    The first baseline is the mean of the kept patches (of the data set, 0, if none is kept). The
    second gives each patch its true mean: it is what a `norm_pix` prediction of zeros becomes, so
    such a model has learned something if it is below that.

    Args:
        pixels: (1, channels, height, width) normalised.
        mask: of one clip.
        predicted: (1, tokens, 256 * channels).
        norm_pix: whether predictions are of normalised patches, denormalised as in `figures`.
        std: (channels,) by which `pixels` were divided; errors are of values before that.
        present_columns: columns from the left that are not padding; the others don't count.

    Returns:
        The three `ERRORS`; None if no patch is removed, or padding alone.
    """
    masked, reconstructed = masked_and_reconstructed(pixels, mask, predicted, norm_pix)
    removed = masked.isnan()
    removed[..., present_columns:] = False
    if not removed.any():
        return None
    seen = masked.clone()
    seen[..., present_columns:] = torch.nan
    patches = patchify(pixels)  # (1, tokens, values)
    baselines = (
        patchify(seen).nanmean(1, keepdim=True).nan_to_num(nan=0.0),  # (1, 1, values)
        patches.mean(2, keepdim=True),  # (1, tokens, 1)
    )
    made = [reconstructed] + [
        masked_and_reconstructed(pixels, mask, one.expand_as(patches), norm_pix=False)[1]
        for one in baselines
    ]
    scale = std[:, None, None]
    errors = [((values - pixels) * scale)[removed].square().mean().item() for values in made]
    return dict(zip(ERRORS, errors, strict=True))


@torch.no_grad()
def reconstruct(config: ReconstructConfig) -> dict[str, Any]:
    """Reconstruct the clips and write everything to `config.out`; returns the report.

    Raises:
        ValueError: the run, the ratios or the shards don't fit, or `out` holds something.
        OSError: a file can't be read or written.
        DataFaultError: too many clips are damaged.
    """
    out = Path(config.out)
    trained = run_with_decoder(config.run_dir)
    run = trained.config
    ratios = removed_ratios(config, run)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out is {out}, which is not empty; give a new folder")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = trained.model(device)
    loader = whole_clips(run, config.shards, device, batch=1, clips=config.clips)
    out.mkdir(parents=True, exist_ok=True)
    try:
        clips = [
            _reconstruct_clip(model, batch.to(device), config, run, ratios) for batch in loader
        ]
    finally:
        loader.close()
    if not clips:
        raise ValueError(
            f"shards {config.shards}: none of the first {config.clips} clips can be decoded; "
            "`cavmae verify` says why"
        )
    report = {
        "options": dataclasses.asdict(config),
        "audio_ratio": ratios[0],
        "video_ratio": ratios[1],
        "weights_sha256": trained.weights_sha256,
        "config": dataclasses.asdict(run),
        "skipped": [[sample.sample_id, sample.reason] for sample in loader.quarantine],
        "mean": {kind: _mean([clip[kind] for clip in clips]) for kind in ("audio", "video")},
        "clips": clips,
    }
    write_json(out / "reconstructions.json", report)
    return report


def _reconstruct_clip(
    model: CAVMAE,
    batch: AudioVideoBatch,
    config: ReconstructConfig,
    run: PretrainConfig,
    ratios: tuple[float, float],
) -> dict[str, Any]:
    """Write figure and sounds of the one clip of `batch`; returns its part of the report."""
    out, sample_id = Path(config.out), batch.sample_ids[0]
    name = f"clip-{sample_id.replace('/', '-')}"
    frame = batch.frames[:, 0]
    masks = removal_masks(run, batch.positions, ratios, config.seed)
    predicted = [values.cpu() for values in model.predict_patches(batch.log_mel, frame, *masks)]
    log_mel, frame = batch.log_mel.cpu(), frame.cpu()
    audio_mask, video_mask = (MaskIds(*(ids.cpu() for ids in mask)) for mask in masks)
    norm_pix = run.loss.norm_pix
    shown = (log_mel, frame, audio_mask, video_mask, *predicted)
    plot_reconstructions(out / f"{name}.png", *shown, norm_pix=norm_pix, names=[sample_id])

    spectrogram = log_mel.transpose(1, 2)[:, None]  # (1, 1, mel_bins, audio_frames)
    _, inpainted = masked_and_reconstructed(spectrogram, audio_mask, predicted[0], norm_pix)
    samples = round(batch.audio_seconds[0, 1].item() * AUDIO_HZ)
    present = min(run.model.audio_frames, (samples - WINDOW_SAMPLES) // HOP_SAMPLES + 1)
    sounds = {"original": spectrogram, "reconstructed": inpainted}
    for kind, sound in sounds.items():
        waveform = waveform_from_log_mel(
            sound[0, 0, :, :present].T * run.data.log_mel_std + run.data.log_mel_mean,
            iterations=config.sound_iterations,
            seed=config.seed,
        )
        pcm = (waveform.clamp(-1, 1) * 32767).round().short().numpy()
        write_bytes(out / f"{name}-{kind}.wav", encode_audio(pcm, "wav"))
    return {
        "sample_id": sample_id,
        "files": f"{name}*",
        "direction": config.direction,
        "audio": errors_of_removed(
            spectrogram,
            audio_mask,
            predicted[0],
            norm_pix=norm_pix,
            std=torch.tensor([run.data.log_mel_std]),
            present_columns=present,
        ),
        "video": errors_of_removed(
            frame,
            video_mask,
            predicted[1],
            norm_pix=norm_pix,
            std=torch.tensor(IMAGE_STD),
            present_columns=run.model.image_size,
        ),
    }


def _mean(clips: list[dict[str, float] | None]) -> dict[str, float] | None:
    """Average each error over the clips that have one."""
    counted = [errors for errors in clips if errors is not None]
    if not counted:
        return None
    return {name: sum(errors[name] for errors in counted) / len(counted) for name in ERRORS}


def main(arguments: list[str]) -> int:
    """Run the command; returns its exit code."""
    config = tyro.cli(ReconstructConfig, prog="cavmae reconstruct", args=arguments)
    report = reconstruct(config)
    print(f"{len(report['clips'])} clips, {config.direction}: {config.out}")
    for kind, errors in report["mean"].items():
        if errors is not None:
            model, kept_mean, patch_mean = (errors[name] for name in ERRORS)
            print(
                f"{kind}: mean squared error {model:.4g} (mean of kept patches {kept_mean:.4g}, "
                f"own mean of each removed patch {patch_mean:.4g})"
            )
    return 0
