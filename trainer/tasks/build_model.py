"""The model that a run trains, with random weights and everything frozen that is not trained.

The tasks load the weights that a run starts from; the memory model builds the same models without
values.
"""

from cavmae.trainer.config.configs import EngineConfig, FinetuneConfig, PretrainConfig, RunConfig
from cavmae.trainer.model.cavmae import CAVMAE
from cavmae.trainer.model.classifier import CAVMAEClassifier
from cavmae.trainer.model.encoder import AudioVideoEncoder

ASSUMED_CLASSES = 527
"""AudioSet's. Memory is predicted without the labels, which this machine may not have; a class
takes some 15 kB of the base model."""


def build_model(config: RunConfig) -> CAVMAE | CAVMAEClassifier:
    """Build the model of any run; a classifier has `ASSUMED_CLASSES`."""
    if isinstance(config, FinetuneConfig):
        return classifier(config, ASSUMED_CLASSES)
    assert isinstance(config, PretrainConfig)
    return autoencoder(config)


def autoencoder(config: PretrainConfig) -> CAVMAE:
    """Build the model of a pretraining run, with parameters frozen that no loss uses."""
    model = CAVMAE(config.model)
    model.freeze_unused(
        reconstruct=config.loss.reconstruction_weight > 0,
        contrast=config.loss.contrastive_weight > 0,
        modalities=config.data.modalities,
    )
    return model


def classifier(config: FinetuneConfig, classes: int) -> CAVMAEClassifier:
    """Build the model of a fine-tuning run, its encoders frozen if they are not trained."""
    settings = config.classifier
    model = CAVMAEClassifier(config.model, classes)
    model.freeze_unused(settings.mode)
    if not settings.train_encoders:
        encoders, _ = model.parameter_groups()
        for parameter in encoders:
            parameter.requires_grad_(False)
    return model


def configure_blocks(model: AudioVideoEncoder, engine: EngineConfig) -> None:
    """Set attention, recomputation and compilation of the transformer blocks."""
    if engine.attention != "auto":
        model.use_attention(engine.attention)
    model.recompute_blocks(engine.activation_checkpointing)
    if engine.compile:
        model.compile_blocks()
