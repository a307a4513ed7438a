"""What a model is and how its input is made: `config.json` beside exported weights.

Whoever loads the weights can build the model and feed it from this file alone.
"""

from dataclasses import dataclass
from typing import Literal

from cavmae.trainer.model.config import ModelConfig


@dataclass(frozen=True)
class Preprocessing:
    """From sound and picture to the model's input, in the order of the fields."""

    audio_hz: int
    """Samples a second of the mono sound, in -1 to 1."""
    window_samples: int
    """Samples under each Hann window of the log-mel; whole windows only."""
    hop_samples: int
    """Samples from one window to the next; the model's `audio_frames` windows are taken, fewer are
    padded with zeros before normalisation."""
    fft_samples: int
    """Length of the Fourier transform."""
    preemphasis: float
    """Coefficient of the pre-emphasis, after the mean of each window is subtracted."""
    lowest_hz: float
    """Lower edge of the first of `mel_bins` HTK mel filters; the last one ends at half of
    `audio_hz`. The natural log of the power is taken."""
    log_mel_mean: float
    """Subtracted from the log-mel."""
    log_mel_std: float
    """The log-mel is divided by this afterwards."""
    image_mean: tuple[float, float, float]
    """Subtracted from red, green and blue in 0 to 1 of the picture, whose short side is resized to
    `image_size` (bilinear with antialiasing, as PIL does) and whose middle is cut out."""
    image_std: tuple[float, float, float]
    """Red, green and blue are divided by this afterwards."""


@dataclass(frozen=True)
class ModelSpec:
    """Sizes, kind and input of a model."""

    model: ModelConfig
    """Sizes."""
    mode: Literal["", "multimodal", "audioonly", "videoonly"]
    """What a classifier is to read: both, sound or picture; empty: a pretraining model."""
    classes: int
    """Outputs of a classifier; 0: a pretraining model."""
    labels: tuple[str, ...]
    """Of each class, for people; empty where they are not known."""
    video: bool
    """False: a classifier without the parameters that only pictures use."""
    preprocessing: Preprocessing
    """How its input is made."""
