"""Every field of a fine-tuning run that pretraining does not have. Imports nothing heavy."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from cavmae.trainer.config.configs import RunConfig


@dataclass(frozen=True)
class ClassifierConfig:
    """The classes, and how they are learned (paper section 4.2).

    Raises:
        ValueError: a number out of its range.
    """

    labels: str = ""
    """CSV file of the classes with the columns index, mid, display_name, as published; clips are
    labelled by mid. Empty: the labels of the training set, by name."""
    allow_empty_classes: bool = False
    """Train although the label file has classes of which the training set has no clip."""
    mode: Literal["multimodal", "audioonly", "videoonly"] = "multimodal"
    """What is classified by: sound and picture, or one alone."""
    loss: Literal["bce", "cross_entropy"] = "bce"
    """`bce` for clips of several labels (AudioSet), `cross_entropy` for clips of one (VGGSound)."""
    label_smoothing: float = 0.1
    """Share of a target that is spread over all classes; 0: none."""
    head_lr_mult: float = 1.0
    """The learning rate of the classifier, which is new, as a multiple of the encoders'."""
    train_encoders: bool = True
    """Train all; otherwise the classifier alone, on frozen features (linear probe)."""

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"classifier.label_smoothing is {self.label_smoothing}; use 0 (none) up to below 1"
            )
        if self.head_lr_mult <= 0:
            raise ValueError(f"classifier.head_lr_mult is {self.head_lr_mult}; use a value above 0")


@dataclass(frozen=True)
class FinetuneConfig(RunConfig):
    """One fine-tuning run.

    Raises:
        ValueError: batch sizes that do not divide, with the nearest that do.
    """

    FIXED: ClassVar[tuple[str, ...]] = (*RunConfig.FIXED, "classifier")

    run_dir: str = "runs/finetune"
    """Folder of the run: configuration, checkpoints, labels, weights. An existing run goes on."""
    initial_weights: str = ""
    """Weights of a pretraining run, or a published CAV-MAE checkpoint, to start from; empty:
    random."""
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
