"""Recipes: one function per run, with its command and the results to expect.

Every field can be overridden on the command line: `cavmae pretrain RECIPE --field value`. The
fine-tuning recipes are the published ones. Their scores come from the published logs: weights
averaged over epochs, predictions averaged over ten frames (`cavmae evaluate classify RUN SHARDS
--frames 10`). Their hours are computed, not measured: 397 GFLOP per sample at 46% of an H200's
peak, which pretraining aims for.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from cavmae.dataloaders.config import Augmentation, DataConfig
from cavmae.trainer.config.configs import (
    CheckpointConfig,
    ClassifierConfig,
    EngineConfig,
    FinetuneConfig,
    LossConfig,
    OptimizerConfig,
    PretrainConfig,
    RunConfig,
    ScheduleConfig,
    TrackingConfig,
    ValidationConfig,
)
from cavmae.trainer.model.config import MaskConfig, ModelConfig


def demo() -> PretrainConfig:
    """A 1.8 M parameter model that learns synthetic correspondences in minutes on two CPU cores.

    `make demo`, or `cavmae pretrain demo --data.train SHARDS/video` on your own clips. Its
    contrastive weight of 1 and mask ratio of 0.5 differ from the published 0.01 and 0.75, because
    small data teaches retrieval sooner that way. Its scores say nothing about natural video.
    """
    return PretrainConfig(
        run_dir="runs/demo",
        steps=400,
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
            name="adamw", learning_rate=1.5e-3, beta1=0.9, beta2=0.98, weight_decay=0.01
        ),
        schedule=ScheduleConfig(name="cosine", warmup_steps=50),
        engine=EngineConfig(
            zero_stage=1,
            clip_grad_norm=1.0,
            activation_checkpointing="none",  # its memory is small, its time is what one waits for
        ),
        checkpoint=CheckpointConfig(every_steps=200),
        validation=ValidationConfig(every_steps=200, clips=200),
        tracking=TrackingConfig(every_steps=20),
    )


def paper_audioset() -> PretrainConfig:
    """AudioSet-2M as published: 25 epochs, batches of 48 in groups of 12, Adam, no clipping.

    `cavmae pretrain paper_audioset --data.train AUDIOSET/frames --initial-weights MAE.pth`, packed
    with `--frame-choice published`. Published validation scores after epoch 25: reconstruction
    3.309, contrastive 0.0238 (weighted), contrastive accuracy 0.798. The published code sums the
    losses of four GPUs, which `loss.scale` reproduces.
    """
    return PretrainConfig(
        run_dir="runs/paper_audioset",
        epochs=25,
        global_batch=48,
        micro_batch=48,
        data=DataConfig(frame_choice="published", augmentation=Augmentation(noise=True)),
        loss=LossConfig(contrastive_group=12, scale=4.0),
        optimizer=OptimizerConfig(learning_rate=5e-5),
        schedule=ScheduleConfig(name="step", step_start_epochs=10, step_every_epochs=5),
    )


def paper_vggsound() -> PretrainConfig:
    """VGGSound as published: 25 epochs, batches of 120 in groups of 30, Adam, no clipping.

    `cavmae pretrain paper_vggsound --data.train VGGSOUND/frames --initial-weights MAE.pth`, packed
    with `--frame-choice published`.
    """
    return replace(
        paper_audioset(),
        run_dir="runs/paper_vggsound",
        global_batch=120,
        micro_batch=120,
        loss=LossConfig(contrastive_group=30, scale=4.0),
        optimizer=OptimizerConfig(learning_rate=1e-4),
    )


def audioset_base() -> PretrainConfig:
    """The base model, tuned for speed: a global batch of 1,024 with in-batch negatives, which one
    H200 takes in one pass (predicted).

    `deepspeed --module cavmae.trainer.pretrain audioset_base --data.train SHARDS/frames`.
    Not yet trained to the end, so how it compares with `paper_audioset` is unknown.
    """
    return PretrainConfig(
        run_dir="runs/audioset_base",
        epochs=25,
        global_batch=1024,
        micro_batch=0,
        loss=LossConfig(bidirectional=True),
        optimizer=OptimizerConfig(
            name="adamw", learning_rate=4e-4, beta1=0.9, beta2=0.95, weight_decay=0.01
        ),
        schedule=ScheduleConfig(name="cosine", warmup_steps=2000),
        engine=EngineConfig(clip_grad_norm=1.0, compile=True),
    )


def efficient_base() -> PretrainConfig:
    """`audioset_base` with a cross-attention decoder for a third of the removed patches: 0.56 of
    the operations of a step (counted).

    `deepspeed --module cavmae.trainer.pretrain efficient_base --data.train SHARDS/frames`.
    Nobody has trained it, so what its features are worth is unknown.
    """
    base = audioset_base()
    return replace(
        base,
        run_dir="runs/efficient_base",
        model=replace(base.model, decoder="cross", decoded_share=1 / 3),
    )


def audioset_large() -> PretrainConfig:
    """ViT-L encoders: 24 layers of width 1,024, the last one shared; the base model's decoder.

    `deepspeed --module cavmae.trainer.pretrain audioset_large --data.train SHARDS/frames`.
    619 M parameters. Not yet trained, beyond a few steps on a CPU. Learning rate and batch size
    are those of `audioset_base`: masked autoencoders of both sizes were trained with the same ones
    (He et al., 2022, appendix A.1).
    """
    return replace(
        audioset_base(),
        run_dir="runs/audioset_large",
        model=ModelConfig(width=1024, modality_depth=23, joint_depth=1, heads=16),
    )


def audioset_huge() -> PretrainConfig:
    """ViT-H encoders: 32 layers of width 1,280, the last one shared; the base model's decoder.

    `deepspeed --module cavmae.trainer.pretrain audioset_huge --data.train SHARDS/frames`.
    1.27 billion parameters, sharded with ZeRO 3. Not yet trained. Patches stay 16 x 16: the
    published ViT-H has 14 x 14, which divide neither a spectrogram of 128 bins nor the 512 entries
    of its position table.
    """
    return replace(
        audioset_base(),
        run_dir="runs/audioset_huge",
        model=ModelConfig(width=1280, modality_depth=31, joint_depth=1, heads=16),
        engine=EngineConfig(zero_stage=3, clip_grad_norm=1.0),
    )


PUBLISHED_AUGMENTATION = Augmentation(frequency_mask=48, time_mask=192, noise=True, mixup_prob=0.5)


def audioset_20k() -> FinetuneConfig:
    """AudioSet-20K as published: 42.2 mAP with audio and video. 5 minutes on one H200.

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
        validation=ValidationConfig(every_steps=519, clips=20_000),
        classifier=ClassifierConfig(head_lr_mult=100),
    )


