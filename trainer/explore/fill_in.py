"""*Fill in*: what a model makes of the patches that are removed from a clip, to see and to hear.

The sound is made from the log-mel, which has no phase: it is approximate, so the spectrogram that
nothing was removed from is made a sound in the same way, to hear what that alone costs. A model
that predicts patches normalised one by one (`loss.norm_pix`) gets the mean and the deviation of
each removed patch from the original.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from cavmae.dataloaders.constants import AUDIO_HZ
from cavmae.kernels import MaskMode
from cavmae.trainer.evaluation.reconstruct import Direction
from cavmae.trainer.explore.pictures import frame_picture, spectrogram_picture
from cavmae.trainer.inference.media import Window
from cavmae.trainer.inference.model import Model
from cavmae.trainer.tracking.figures import masked_and_reconstructed

ITERATIONS = 60
"""Of Griffin-Lim, for each sound."""


@dataclass(frozen=True)
class Filled:
    """A clip before and after.

    Attributes:
        frames, spectrograms: `original`, `masked` (grey where removed), `reconstructed`.
        sounds: `original` and `reconstructed`, each its samples per second and (samples,) int16;
            integers, because a player may scale floats to the loudest.
        errors: as of `Reconstruction.errors`.
        given: whether mean and deviation of removed patches are the original's.
    """

    frames: dict[str, Image.Image]
    spectrograms: dict[str, Image.Image]
    sounds: dict[str, tuple[int, np.ndarray]]
    errors: dict[str, dict[str, float] | None]
    given: bool


def fill_in(
    model: Model,
    window: Window,
    *,
    direction: Direction = "joint",
    audio_ratio: float | None = None,
    video_ratio: float | None = None,
    audio_mode: MaskMode | None = None,
    seed: int = 0,
) -> Filled:
    """Remove patches of sound and picture, and fill them in.

    Args:
        model, window, direction, audio_ratio, video_ratio, audio_mode, seed: as of
            `Model.reconstruct`.

    Raises:
        ValueError: as of `Model.reconstruct`.
    """
    made = model.reconstruct(
        window,
        direction=direction,
        audio_ratio=audio_ratio,
        video_ratio=video_ratio,
        audio_mode=audio_mode,
        seed=seed,
    )
    given = made.run.loss.norm_pix
    frames = {"original": made.frame}
    frames["masked"], frames["reconstructed"] = masked_and_reconstructed(
        made.frame, made.video_mask, made.predicted_video, given
    )
    heard = {"original": made.spectrogram}
    heard["masked"], heard["reconstructed"] = masked_and_reconstructed(
        made.spectrogram, made.audio_mask, made.predicted_audio, given
    )
    present = {name: one[0, 0, :, : made.present_frames] for name, one in heard.items()}
    # One scale for the three, so that one that is too loud shows.
    low, high = present["original"].min().item(), present["original"].max().item()
    sounds = made.sounds(iterations=ITERATIONS, seed=seed)
    return Filled(
        {name: frame_picture(one[0]) for name, one in frames.items()},
        {name: spectrogram_picture(one, low, high) for name, one in present.items()},
        {name: (AUDIO_HZ, sound) for name, sound in sounds.items()},
        made.errors(),
        given,
    )
