"""A model that needs next to no time and memory, for benchmarks of what is around it."""

from cavmae.trainer.model.config import ModelConfig

TINY_MODEL = ModelConfig(
    audio_frames=192,
    mel_bins=32,
    image_size=32,
    width=32,
    modality_depth=1,
    heads=4,
    decoder_width=32,
    decoder_depth=1,
    decoder_heads=4,
)
