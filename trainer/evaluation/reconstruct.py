"""`cavmae reconstruct RUN_DIR SHARDS OUT`: reconstruct masked clips with a trained run.

For each clip a figure, the sound, and the error of the removed patches beside that of two
baselines, which show whether the model has learned more than means. Patches of both modalities are
removed as in training, or all of one and none of the other.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro

from cavmae.atomic_write import write_bytes, write_json
from cavmae.console import counted
from cavmae.dataloaders.batch import AudioVideoBatch
from cavmae.dataloaders.constants import AUDIO_HZ, HOP_SAMPLES, IMAGE_STD, WINDOW_SAMPLES
from cavmae.dataloaders.media.audio_codec import encode_audio
from cavmae.dataloaders.shards.shard_set import ShardSet
from cavmae.field_checks import CheckedFields, PositiveInt
from cavmae.kernels import MaskIds, kept_count, mask_ids_from_shuffle
from cavmae.trainer.config.configs import PretrainConfig
from cavmae.trainer.evaluation.clip_outputs import whole_clips
from cavmae.trainer.evaluation.griffin_lim import waveform_from_log_mel
from cavmae.trainer.evaluation.trained_run import TrainedRun, open_trained_run
from cavmae.trainer.model.cavmae import CAVMAE
from cavmae.trainer.model.masking import random_masks
from cavmae.trainer.tracking.figures import masked_and_reconstructed, patchify, plot_reconstructions

ERRORS = (
    "mean_squared_error",
    "mean_squared_error_of_kept_mean",
    "mean_squared_error_of_patch_mean",
)


Direction = Literal["joint", "audio-to-video", "video-to-audio"]


@dataclass(frozen=True)
class ReconstructConfig(CheckedFields):
    """Reconstruct unseen clips with a trained run: figures, sound, errors beside baselines.

    Raises:
        ValueError: a field out of its range.
    """

    run_dir: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")]
    """Folder of a trained run."""
    shards: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SHARDS")]
    """One tier of packed shards that the run was not trained on; a folder or a URL."""
    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder for figures, sounds and `reconstructions.json`; new or empty."""
    direction: Direction = "joint"
    """`joint`: patches of both are removed. The others remove all of one modality and nothing of
    the other."""
    audio_ratio: float | None = None
    """Share of audio patches removed, with `joint`; None: that of the run."""
    video_ratio: float | None = None
    """Share of image patches removed, with `joint`; None: that of the run."""
    clips: PositiveInt = 8
    """The first ones in packing order."""
    seed: int = 0
    """Of masks, and of the phases that the sound begins with."""
    sound_iterations: PositiveInt = 100
    """Griffin-Lim iterations of each sound."""


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
    if run.config.data.modality != "both":
        raise ValueError(
            f"run_dir is {run_dir}, trained on {run.config.data.modality} alone, and patches of "
            "both sound and picture are reconstructed here; give a run of both (figures of one are "
            "drawn at each validation)"
        )
    return run


