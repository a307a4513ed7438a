"""Figures of what the model sees and predicts: a wrong mask, a flipped spectrogram or a collapsed
embedding shows in a figure long before it shows in a number."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from cavmae.atomic_write import atomic_write
from cavmae.dataloaders.constants import IMAGE_MEAN, IMAGE_STD
from cavmae.kernels import MaskIds
from cavmae.trainer.metrics.retrieval import similarity_scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PATCH = 16
FRAME_SECONDS = 0.01  # hop of the log-mel
REMOVED_GRAY = "0.75"
NAMED_CLASSES = 8
"""Classes that are named at either end of their figure."""


def patchify(pixels: torch.Tensor, patch: int = PATCH) -> torch.Tensor:
    """Cut pixels into patch vectors, ordered row, column, channel within a patch.

    Args:
        pixels: (batch, channels, height, width); `patch` divides height and width.

    Returns:
        (batch, tokens, patch * patch * channels), tokens row-major over the grid of patches.
    """
    batch, channels, height, width = pixels.shape
    grid = pixels.reshape(batch, channels, height // patch, patch, width // patch, patch)
    grid = grid.permute(0, 2, 4, 3, 5, 1)  # (batch, rows, columns, patch, patch, channels)
    return grid.reshape(batch, -1, patch * patch * channels)


def unpatchify(patches: torch.Tensor, grid: tuple[int, int], patch: int = PATCH) -> torch.Tensor:
    """Put patch vectors together again, the inverse of `patchify`.

    Args:
        patches: (batch, rows * columns, patch * patch * channels).
        grid: (rows, columns) of patches.

    Returns:
        (batch, channels, rows * patch, columns * patch).
    """
    batch, _, values = patches.shape
    rows, columns = grid
    pixels = patches.reshape(batch, rows, columns, patch, patch, values // patch**2)
    pixels = pixels.permute(0, 5, 1, 3, 2, 4)  # (batch, channels, rows, patch, columns, patch)
    return pixels.reshape(batch, -1, rows * patch, columns * patch)


def masked_and_reconstructed(
    pixels: torch.Tensor, mask: MaskIds, predicted: torch.Tensor, norm_pix: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the encoder saw, and that with the decoder's predictions in the gaps.

    Args:
        pixels: (batch, channels, height, width).
        mask: ids of the kept and the removed patches.
        predicted: (batch, tokens, patch * patch * channels) for every patch, original order.
        norm_pix: whether predictions are of patches at mean 0 and variance 1; each is denormalised
            with the mean and std of the original patch, which the model does not know.

    Returns:
        Masked (NaN where removed) and reconstructed, both shaped like `pixels`.
    """
    patches = patchify(pixels)  # (batch, tokens, values)
    removed = mask.removed[:, :, None].expand(-1, -1, patches.shape[2])
    if norm_pix:
        variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        predicted = predicted * (variance + 1e-6).sqrt() + mean
    reconstructed = patches.scatter(1, removed, predicted.gather(1, removed))
    masked = patches.scatter(1, removed, torch.nan)
    grid = (pixels.shape[2] // PATCH, pixels.shape[3] // PATCH)
    return unpatchify(masked, grid), unpatchify(reconstructed, grid)


def plot_reconstructions(
    path: Path,
    log_mel: torch.Tensor | None,
    frame: torch.Tensor | None,
    audio_mask: MaskIds | None,
    video_mask: MaskIds | None,
    predicted_audio: torch.Tensor | None,
    predicted_video: torch.Tensor | None,
    *,
    norm_pix: bool,
    names: Sequence[str] = (),
) -> None:
    """Write a PNG with a row a clip: original, masked and reconstructed spectrogram, then frame;
    without the one that is None, as are its mask and prediction.

    Args:
        path: file to write; its folder is created.
        log_mel: (batch, audio_frames, mel_bins), normalised as the loader does.
        frame: (batch, 3, height, width), normalised as the loader does.
        audio_mask: patch ids over the (mel, time) grid, frequency-major.
        video_mask: patch ids over the frame's grid.
        predicted_audio: (batch, audio tokens, 256), every patch in original order.
        predicted_video: (batch, video tokens, 768).
        norm_pix: whether predictions are of normalised patches.
        names: of the clips, written beside the rows.
    """
    # (batch, 1, mel_bins, audio_frames)
    spectrogram = None if log_mel is None else _on_cpu(log_mel).transpose(1, 2)[:, None]
    shown: list[torch.Tensor] = []
    titles: list[str] = []
    for original, mask, predicted in (
        (spectrogram, audio_mask, predicted_audio),
        (None if frame is None else _on_cpu(frame), video_mask, predicted_video),
    ):
        if original is None or mask is None or predicted is None:
            continue
        mask = MaskIds(*(ids.cpu() for ids in mask))
        titles += ["original", f"masked ({_removed_share(mask):.0%} removed)", "reconstructed"]
        shown += [original]
        shown += masked_and_reconstructed(original, mask, _on_cpu(predicted), norm_pix)

    clips, heard = len(shown[0]), 0 if spectrogram is None else 3
    widths = [2.2] * heard + [1.0] * (len(shown) - heard)
    figure = _figure(18 / 9.6 * sum(widths), 1.0 + 1.9 * clips)
    axes = figure.subplots(clips, len(shown), squeeze=False, gridspec_kw={"width_ratios": widths})
    for clip, row in enumerate(axes):
        for column, axis in enumerate(row):
            if column < heard:
                # One scale for the three, so that one that is too loud or too dark shows.
                low, high = shown[0][clip].min().item(), shown[0][clip].max().item()
                _show_spectrogram(axis, shown[column][clip, 0], low, high)
            else:
                _show_frame(axis, shown[column][clip])
            axis.set_title(titles[column] if clip == 0 else "", fontsize=10)
        row[0].set_ylabel(names[clip] if names else "mel bin" if heard else "", fontsize=8)
    for axis in axes[-1, :heard]:
        axis.set_xlabel("seconds", fontsize=8)
    note = "Reconstructed: visible patches are the original's, removed ones are predicted"
    if norm_pix:
        note += " (brightness and contrast of each removed patch taken from the original)"
    figure.suptitle(note, fontsize=10)
    save_figure(figure, path)


def similarity_title(similarity: torch.Tensor) -> str:
    """Format R@1 both ways of a (clips, clips) similarity matrix, audio clips in rows."""
    audio_to_video, video_to_audio = similarity_scores(similarity), similarity_scores(similarity.T)
    return (
        f"R@1 audio to video {audio_to_video.r1.value:.1%}, "
        f"video to audio {video_to_audio.r1.value:.1%}, chance {audio_to_video.r1.chance:.1%}"
    )


def plot_similarity(path: Path, similarity: torch.Tensor) -> None:
    """Write a PNG of a similarity matrix, with R@1 both ways in its title.

    Args:
        path: file to write; its folder is created.
        similarity: (clips, clips) cosine similarities, audio clips in rows, videos in columns.
    """
    matrix = _on_cpu(similarity)

    figure = _figure(7, 6)
    axis = figure.subplots()
    image = axis.imshow(matrix.numpy(), interpolation="nearest", cmap="viridis")
    last = len(matrix) - 0.5
    axis.plot((-0.5, last), (-0.5, last), color="red", linewidth=0.6, linestyle=(0, (2, 6)))
    axis.set(xlabel="video of clip", ylabel="audio of clip")
    axis.set_title(
        f"Similarity of {len(matrix)} validation clips; the dashed line marks the true pairs\n"
        f"{similarity_title(matrix)}",
        fontsize=10,
    )
    figure.colorbar(image, ax=axis, label="cosine similarity")
    save_figure(figure, path)


def plot_classes(
    path: Path,
    title: str,
    names: Sequence[str],
    clips: Sequence[int],
    average_precision: Sequence[float | None],
) -> None:
    """Write a PNG of the average precision of all classes, the worst first, with the clips of each.

    Args:
        path: file to write; its folder is created.
        title: of the figure.
        names: of the classes.
        clips: number of positive clips of each class.
        average_precision: of each class; those without one are not shown.
    """
    scored = [
        (value, names[number], clips[number])
        for number, value in enumerate(average_precision)
        if value is not None
    ]
    scored.sort()
    places = range(1, len(scored) + 1)
    figure = _figure(9, 7)
    above, below = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [3, 1]})
    above.bar(places, [value for value, _, _ in scored], width=1.0)
    above.set(ylim=(0, 1), ylabel="average precision")
    above.set_title(title, fontsize=10)
    below.bar(places, [count for _, _, count in scored], width=1.0, color="0.5")
    below.set(yscale="log", ylim=(0.5, None), xlabel="classes by average precision", ylabel="clips")
    named = min(NAMED_CLASSES, len(scored) // 2)
    # The bars rise to the right: these two corners are free.
    corners = (("worst", scored[:named], 0.02, 0.97), ("best", scored[::-1][:named], 0.98, 0.03))
    for word, some, x, y in corners:
        lines = [f"{value:.2f}  {name[:40]} ({count})" for value, name, count in some]
        above.text(
            x,
            y,
            "\n".join([f"{word} (clips)", *lines]),
            transform=above.transAxes,
            horizontalalignment="left" if x < 0.5 else "right",
            verticalalignment="top" if y > 0.5 else "bottom",
            multialignment="left",
            fontsize=8,
            bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none"},
            parse_math=False,  # a name may have dollar signs
        )
    save_figure(figure, path)


def _show_spectrogram(axis: "Axes", mel: torch.Tensor, low: float, high: float) -> None:
    """Draw a spectrogram, (mel_bins, audio_frames)."""
    bins, frames = mel.shape
    axis.set_facecolor(REMOVED_GRAY)  # shows where values are NaN
    axis.imshow(
        mel.numpy(),
        origin="lower",
        aspect="auto",
        cmap="magma",
        vmin=low,
        vmax=high,
        interpolation="nearest",
        extent=(0, frames * FRAME_SECONDS, 0, bins),
    )
    axis.tick_params(labelsize=7)


def _show_frame(axis: "Axes", frame: torch.Tensor) -> None:
    """Draw a normalised frame, (3, height, width)."""
    axis.imshow(frame_colours(frame), interpolation="nearest")
    axis.set_axis_off()


def frame_colours(frame: torch.Tensor) -> np.ndarray:
    """Convert a normalised frame, (3, height, width) float32, to (height, width, 3) from 0 to 1;
    NaN is grey."""
    colours = frame.permute(1, 2, 0).numpy() * IMAGE_STD + IMAGE_MEAN  # (height, width, 3)
    return np.nan_to_num(colours, nan=float(REMOVED_GRAY)).clip(0, 1)


def _removed_share(mask: MaskIds) -> float:
    return mask.removed.shape[1] / mask.restore.shape[1]


def _on_cpu(x: torch.Tensor) -> torch.Tensor:
    return x.detach().float().cpu()


def _figure(width: float, height: float) -> "Figure":
    """Make a figure of so many inches. Its library is imported by the ranks that draw alone."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=100, layout="constrained")


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a figure as PNG, atomically; its folder is created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png")
