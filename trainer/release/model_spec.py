"""The sizes and preprocessing of a model: `config.json` beside exported weights.

This file alone is enough to build the model and to prepare its input.
"""

from dataclasses import dataclass
from typing import Literal

from cavmae.trainer.model.config import ModelConfig


@dataclass(frozen=True)
class Preprocessing:
    """How audio and images become the model's input, in the order of the fields."""

    audio_hz: int
    """Samples a second of the mono audio, in -1 to 1."""
    window_samples: int
    """Samples under each Hann window of the log-mel; whole windows only."""
    hop_samples: int
    """Samples from one window to the next; the model takes `audio_frames` windows, and fewer are
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
    """Subtracted from red, green and blue, 0 to 1, of the image, after its short side is resized to
    `image_size` (bilinear with antialiasing, as PIL does) and its center is cropped."""
    image_std: tuple[float, float, float]
    """Red, green and blue are divided by this afterwards."""


@dataclass(frozen=True)
class ModelSpec:
    """Sizes, kind and preprocessing of a model."""

    model: ModelConfig
    """Sizes."""
    mode: Literal["", "multimodal", "audioonly", "videoonly"]
    """Modalities that a classifier reads; empty for a pretraining model."""
    classes: int
    """Outputs of a classifier; 0 for a pretraining model."""
    labels: tuple[str, ...]
    """Display name of each class; empty where unknown."""
    loss: Literal["bce", "cross_entropy"]
    """What a classifier was trained with: its probabilities are sigmoids of the logits, or their
    softmax. Where that is unknown, and for a pretraining model, `bce`."""
    video: bool
    """Whether a classifier has the parameters that only video frames use."""
    preprocessing: Preprocessing
