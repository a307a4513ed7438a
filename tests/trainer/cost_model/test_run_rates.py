"""The rates of a run are counted operations over the time that they took, and cost no wait."""

import dataclasses
import time
from contextlib import nullcontext

import pytest
import torch
from tiny_run import tiny_finetuning, tiny_run
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cavmae.trainer.config.configs import ModelConfig, PretrainConfig, TrackingConfig
from cavmae.trainer.cost_model.flops import classification_flops, training_flops
from cavmae.trainer.cost_model.run_rates import RunRates, peak_flops_per_second, sample_flops
from cavmae.trainer.model.classifier import CAVMAEClassifier, Mode

CPU = torch.device("cpu")
CLASSES = 2
NARROW = ModelConfig(
    audio_frames=256, mel_bins=64, image_size=64, width=96, heads=4, modality_depth=3, joint_depth=2
)


def of(dtype: str, peak_tflops: float = 0.0) -> PretrainConfig:
    config = PretrainConfig(tracking=TrackingConfig(peak_tflops=peak_tflops))
    return dataclasses.replace(config, engine=dataclasses.replace(config.engine, dtype=dtype))


def test_rates_are_of_the_time_without_validation_and_checkpoints(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 50.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    config = of("bf16", peak_tflops=2.0)
    rates = RunRates(config, 4, CPU, lambda name: nullcontext())
    rates.begin(10, waited=3.0)
    for name, seconds in (("forward", 4.0), ("validation", 5.0), ("checkpoint", 1.0)):
        with rates.span(name):
            now += seconds
    found = rates.metrics(12, waited=4.0)  # two steps in 4 of 10 s
    samples = 2 * config.global_batch
    assert found["attempt_seconds"] == 10.0 and found["samples_per_second"] == samples / 10
    assert found["data_wait_share"] == 0.1 and found["data_wait_seconds"] == 1.0
    assert (found["validation_seconds"], found["checkpoint_seconds"]) == (5.0, 1.0)
    assert found["tokens_per_second"] == samples / 4 * (64 * 8 + 14 * 14)
    flops = training_flops(config.model) * samples / 4 / 4  # seconds, ranks
    assert found["tflops_per_rank"] == pytest.approx(flops / 1e12)
    assert found["mfu"] == pytest.approx(flops / 2e12)
    assert found["peak_memory_bytes"] > 1e8
    now += 1.0
    again = rates.metrics(13, waited=4.0)
    assert (again["validation_seconds"], again["data_wait_share"]) == (5.0, 0.0)
    assert again["samples_per_second"] == config.global_batch
    assert again["mfu"] == pytest.approx(2 * found["mfu"])  # a step a second, not in two
    assert rates.seconds(4.0) == {name: again[name] for name in rates.seconds(4.0)}


@pytest.mark.field
@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA H200", "bf16", 989.5e12),  # dense: the data sheet's larger number is for sparsity
        ("NVIDIA H100 PCIe", "bf16", 756.5e12),
        ("NVIDIA A100-SXM4-40GB", "fp32", 19.5e12),
        ("NVIDIA L40S", "bf16", 0.0),  # no L4
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", 0.0),  # a seventh of it
        ("NVIDIA GeForce RTX 4090", "bf16", 0.0),
    ],
)
def test_mfu_is_of_the_gpu_that_is_there_or_not_said(
    name: str, dtype: str, peak: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    cuda = torch.device("cuda")
    assert peak_flops_per_second(of(dtype), cuda) == peak
    assert peak_flops_per_second(of(dtype, peak_tflops=3.0), cuda) == 3e12
    assert peak_flops_per_second(of(dtype), CPU) == 0.0


@pytest.mark.parametrize("mode", ["multimodal", "audioonly", "videoonly"])
def test_operations_of_fine_tuning_agree_with_torchs_counter(mode: Mode) -> None:
    model = CAVMAEClassifier(NARROW, CLASSES)
    log_mel, frame = torch.randn(1, 256, 64), torch.randn(1, 3, 64, 64)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        model(log_mel, frame, mode).logits.sum().backward()
    trained = classification_flops(NARROW, mode)
    assert trained == pytest.approx(counted.get_total_flops(), rel=0.01)
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad(), FlopCounterMode(display=False) as counted:
        model(log_mel, frame, mode)
    alone = classification_flops(NARROW, mode, encoders=False)
    assert alone == pytest.approx(counted.get_total_flops(), rel=0.01)


def test_each_kind_of_run_has_its_own_operations(tmp_path) -> None:
    pretraining, tuning = tiny_run(tmp_path, tmp_path), tiny_finetuning(tmp_path, tmp_path)
    assert sample_flops(pretraining) == training_flops(pretraining.model)
    assert sample_flops(tuning) == classification_flops(tuning.model, "multimodal")
    head = dataclasses.replace(tuning.classifier, train_encoders=False)
    frozen = dataclasses.replace(tuning, classifier=head)
    assert sample_flops(frozen) < sample_flops(tuning) / 2
