"""Models with random values everywhere, of a size that costs nothing."""

from dataclasses import replace
from typing import TypeVar

import torch
from tiny_run import MODEL

from cavmae.trainer.model.cavmae import CAVMAE
from cavmae.trainer.model.classifier import CAVMAEClassifier
from cavmae.trainer.release.export import preprocessing
from cavmae.trainer.release.model_spec import ModelSpec

Model = TypeVar("Model", bound=torch.nn.Module)

PRETRAINING = ModelSpec(
    model=MODEL,
    mode="",
    classes=0,
    labels=(),
    video=True,
    preprocessing=preprocessing(log_mel_mean=-4.5, log_mel_std=3.5),
    loss="bce",
)
CLASSIFIER = replace(PRETRAINING, mode="multimodal", classes=5, labels=tuple("abcde"))
SOUND_CLASSIFIER = replace(CLASSIFIER, mode="audioonly", video=False)


def random_pretraining_model() -> CAVMAE:
    torch.manual_seed(0)
    return _filled(CAVMAE(MODEL))


def random_classifier(classes: int = 5, *, video: bool = True) -> CAVMAEClassifier:
    torch.manual_seed(0)
    return _filled(CAVMAEClassifier(MODEL, classes, video=video))


def _filled(model: Model) -> Model:
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()
