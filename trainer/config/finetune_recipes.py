"""Recipes of fine-tuning: the published ones, from a pretrained model to the published score.

The scores are those of the published logs, of the averaged weights and the mean over ten frames
(`cavmae evaluate classify RUN SHARDS --frames 10`). Hours are computed, not measured: 397 GFLOP a
sample, at the share of an H200's matrix rate (46%) that pretraining is to reach.
"""

from collections.abc import Callable
from dataclasses import replace

from cavmae.dataloaders.config import Augmentation, DataConfig
from cavmae.trainer.config.configs import (
    CheckpointConfig,
    EngineConfig,
    EvaluationConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrackingConfig,
)
from cavmae.trainer.config.finetune_config import ClassifierConfig, FinetuneConfig
from cavmae.trainer.config.recipes import demo

PUBLISHED_AUGMENTATION = Augmentation(frequency_mask=48, time_mask=192, noise=True, mixup_prob=0.5)


def audioset_20k() -> FinetuneConfig:
    """AudioSet-20K as published: 42.2 mAP with sound and picture. 5 minutes on one H200.

    `cavmae finetune audioset_20k --initial-weights PRETRAINED --data.train AS20K/frames
    --data.validation EVAL/frames --classifier.labels class_labels_indices.csv`, packed with
    `--frame-choice published`. The published run starts from AudioSet-2M pretraining.
    """
    return FinetuneConfig(
        run_dir="runs/audioset_20k",
        epochs=15,
        average_from_epoch=3,
        global_batch=36,
        micro_batch=36,
        data=DataConfig(frame_choice="published", augmentation=PUBLISHED_AUGMENTATION),
        optimizer=OptimizerConfig(learning_rate=5e-5),
        schedule=ScheduleConfig(step_start_epochs=5, step_every_epochs=1),
        evaluation=EvaluationConfig(every_steps=519, clips=20_000),
        classifier=ClassifierConfig(head_lr_mult=100),
    )


def audioset_20k_audio() -> FinetuneConfig:
    """AudioSet-20K by sound alone, as published: 38.3 mAP. As `audioset_20k` otherwise."""
    return _by_one("audioonly", audioset_20k(), "runs/audioset_20k_audio")


def audioset_20k_video() -> FinetuneConfig:
    """AudioSet-20K by pictures alone, as published: 20.0 mAP. As `audioset_20k` otherwise."""
    return _by_one("videoonly", audioset_20k(), "runs/audioset_20k_video")


def audioset_2m() -> FinetuneConfig:
    """AudioSet-2M as published: 51.2 mAP with sound and picture. 5.4 hours on one H200.

    `cavmae finetune audioset_2m --initial-weights PRETRAINED --data.train AS2M/frames
    --data.validation EVAL/frames --classifier.labels class_labels_indices.csv`, packed with
    `--frame-choice published`. Clips of rare classes come more often.
    """
    return FinetuneConfig(
        run_dir="runs/audioset_2m",
        epochs=10,
        average_from_epoch=1,
        global_batch=48,
        micro_batch=48,
        data=DataConfig(
            frame_choice="published", sampling="weighted", augmentation=PUBLISHED_AUGMENTATION
        ),
        optimizer=OptimizerConfig(learning_rate=1e-5),
        schedule=ScheduleConfig(step_start_epochs=2, step_every_epochs=1),
        evaluation=EvaluationConfig(every_steps=10_000, clips=20_000),
        classifier=ClassifierConfig(head_lr_mult=50),
    )


def audioset_2m_audio() -> FinetuneConfig:
    """AudioSet-2M by sound alone, as published: 46.6 mAP. As `audioset_2m` otherwise."""
    return _by_one("audioonly", audioset_2m(), "runs/audioset_2m_audio")


def vggsound() -> FinetuneConfig:
    """VGGSound as published: 65.9% accuracy from AudioSet and VGGSound pretraining, 65.8% from
    AudioSet, 64.8% from VGGSound. 35 minutes on one H200.

    `cavmae finetune vggsound --initial-weights PRETRAINED --data.train VGGSOUND/frames
    --data.validation TEST/frames --classifier.labels class_labels_indices_vgg.csv`, packed with
    `--frame-choice published`.
    """
    return FinetuneConfig(
        run_dir="runs/vggsound",
        epochs=10,
        average_from_epoch=3,
        global_batch=48,
        micro_batch=48,
        data=DataConfig(
            frame_choice="published", sampling="weighted", augmentation=PUBLISHED_AUGMENTATION
        ),
        optimizer=OptimizerConfig(learning_rate=1e-4),
        schedule=ScheduleConfig(step_start_epochs=2, step_every_epochs=1),
        evaluation=EvaluationConfig(every_steps=3_827, clips=16_000),
        classifier=ClassifierConfig(loss="cross_entropy", head_lr_mult=10),
    )


def demo_finetune() -> FinetuneConfig:
    """The model of `demo`, fine-tuned in a minute or two on two CPU cores.

    `cavmae finetune demo_finetune --initial-weights runs/demo/run/weights.pt
    --data.train SHARDS/video`; part of `make demo-full`.
    """
    pretraining = demo()
    return FinetuneConfig(
        run_dir="runs/demo_finetune",
        epochs=10,
        global_batch=32,
        micro_batch=16,
        model=pretraining.model,
        data=replace(pretraining.data, augmentation=Augmentation(mixup_prob=0.5)),
        optimizer=OptimizerConfig(
            name="adamw", learning_rate=3e-4, beta1=0.9, beta2=0.98, weight_decay=0.01
        ),
        schedule=ScheduleConfig(name="cosine", warmup_steps=20),
        engine=EngineConfig(zero_stage=1, clip_grad_norm=1.0),
        checkpoint=CheckpointConfig(every_steps=100),
        evaluation=EvaluationConfig(every_steps=100, clips=200),
        tracking=TrackingConfig(every_steps=20),
        classifier=ClassifierConfig(loss="cross_entropy", head_lr_mult=10),
    )


def _by_one(mode: str, both: FinetuneConfig, run_dir: str) -> FinetuneConfig:
    return replace(both, run_dir=run_dir, classifier=replace(both.classifier, mode=mode))


FINETUNE_RECIPES: dict[str, Callable[[], FinetuneConfig]] = {
    recipe.__name__: recipe
    for recipe in (
        audioset_20k,
        audioset_20k_audio,
        audioset_20k_video,
        audioset_2m,
        audioset_2m_audio,
        vggsound,
        demo_finetune,
    )
}
