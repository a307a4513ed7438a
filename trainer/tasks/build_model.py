"""The model that a run trains: what its stage does not use, or does not train, is frozen.

Weights are random; `pretraining.py` and `finetune.py` load those that a run starts from, and the
model of memory has the same models without values.
"""

from cavmae.trainer.config.configs import FinetuneConfig, PretrainConfig, RunConfig
from cavmae.trainer.model.cavmae import CAVMAE
from cavmae.trainer.model.classifier import CAVMAEClassifier

ASSUMED_CLASSES = 527
"""Of AudioSet. What a run takes is computed without its labels, which may not be here; a class is
some 15 kB of the base model."""


def trained_model(config: RunConfig) -> CAVMAE | CAVMAEClassifier:
    """Of any run; a classifier has `ASSUMED_CLASSES`."""
    if isinstance(config, FinetuneConfig):
        return classifier(config, ASSUMED_CLASSES)
    assert isinstance(config, PretrainConfig)
    return autoencoder(config)


def autoencoder(config: PretrainConfig) -> CAVMAE:
    """Of a pretraining run."""
    model = CAVMAE(config.model)
    model.freeze_unused(
        reconstruct=config.loss.reconstruction_weight > 0,
        contrast=config.loss.contrastive_weight > 0,
    )
    return model


def classifier(config: FinetuneConfig, classes: int) -> CAVMAEClassifier:
    """Of a fine-tuning run with so many labels."""
    asked = config.classifier
    model = CAVMAEClassifier(config.model, classes)
    model.freeze_unused(asked.mode)
    if not asked.train_encoders:
        encoders, _ = model.parameter_groups()
        for parameter in encoders:
            parameter.requires_grad_(False)
    return model
