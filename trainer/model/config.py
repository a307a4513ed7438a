"""Sizes and masks of a CAV-MAE model. Imports nothing heavy, so that `--help` answers at once."""

from dataclasses import dataclass
from typing import Annotated, Literal

from cavmae.field_checks import CheckedFields, Limit, PositiveInt

DecodedShare = Annotated[float, Limit(lambda x: 0 < x <= 1, "above 0, up to 1")]


@dataclass(frozen=True)
class ModelConfig(CheckedFields, section="model"):
    """Sizes of the model; the defaults are the published base model (paper section 4.1).

    Raises:
        ValueError: a size is not divisible as the architecture needs.
    """

    audio_frames: int = 1024
    """Spectrogram length in frames of 10 ms, a multiple of 16."""
    mel_bins: int = 128
    """Spectrogram height in mel bins, a multiple of 16."""
    image_size: int = 224
    """Side of the square video frame in pixels, a multiple of 16."""
    width: int = 768
    """Channels of an encoder token."""
    modality_depth: PositiveInt = 11
    """Transformer blocks of each single-modality encoder."""
    joint_depth: PositiveInt = 1
    """Transformer blocks of the joint encoder (published: 12 minus the modality depth). A single
    modality passes only through the last one, as in the published code."""
    heads: int = 12
    """Attention heads of the encoders."""
    decoder_width: int = 512
    """Channels of a decoder token."""
    decoder_depth: PositiveInt = 8
    """Transformer blocks of the decoder."""
    decoder_heads: int = 16
    """Attention heads of the decoder."""
    decoder: Literal["self", "cross"] = "self"
    """How the decoder's blocks attend. `self`: kept and removed patches attend to all of each
    other, as published; `cross`: removed patches attend to the encoders' tokens alone (CrossMAE),
    which costs much less."""
    decoded_share: DecodedShare = 1.0
    """With `cross`, share of each modality's removed patches that training decodes and compares,
    drawn anew for each sample: rounded to whole patches (a half to the even number), at least 1.
    Validation and pictures have all of them."""
    learnable_positions: bool = False
    """Train the position embeddings in pretraining; otherwise they are fixed sine-cosine ones."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("audio_frames", "mel_bins", "image_size"):
            value = getattr(self, field)
            if value < 16 or value % 16:
                nearest = max(16, round(value / 16) * 16)
                raise ValueError(
                    f"model.{field} is {value}; patches are 16 x 16, so use a multiple of 16 "
                    f"such as {nearest}"
                )
        for width, heads in (("width", "heads"), ("decoder_width", "decoder_heads")):
            channels, count = getattr(self, width), getattr(self, heads)
            if count < 1 or channels % count:
                raise ValueError(
                    f"model.{width} is {channels}, which {count} heads do not divide; "
                    f"change model.{width} or model.{heads}"
                )
            if channels % 4:
                raise ValueError(
                    f"model.{width} is {channels}; sine-cosine positions need a multiple of 4"
                )
        if self.decoder == "self" and self.decoded_share != 1:
            raise ValueError(
                f"model.decoded_share is {self.decoded_share} and model.decoder self, which "
                "decodes every patch; set model.decoder to cross, or model.decoded_share to 1"
            )

    @property
    def audio_grid(self) -> tuple[int, int]:
        """Audio patches as (rows of frequency, columns of time)."""
        return self.mel_bins // 16, self.audio_frames // 16

    @property
    def video_grid(self) -> tuple[int, int]:
        """Image patches as (rows, columns)."""
        return self.image_size // 16, self.image_size // 16

    @property
    def audio_tokens(self) -> int:
        return self.audio_grid[0] * self.audio_grid[1]

    @property
    def video_tokens(self) -> int:
        return self.video_grid[0] * self.video_grid[1]


MaskRatio = Annotated[float, Limit(lambda x: 0 <= x < 1, "0 up to below 1")]


@dataclass(frozen=True)
class MaskConfig(CheckedFields, section="mask"):
    """Which patches are masked (paper section 3.3)."""

    audio_ratio: MaskRatio = 0.75
    """Fraction of audio patches that are masked."""
    video_ratio: MaskRatio = 0.75
    """Fraction of image patches that are masked."""
    audio_mode: Literal["unstructured", "time", "freq", "tf"] = "unstructured"
    """Structure of the audio mask; image masks are always unstructured."""