def audioset_20k_audio() -> FinetuneConfig:
    """Audio-only AudioSet-20K as published: 38.3 mAP. Otherwise like `audioset_20k`."""
    return _single_modality(audioset_20k(), "audioonly", "runs/audioset_20k_audio")


def audioset_20k_video() -> FinetuneConfig:
    """Video-only AudioSet-20K as published: 20.0 mAP. Otherwise like `audioset_20k`."""
    return _single_modality(audioset_20k(), "videoonly", "runs/audioset_20k_video")


def audioset_2m() -> FinetuneConfig:
    """AudioSet-2M as published: 51.2 mAP with audio and video. 5.4 hours on one H200.

    `cavmae finetune audioset_2m --initial-weights PRETRAINED --data.train AS2M/frames
    --data.validation EVAL/frames --classifier.labels class_labels_indices.csv`, packed with
    `--frame-choice published`. Clips of rare classes are sampled
    more often.
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
        validation=ValidationConfig(every_steps=10_000, clips=20_000),
        classifier=ClassifierConfig(head_lr_mult=50),
    )


def audioset_2m_audio() -> FinetuneConfig:
    """Audio-only AudioSet-2M as published: 46.6 mAP. Otherwise like `audioset_2m`."""
    return _single_modality(audioset_2m(), "audioonly", "runs/audioset_2m_audio")


def vggsound() -> FinetuneConfig:
    """VGGSound as published: 65.9% accuracy from AudioSet and VGGSound pretraining, 65.8% from
    AudioSet, 64.8% from VGGSound. 35 minutes on one H200.

    `cavmae finetune vggsound --initial-weights PRETRAINED --data.train VGGSOUND/frames
    --data.validation TEST/frames --classifier.labels class_labels_indices_vgg.csv`, packed with
    `--frame-choice published`.
    """
    return replace(
        audioset_2m(),
        run_dir="runs/vggsound",
        average_from_epoch=3,
        optimizer=OptimizerConfig(learning_rate=1e-4),
        validation=ValidationConfig(every_steps=3_827, clips=16_000),
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
        optimizer=replace(pretraining.optimizer, learning_rate=3e-4),
        schedule=ScheduleConfig(name="cosine", warmup_steps=20),
        engine=pretraining.engine,
        checkpoint=CheckpointConfig(every_steps=100),
        validation=ValidationConfig(every_steps=100, clips=200),
        tracking=pretraining.tracking,
        classifier=ClassifierConfig(loss="cross_entropy", head_lr_mult=10),
    )


PRETRAIN_RECIPES: dict[str, Callable[[], PretrainConfig]] = {
    recipe.__name__: recipe
    for recipe in (
        *(demo, paper_audioset, paper_vggsound),
        *(audioset_base, efficient_base, audioset_large, audioset_huge),
    )
}
FINETUNE_RECIPES: dict[str, Callable[[], FinetuneConfig]] = {
    recipe.__name__: recipe
    for recipe in (
        *(audioset_20k, audioset_20k_audio, audioset_20k_video),
        *(audioset_2m, audioset_2m_audio, vggsound, demo_finetune),
    )
}
RECIPES: dict[str, Callable[[], RunConfig]] = {**PRETRAIN_RECIPES, **FINETUNE_RECIPES}


def _single_modality(
    recipe: FinetuneConfig, mode: Literal["audioonly", "videoonly"], run_dir: str
) -> FinetuneConfig:
    return replace(recipe, run_dir=run_dir, classifier=replace(recipe.classifier, mode=mode))
