"""What a run is said to take is what real ranks take."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import run_ranks
from tiny_run import MODEL

from cavmae.cluster import train
from cavmae.trainer.config import EngineConfig, LossConfig, PretrainConfig
from cavmae.trainer.footprint import (
    Sizes,
    footprint,
    model_sizes,
    what_would_fit,
)
from cavmae.trainer.model.cavmae import CAVMAE
from cavmae.trainer.wire import TensorSizes

RANKS = Path(__file__).with_name("footprint_ranks.py")
CASES = [
    (stage, dtype, accumulation)
    for stage in (0, 1, 2, 3)
    for dtype in ("fp32", "bf16")
    for accumulation in (1, 2)
]
SIZES = Sizes(TensorSizes((190_000_000,), ()), activations_per_sample=150_000_000)


def config_of(stage: int, dtype: str, *, global_batch: int, micro_batch: int) -> PretrainConfig:
    return PretrainConfig(
        global_batch=global_batch,
        micro_batch=micro_batch,
        engine=EngineConfig(zero_stage=stage, dtype=dtype),  # pyright: ignore[reportArgumentType]
        model=MODEL,
    )


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_weights_gradients_and_optimizer_are_those_of_real_ranks(
    world_size: int, tmp_path: Path
) -> None:
    measured = run_ranks(RANKS, world_size, CASES, tmp_path)
    sizes = Sizes(TensorSizes((measured["parameters"],), ()), activations_per_sample=0)
    for (stage, dtype, accumulation), found in zip(CASES, measured["bytes"], strict=True):
        config = config_of(stage, dtype, global_batch=world_size * accumulation, micro_batch=1)
        said = footprint(config, sizes, world_size)
        expected = said.weights + said.gradients + said.optimizer + said.buckets
        case = (stage, dtype, accumulation)
        assert found == pytest.approx(expected, rel=0.03), case


def test_activations_are_what_autograd_keeps_and_grow_with_the_samples() -> None:
    config = config_of(1, "fp32", global_batch=8, micro_batch=4)
    sizes = model_sizes(config)
    model = CAVMAE(MODEL)
    assert sizes.trainable + sizes.frozen == sum(one.numel() for one in model.parameters())
    tokens = MODEL.audio_tokens + MODEL.video_tokens
    decoder = tokens * MODEL.decoder_width * 4
    assert 5 * decoder < sizes.activations_per_sample < 200 * decoder
    halved = model_sizes(config_of(1, "bf16", global_batch=8, micro_batch=4))
    assert 0.4 < halved.activations_per_sample / sizes.activations_per_sample < 0.75
    alone = dataclasses.replace(config, loss=LossConfig(reconstruction_weight=0))
    assert model_sizes(alone).frozen > 0, "a decoder that nothing needs is not trained"
    assert footprint(config, sizes, 1).activations == 4 * sizes.activations_per_sample
    assert torch.get_default_dtype() == torch.float32


def test_zero_shares_out_what_it_says() -> None:
    by_stage = [
        footprint(config_of(stage, "bf16", global_batch=64, micro_batch=8), SIZES, 8)
        for stage in (0, 1, 2, 3)
    ]
    assert by_stage[0].optimizer == 8 * by_stage[1].optimizer == 12 * SIZES.trainable
    assert by_stage[2].gradients * 8 == 4 * SIZES.trainable
    assert by_stage[3].weights * 8 == by_stage[2].weights == 2 * SIZES.trainable


def test_what_would_fit_is_what_costs_least() -> None:
    config = config_of(0, "bf16", global_batch=256, micro_batch=32)
    full = footprint(config, SIZES, 8).total
    assert list(what_would_fit(config, SIZES, 8, full - 1)) == [
        "--micro-batch 16",
        "--engine.zero-stage 1",
    ]
    assert list(what_would_fit(config, SIZES, 8, 4 << 30)) == []


def test_the_command_prints_what_a_rank_takes_and_starts_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["demo", "--workers", "4", "--dry-run"]
    assert train.main(words) == 0
    shown = capsys.readouterr().out
    assert "4 ranks" in shown and "activations" in shown and "sent in a step: gradients" in shown
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"a rank takes .* GB and memory_gb_per_worker"):
        train.main([*words, "--memory-gb-per-worker", "0.1"])


@pytest.mark.parametrize("value", [-1.0])
def test_a_memory_below_zero_is_refused(value: Any) -> None:
    from cavmae.cluster.config import ClusterConfig

    with pytest.raises(ValueError, match=r"memory_gb_per_worker is -1"):
        ClusterConfig(memory_gb_per_worker=value)
