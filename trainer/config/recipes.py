"""Recipes of pretraining: one function a run, with its command and what to expect of it.

Every field can be overridden on the command line: `cavmae pretrain RECIPE --field value`.
"""

import dataclasses
from collections.abc import Callable

from cavmae.dataloaders.config import Augmentation, DataConfig
from cavmae.trainer.config.configs import (
    CheckpointConfig,
    EngineConfig,
    EvaluationConfig,
    LossConfig,
    MaskConfig,
    OptimizerConfig,
    PretrainConfig,
    ScheduleConfig,
    TrackingConfig,
)
from cavmae.trainer.model.config import ModelConfig


def demo() -> PretrainConfig:
    """A 1.8 M parameter model that learns designed correspondences in minutes on two CPU cores.

    `make demo`, or `cavmae pretrain demo --data.train SHARDS/video` on your own clips. Its
    contrastive weight of 1 and mask ratio of 0.5 differ from the published 0.01 and 0.75: they
    teach retrieval sooner on small data, and its scores say nothing about natural video.
    """
    return PretrainConfig(
        run_dir="runs/demo",
        steps=600,
        global_batch=128,
        micro_batch=64,
        model=ModelConfig(
            audio_frames=192,
            mel_bins=64,
            image_size=64,
            width=128,
            modality_depth=3,
            joint_depth=1,
            heads=4,
            decoder_width=96,
            decoder_depth=1,
            decoder_heads=4,
        ),
        data=DataConfig(reader_workers=1, decode_threads=1),
        mask=MaskConfig(audio_ratio=0.5, video_ratio=0.5),
        loss=LossConfig(contrastive_weight=1.0, bidirectional=True),
        optimizer=OptimizerConfig(
            name="adamw", learning_rate=1e-3, beta1=0.9, beta2=0.98, weight_decay=0.01
        ),
        schedule=ScheduleConfig(name="cosine", warmup_steps=50),
        engine=EngineConfig(zero_stage=1, clip_grad_norm=1.0),
        checkpoint=CheckpointConfig(every_steps=200),
        evaluation=EvaluationConfig(every_steps=200, clips=200),
        tracking=TrackingConfig(every_steps=20),
    )


def paper_audioset() -> PretrainConfig:
    """AudioSet-2M as published: 25 epochs, 48 clips a step in groups of 12, Adam, no clipping.

    `cavmae pretrain paper_audioset --data.train AUDIOSET/frames --initial-weights MAE.pth`, packed
    with `--frame-choice published`. Published at the end of epoch 25 on AudioSet-2M, held out:
    reconstruction 3.309, contrastive 0.0238 (weighted), contrastive accuracy 0.798. Those logs sum
    the losses of four GPUs, which `loss.scale` stands for.
    """
    return PretrainConfig(
        run_dir="runs/paper_audioset",
        epochs=25,
        global_batch=48,
        micro_batch=12,
        data=DataConfig(frame_choice="published", augmentation=Augmentation(noise=True)),
        loss=LossConfig(contrastive_group=12, scale=4.0),
        optimizer=OptimizerConfig(learning_rate=5e-5),
        schedule=ScheduleConfig(name="step", step_start_epochs=10, step_every_epochs=5),
    )


def paper_vggsound() -> PretrainConfig:
    """VGGSound as published: 25 epochs, 120 clips a step in groups of 30, Adam, no clipping.

    `cavmae pretrain paper_vggsound --data.train VGGSOUND/frames --initial-weights MAE.pth`, packed
    with `--frame-choice published`.
    """
    return PretrainConfig(
        run_dir="runs/paper_vggsound",
        epochs=25,
        global_batch=120,
        micro_batch=30,
        data=DataConfig(frame_choice="published", augmentation=Augmentation(noise=True)),
        loss=LossConfig(contrastive_group=30, scale=4.0),
        optimizer=OptimizerConfig(learning_rate=1e-4),
        schedule=ScheduleConfig(name="step", step_start_epochs=10, step_every_epochs=5),
    )


def audioset_base() -> PretrainConfig:
    """The base model made for speed: 1,024 clips a step, all of them negatives.

    `deepspeed --module cavmae.trainer.pretrain audioset_base --data.train SHARDS/frames`.
    Nobody has trained it to the end yet: its quality against `paper_audioset` has to be shown.
    """
    return PretrainConfig(
        run_dir="runs/audioset_base",
        epochs=25,
        global_batch=1024,
        micro_batch=128,
        loss=LossConfig(bidirectional=True),
        optimizer=OptimizerConfig(
            name="adamw", learning_rate=4e-4, beta1=0.9, beta2=0.95, weight_decay=0.01
        ),
        schedule=ScheduleConfig(name="cosine", warmup_steps=2000),
        engine=EngineConfig(clip_grad_norm=1.0, compile=True),
    )


def audioset_large() -> PretrainConfig:
    """ViT-L encoders: 24 layers of width 1,024, the last one shared; the decoder of the base model.

    `deepspeed --module cavmae.trainer.pretrain audioset_large --data.train SHARDS/frames`.
    619 M parameters. Nobody has trained it: a few steps on a CPU are all that was run. Learning
    rate and batch are those of `audioset_base`, as masked autoencoders of both sizes were trained
    alike (He et al., 2022, appendix A.1).
    """
    return dataclasses.replace(
        audioset_base(),
        run_dir="runs/audioset_large",
        model=ModelConfig(width=1024, modality_depth=23, joint_depth=1, heads=16),
    )


def audioset_huge() -> PretrainConfig:
    """ViT-H encoders: 32 layers of width 1,280, the last one shared; the decoder of the base model.

    `deepspeed --module cavmae.trainer.pretrain audioset_huge --data.train SHARDS/frames`.
    1.27 billion parameters, so ZeRO 3 shares them out. Nobody has trained it. Patches stay 16 x 16:
    those of the published ViT-H are 14 x 14, which do not divide a spectrogram of 128 bins, nor the
    512 places that its position table has.
    """
    return dataclasses.replace(
        audioset_base(),
        run_dir="runs/audioset_huge",
        model=ModelConfig(width=1280, modality_depth=31, joint_depth=1, heads=16),
        engine=EngineConfig(zero_stage=3, clip_grad_norm=1.0),
    )


PRETRAIN_RECIPES: dict[str, Callable[[], PretrainConfig]] = {
    recipe.__name__: recipe
    for recipe in (
        demo,
        paper_audioset,
        paper_vggsound,
        audioset_base,
        audioset_large,
        audioset_huge,
    )
}
