"""Floating-point operations of the model: what the arithmetic needs, not what a kernel spends."""

from cavmae.trainer.model.config import ModelConfig

_PIXELS_AUDIO, _PIXELS_VIDEO = 256, 768  # values of a 16 x 16 patch


def _block(tokens: int, width: int) -> int:
    """One transformer block: linear layers of 12 width^2 weights, and attention."""
    return 24 * tokens * width**2 + 4 * tokens**2 * width


def forward_flops(
    config: ModelConfig,
    audio_ratio: float = 0.75,
    video_ratio: float = 0.75,
    *,
    reconstruct: bool = True,
) -> int:
    """Operations (a multiply-add is two) of one pretraining forward pass of one sample.

    Only what the losses need is counted: kept patches embedded, removed patches predicted.

    Args:
        config: sizes of the model.
        audio_ratio, video_ratio: shares of patches removed.
        reconstruct: whether the decoder runs.
    """
    audio = int(config.audio_tokens * (1 - audio_ratio))
    video = int(config.video_tokens * (1 - video_ratio))
    removed_audio, removed_video = config.audio_tokens - audio, config.video_tokens - video
    width, decoder_width = config.width, config.decoder_width
    embed = 2 * width * (audio * _PIXELS_AUDIO + video * _PIXELS_VIDEO)
    encoders = config.modality_depth * (_block(audio, width) + _block(video, width))
    joint = config.joint_depth * _block(audio + video, width)
    joint += _block(audio, width) + _block(video, width)
    if not reconstruct:
        return embed + encoders + joint
    tokens = config.audio_tokens + config.video_tokens
    decoder = 2 * (audio + video) * width * decoder_width
    decoder += config.decoder_depth * _block(tokens, decoder_width)
    predict = removed_audio * _PIXELS_AUDIO + removed_video * _PIXELS_VIDEO
    return embed + encoders + joint + decoder + 2 * decoder_width * predict


def training_flops(config: ModelConfig) -> int:
    """Operations of forward and backward pass of one sample at the default mask ratios."""
    return 3 * forward_flops(config)
