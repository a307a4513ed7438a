"""Floating-point operations of the model: what the arithmetic needs, not what a kernel spends.

A multiply-add counts as two. Attention recomputed in the backward pass is not counted again. The
test compares the formulas with torch's own counter.
"""

from collections.abc import Collection
from dataclasses import astuple, dataclass

from cavmae.trainer.model.blocks import Modality
from cavmae.trainer.model.classifier import STREAMS, Mode
from cavmae.trainer.model.config import ModelConfig
from cavmae.trainer.model.masking import decoded_count

_PIXELS_AUDIO, _PIXELS_VIDEO = 256, 768  # values of a 16 x 16 patch


@dataclass(frozen=True)
class PartFlops:
    """Operations of one sample by part of the model.

    Attributes:
        embed: kept patches to tokens.
        encoders: the blocks of both modalities.
        joint: the blocks that all streams share.
        decoder: from the joint tokens to the removed patches' pixels; 0 without reconstruction.
    """

    embed: int
    encoders: int
    joint: int
    decoder: int

    @property
    def total(self) -> int:
        """Operations of all parts."""
        return sum(astuple(self))


def _block(tokens: int, width: int, queries: int | None = None) -> int:
    """Count one transformer block: linear layers of 12 width^2 weights, and attention. The first
    layer runs on all tokens; attention, projection and MLP on the queries."""
    queries = tokens if queries is None else queries
    return 6 * tokens * width**2 + 18 * queries * width**2 + 4 * queries * tokens * width


def _cross_block(queries: int, tokens: int, width: int) -> int:
    """Count one block of the cross-attention decoder: query, projection and MLP of the queries, key
    and value of the tokens, and attention."""
    return 20 * queries * width**2 + 4 * tokens * width**2 + 4 * queries * tokens * width


def forward_flops(
    config: ModelConfig,
    audio_ratio: float = 0.75,
    video_ratio: float = 0.75,
    *,
    reconstruct: bool = True,
    modalities: Collection[Modality] = ("audio", "video"),
) -> PartFlops:
    """Count the operations of one pretraining forward pass of one sample.

    Only what the losses need is counted: kept patches embedded, removed patches predicted, which
    the last block of the decoder gives alone; of a cross-attention decoder, the share of them that
    training decodes.

    Args:
        config: sizes of the model.
        audio_ratio, video_ratio: shares of patches removed.
        reconstruct: whether the joint stream and the decoder run.
        modalities: that the model is given; one alone is reconstructed from its own stream.
    """
    audio_tokens = config.audio_tokens if "audio" in modalities else 0
    video_tokens = config.video_tokens if "video" in modalities else 0
    audio, video = int(audio_tokens * (1 - audio_ratio)), int(video_tokens * (1 - video_ratio))
    width, decoder_width = config.width, config.decoder_width
    joint = _block(audio, width) + _block(video, width)
    decoder = 0
    if reconstruct:
        if len(modalities) > 1:
            joint += config.joint_depth * _block(audio + video, width)
        decoded_audio, decoded_video = (
            decoded_count(removed, config.decoded_share)
            for removed in (audio_tokens - audio, video_tokens - video)
        )
        decoded, tokens = decoded_audio + decoded_video, audio_tokens + video_tokens
        predicted = decoded_audio * _PIXELS_AUDIO + decoded_video * _PIXELS_VIDEO
        decoder = 2 * (audio + video) * width * decoder_width + 2 * decoder_width * predicted
        if config.decoder == "cross":
            decoder += config.decoder_depth * _cross_block(decoded, audio + video, decoder_width)
        else:
            decoder += (config.decoder_depth - 1) * _block(tokens, decoder_width)
            decoder += _block(tokens, decoder_width, decoded)
    return PartFlops(
        embed=2 * width * (audio * _PIXELS_AUDIO + video * _PIXELS_VIDEO),
        encoders=config.modality_depth * (_block(audio, width) + _block(video, width)),
        joint=joint,
        decoder=decoder,
    )


def backward_flops(forward: PartFlops) -> PartFlops:
    """Count the operations of the backward pass of one sample: a product for the gradient of each
    factor of the forward pass, except for pixels, which need none."""
    return PartFlops(
        embed=forward.embed,
        encoders=2 * forward.encoders,
        joint=2 * forward.joint,
        decoder=2 * forward.decoder,
    )


def training_flops(
    config: ModelConfig,
    audio_ratio: float = 0.75,
    video_ratio: float = 0.75,
    *,
    reconstruct: bool = True,
    modalities: Collection[Modality] = ("audio", "video"),
) -> int:
    """Count the operations of forward and backward pass of one sample.

    Args:
        config, audio_ratio, video_ratio, reconstruct, modalities: see `forward_flops`.
    """
    forward = forward_flops(
        config, audio_ratio, video_ratio, reconstruct=reconstruct, modalities=modalities
    )
    return forward.total + backward_flops(forward).total


def classification_flops(config: ModelConfig, mode: Mode, *, encoders: bool = True) -> int:
    """Count the operations of forward and backward pass of one sample of fine-tuning.

    All patches are kept. The classifier's own layer is left out: 0.001 of the base model.

    Args:
        config: sizes of the model.
        mode: which modalities are read.
        encoders: whether they are trained, not the classifier alone.
    """
    streams, width = STREAMS[mode], config.width
    tokens = {"audio": config.audio_tokens, "video": config.video_tokens}
    values = {"audio": _PIXELS_AUDIO, "video": _PIXELS_VIDEO}
    read = {modality for held in streams.values() for modality in held}
    embed = sum(2 * width * tokens[one] * values[one] for one in read)
    blocks = sum(config.modality_depth * _block(tokens[one], width) for one in read)
    for held in streams.values():
        blocks += config.joint_depth * _block(sum(tokens[one] for one in held), width)
    return 2 * embed + 3 * blocks if encoders else embed + blocks
