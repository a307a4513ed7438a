"""Traced activations equal what the allocator gives to a real forward and backward pass."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_run import MODEL
from torch.profiler import ProfilerActivity, profile

from cavmae.trainer.config.configs import (
    ClassifierConfig,
    EngineConfig,
    FinetuneConfig,
    LossConfig,
    PretrainConfig,
)
from cavmae.trainer.cost_model.activations import trace_activations
from cavmae.trainer.losses.classification import classification_loss
from cavmae.trainer.model.cavmae import CAVMAE
from cavmae.trainer.model.config import MaskConfig, ModelConfig
from cavmae.trainer.model.masking import random_masks
from cavmae.trainer.tasks.build_model import ASSUMED_CLASSES, build_model

traced = functools.cache(trace_activations)  # a trace serves every number of samples
SHAPE = dataclasses.replace(MODEL, width=64, modality_depth=3, decoder_width=64, decoder_depth=2)
CROSS = dataclasses.replace(SHAPE, decoder="cross", decoded_share=0.5)


def config_of(model: ModelConfig = SHAPE, **engine: Any) -> PretrainConfig:
    return PretrainConfig(
        global_batch=64, micro_batch=16, model=model, engine=EngineConfig(**engine)
    )


def finetuning_of(dtype: Any, recompute: Any, classifier: ClassifierConfig) -> FinetuneConfig:
    return FinetuneConfig(
        global_batch=64,
        micro_batch=16,
        model=SHAPE,
        engine=EngineConfig(dtype=dtype, activation_checkpointing=recompute),
        classifier=classifier,
    )


def peak_of_the_allocator(config: PretrainConfig, samples: int) -> int:
    """Most bytes of a real forward and backward pass; gradients stay in the parameters."""
    dtype = torch.bfloat16 if config.engine.dtype == "bf16" else torch.float32
    model = CAVMAE(config.model).to(dtype)
    model.freeze_unused(reconstruct=True, contrast=True)
    model.recompute_blocks(config.engine.activation_checkpointing)
    masks = random_masks(config.model, MaskConfig(), torch.arange(samples), seed=0)
    log_mel = torch.randn(samples, SHAPE.audio_frames, SHAPE.mel_bins)
    frame = torch.randn(samples, 3, SHAPE.image_size, SHAPE.image_size)

    def passes() -> None:
        output = model(log_mel, frame, *masks)
        loss = output.reconstruction_audio + output.reconstruction_video
        (loss + (output.audio_embedding * output.video_embedding).sum()).backward()

    return most_allocated(passes)


def peak_of_a_classifier(config: FinetuneConfig, samples: int) -> int:
    """The same of fine-tuning."""
    dtype = torch.bfloat16 if config.engine.dtype == "bf16" else torch.float32
    model = build_model(config).to(dtype)
    model.recompute_blocks(config.engine.activation_checkpointing)
    log_mel = torch.randn(samples, SHAPE.audio_frames, SHAPE.mel_bins)
    frame = torch.randn(samples, 3, SHAPE.image_size, SHAPE.image_size)
    targets = torch.rand(samples, ASSUMED_CLASSES)

    def passes() -> None:
        logits = model(log_mel, frame, mode=config.classifier.mode).logits
        classification_loss(logits, targets, config.classifier.loss).backward()

    return most_allocated(passes)


def most_allocated(work: Callable[[], None]) -> int:
    """Bytes beyond those that were there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events: list[Any] = profiler.profiler.kineto_results.events()
    changes = sorted((one.start_ns(), one.nbytes()) for one in events if one.name() == "[memory]")
    alive = most = 0
    for _, change in changes:
        alive += change
        most = max(most, alive)
    return most


@pytest.mark.parametrize("activation_checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("samples", [4, 32])
def test_counted_is_what_the_allocator_gave(
    samples: int, dtype: str, activation_checkpointing: str
) -> None:
    config = config_of(dtype=dtype, activation_checkpointing=activation_checkpointing)
    counted = traced(config).peak(samples, gradients_stay=True)
    assert counted == pytest.approx(peak_of_the_allocator(config, samples), rel=0.1)


@pytest.mark.parametrize("activation_checkpointing", ["selective", "full"])
def test_counted_is_what_the_allocator_gave_to_a_cross_attention_decoder(
    activation_checkpointing: str,
) -> None:
    config = config_of(CROSS, dtype="bf16", activation_checkpointing=activation_checkpointing)
    counted = traced(config).peak(32, gradients_stay=True)
    assert counted == pytest.approx(peak_of_the_allocator(config, 32), rel=0.1)


@pytest.mark.parametrize(
    ("dtype", "recompute", "mode"),
    [
        ("fp32", "none", "multimodal"),
        ("fp32", "selective", "multimodal"),
        ("bf16", "selective", "multimodal"),
        ("bf16", "full", "multimodal"),
        ("bf16", "selective", "audioonly"),
        ("fp32", "full", "videoonly"),
    ],
)
def test_counted_is_what_the_allocator_gave_to_a_classifier(
    dtype: Any, recompute: Any, mode: Any
) -> None:
    config = finetuning_of(dtype, recompute, ClassifierConfig(mode=mode))
    few, many = (traced(config).peak(samples, gradients_stay=True) for samples in (8, 64))
    got_few, got_many = (peak_of_a_classifier(config, samples) for samples in (8, 64))
    assert many == pytest.approx(got_many, rel=0.1)
    # Some CPUs' products need workspaces, which don't grow with the clips.
    assert many - few == pytest.approx(got_many - got_few, rel=0.1)


def test_encoders_that_are_not_trained_keep_nothing_for_a_backward_pass() -> None:
    asked = ClassifierConfig(train_encoders=False, loss="cross_entropy")
    probe = finetuning_of("fp32", "selective", asked)
    counted = traced(probe)
    assert counted.peak(32, gradients_stay=True) == pytest.approx(
        peak_of_a_classifier(probe, 32), rel=0.1
    )
    whole = traced(finetuning_of("fp32", "selective", ClassifierConfig()))
    assert counted.peak(32, gradients_stay=True) < 0.3 * whole.peak(32, gradients_stay=True)


def test_gradients_that_go_elsewhere_are_not_in_the_peak() -> None:
    passes = traced(config_of(dtype="fp32"))
    assert passes.peak(1, gradients_stay=False) < passes.peak(1, gradients_stay=True)
    model = CAVMAE(SHAPE)
    model.freeze_unused(reconstruct=True, contrast=True)
    trained = sum(one.numel() for one in model.parameters() if one.requires_grad)
    assert passes.gradient_bytes == 4 * trained


def test_what_is_recomputed_is_not_kept() -> None:
    none, selective, full = (
        traced(config_of(dtype="fp32", activation_checkpointing=how)).peak(64, gradients_stay=False)
        for how in ("none", "selective", "full")
    )
    assert selective < 0.8 * none
    assert full < 0.6 * none


def test_a_loss_that_is_left_out_takes_nothing() -> None:
    config = config_of(dtype="fp32")
    alone = dataclasses.replace(config, loss=LossConfig(reconstruction_weight=0))
    whole, less = (traced(one) for one in (config, alone))
    assert less.peak(8, gradients_stay=False) < 0.5 * whole.peak(8, gradients_stay=False)
    assert less.gradient_bytes < whole.gradient_bytes