def removed_ratios(
    direction: Direction,
    audio_ratio: float | None,
    video_ratio: float | None,
    run: PretrainConfig,
) -> tuple[float, float]:
    """Return the shares of audio and of image patches to remove.

    Raises:
        ValueError: nothing would be kept, or nothing removed; a ratio outside of 0 to 1, or where
            the direction gives it.
    """
    given = {"audio_ratio": audio_ratio, "video_ratio": video_ratio}
    for name, ratio in given.items():
        if ratio is not None and not 0 <= ratio <= 1:
            raise ValueError(f"{name} is {ratio}; use 0 to 1")
        if ratio is not None and direction != "joint":
            raise ValueError(
                f"{name} is {ratio} and direction {direction}, which removes all of one modality; "
                f"omit {name}, or use direction joint"
            )
    if direction != "joint":
        return (0.0, 1.0) if direction == "audio-to-video" else (1.0, 0.0)
    audio = run.mask.audio_ratio if audio_ratio is None else audio_ratio
    video = run.mask.video_ratio if video_ratio is None else video_ratio
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
    whole = dataclasses.replace(run.model, decoded_share=1.0)
    masks = random_masks(whole, mask, positions, seed=seed)
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
    ratios = removed_ratios(config.direction, config.audio_ratio, config.video_ratio, run)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out is {out}, which is not empty; give a new folder")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = trained.model(device)
    ShardSet(config.shards, run.data.cache).check_has("both")
    loader = whole_clips(run, config.shards, device, batch=1, clips=config.clips)
    out.mkdir(parents=True, exist_ok=True)
    try:
        clips = [
            _reconstruct_clip(model, batch.to(device), config, run, ratios)
            for batch in counted(loader, "reconstructing", loader.clips, "clips")
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


@dataclass(frozen=True)
class Reconstruction:
    """A clip with masked patches, and what the model makes of them.

    Attributes:
        log_mel: (1, audio_frames, mel_bins) normalised.
        frame: (1, 3, size, size) normalised.
        audio_mask, video_mask: which patches were kept, and which removed.
        predicted_audio, predicted_video: (1, tokens, 256) and (1, tokens, 768), of all patches.
        present_frames: of the spectrogram; what follows is padding.
        run: whose model it is.
    """

    log_mel: torch.Tensor
    frame: torch.Tensor
    audio_mask: MaskIds
    video_mask: MaskIds
    predicted_audio: torch.Tensor
    predicted_video: torch.Tensor
    present_frames: int
    run: PretrainConfig

    @property
    def spectrogram(self) -> torch.Tensor:
        """(1, 1, mel_bins, audio_frames) normalised."""
        return self.log_mel.transpose(1, 2)[:, None]

    @property
    def filled_spectrogram(self) -> torch.Tensor:
        """`spectrogram` with the removed patches as predicted."""
        return masked_and_reconstructed(
            self.spectrogram, self.audio_mask, self.predicted_audio, self.run.loss.norm_pix
        )[1]

    @property
    def filled_frame(self) -> torch.Tensor:
        """`frame` with the removed patches as predicted."""
        return masked_and_reconstructed(
            self.frame, self.video_mask, self.predicted_video, self.run.loss.norm_pix
        )[1]

    def errors(self) -> dict[str, dict[str, float] | None]:
        """Compute `errors_of_removed` of `audio` and of `video`."""
        norm_pix = self.run.loss.norm_pix
        return {
            "audio": errors_of_removed(
                self.spectrogram,
                self.audio_mask,
                self.predicted_audio,
                norm_pix=norm_pix,
                std=torch.tensor([self.run.data.log_mel_std]),
                present_columns=self.present_frames,
            ),
            "video": errors_of_removed(
                self.frame,
                self.video_mask,
                self.predicted_video,
                norm_pix=norm_pix,
                std=torch.tensor(IMAGE_STD),
                present_columns=self.run.model.image_size,
            ),
        }

    def save(
        self,
        folder: str | Path,
        name: str = "reconstruction",
        *,
        iterations: int = 100,
        seed: int = 0,
    ) -> None:
        """Write NAME.png, and the sounds NAME-original.wav and NAME-reconstructed.wav.

        Args:
            folder: is made if it is not there.
            name: of the files, and in the figure.
            iterations: of Griffin-Lim.
            seed: of the phases that the sounds begin with.

        Raises:
            OSError: a file can't be written.
        """
        out = Path(folder)
        out.mkdir(parents=True, exist_ok=True)
        plot_reconstructions(
            out / f"{name}.png",
            self.log_mel,
            self.frame,
            self.audio_mask,
            self.video_mask,
            self.predicted_audio,
            self.predicted_video,
            norm_pix=self.run.loss.norm_pix,
            names=[name],
        )
        for kind, pcm in self.sounds(iterations=iterations, seed=seed).items():
            write_bytes(out / f"{name}-{kind}.wav", encode_audio(pcm, "wav"))

    def sounds(self, *, iterations: int = 100, seed: int = 0) -> dict[str, np.ndarray]:
        """Make the spectrogram a sound again, as `original`, and the one that is filled in, as
        `reconstructed`; what a log-mel loses is lost in both.

        Args:
            iterations: of Griffin-Lim.
            seed: of the phases that the sounds begin with.

        Returns:
            (samples,) int16 at 16 kHz each.
        """
        data = self.run.data
        log_mels = {"original": self.spectrogram, "reconstructed": self.filled_spectrogram}
        made = {}
        for kind, log_mel in log_mels.items():
            waveform = waveform_from_log_mel(
                log_mel[0, 0, :, : self.present_frames].T * data.log_mel_std + data.log_mel_mean,
                iterations=iterations,
                seed=seed,
            )
            made[kind] = (waveform.clamp(-1, 1) * 32767).round().short().numpy()
        return made


def reconstruct_clip(
    model: CAVMAE,
    log_mel: torch.Tensor,
    frame: torch.Tensor,
    masks: tuple[MaskIds, MaskIds],
    run: PretrainConfig,
    *,
    samples: int,
) -> Reconstruction:
    """Predict the patches of a clip; the result is on the CPU.

    Args:
        model: set to evaluate.
        log_mel: (1, audio_frames, mel_bins) normalised, on the model's device.
        frame: (1, 3, size, size) normalised, likewise.
        masks: of audio and of video, from `removal_masks`.
        run: of the model.
        samples: of the sound at 16 kHz; the rest is padding.
    """
    audio, video = model.predict_patches(log_mel, frame, *masks)
    audio_mask, video_mask = (MaskIds(*(ids.cpu() for ids in mask)) for mask in masks)
    return Reconstruction(
        log_mel.float().cpu(),
        frame.float().cpu(),
        audio_mask,
        video_mask,
        audio.float().cpu(),
        video.float().cpu(),
        min(run.model.audio_frames, (samples - WINDOW_SAMPLES) // HOP_SAMPLES + 1),
        run,
    )


def _reconstruct_clip(
    model: CAVMAE,
    batch: AudioVideoBatch,
    config: ReconstructConfig,
    run: PretrainConfig,
    ratios: tuple[float, float],
) -> dict[str, Any]:
    """Write figure and sounds of the one clip of `batch`; returns its part of the report."""
    sample_id = batch.sample_ids[0]
    name = f"clip-{sample_id.replace('/', '-')}"
    frame, seconds = batch.frame, batch.audio_seconds
    assert batch.log_mel is not None and frame is not None and seconds is not None
    made = reconstruct_clip(
        model,
        batch.log_mel,
        frame,
        removal_masks(run, batch.positions, ratios, config.seed),
        run,
        samples=round(seconds[0, 1].item() * AUDIO_HZ),
    )
    made.save(config.out, name, iterations=config.sound_iterations, seed=config.seed)
    return {
        "sample_id": sample_id,
        "files": f"{name}*",
        "direction": config.direction,
        **made.errors(),
    }


def _mean(clips: list[dict[str, float] | None]) -> dict[str, float] | None:
    """Average each error over the clips that have one."""
    counted = [errors for errors in clips if errors is not None]
    if not counted:
        return None
    return {name: sum(errors[name] for errors in counted) / len(counted) for name in ERRORS}


def errors_in_words(errors: dict[str, dict[str, float] | None]) -> list[str]:
    """Describe the errors of sound and picture, a line for each that has some."""
    lines = []
    for kind, values in errors.items():
        if values is not None:
            model, kept_mean, patch_mean = (values[name] for name in ERRORS)
            lines.append(
                f"{kind}: mean squared error {model:.4g} (mean of kept patches {kept_mean:.4g}, "
                f"own mean of each removed patch {patch_mean:.4g})"
            )
    return lines


def main(arguments: list[str]) -> int:
    """Run the command; returns its exit code."""
    config = tyro.cli(ReconstructConfig, prog="cavmae reconstruct", args=arguments)
    report = reconstruct(config)
    print(f"{len(report['clips'])} clips, {config.direction}: {config.out}")
    print(*errors_in_words(report["mean"]), sep="\n")
    return 0
