"""The predicted memory of a run is what real ranks take."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launch import run_ranks
from tiny_run import MODEL

from cavmae.benchmarks.harness.process_memory import reset_peak, resident_bytes
from cavmae.cluster import train
from cavmae.dataloaders.config import Augmentation, DataConfig
from cavmae.trainer.config.configs import EngineConfig, PretrainConfig
from cavmae.trainer.config.recipes import demo, demo_finetune
from cavmae.trainer.cost_model.activations import ActivationTimeline
from cavmae.trainer.cost_model.comm_volume import TensorSizes
from cavmae.trainer.cost_model.memory import Sizes, footprint, model_sizes, sizes_at_most
from cavmae.trainer.cost_model.run_rates import peak_bytes

RANKS = Path(__file__).with_name("memory_ranks.py")
CASES = [
    (stage, dtype, accumulation)
    for stage in (0, 1, 2, 3)
    for dtype in ("fp32", "bf16")
    for accumulation in (1, 2)
]


def passes_of(sample_bytes: int, gradient_bytes: int) -> ActivationTimeline:
    """A timeline of one activation, and one gradient that is allocated when it is freed."""
    return ActivationTimeline(
        alloc=np.array([0, 1]),
        free=np.array([1, 2]),
        fixed=np.array([0, gradient_bytes]),
        per_sample=np.array([sample_bytes, 0]),
        gradient=np.array([False, True]),
        operations=2,
    )


TENSORS = TensorSizes((190_000_000,), ())
SIZES = Sizes(TENSORS, passes_of(150_000_000, 2 * TENSORS.trainable[0]))


def config_of(stage: int, dtype: str, *, global_batch: int, micro_batch: int) -> PretrainConfig:
    return PretrainConfig(
        global_batch=global_batch,
        micro_batch=micro_batch,
        engine=EngineConfig(zero_stage=stage, dtype=dtype),  # pyright: ignore[reportArgumentType]
        model=MODEL,
    )


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.long)])
def test_each_part_of_a_step_takes_what_the_allocator_of_real_ranks_says(
    world_size: int, tmp_path: Path
) -> None:
    measured = run_ranks(RANKS, world_size, CASES, tmp_path)
    tensors = TensorSizes(tuple(measured["parameters"]), ())
    for (stage, dtype, accumulation), found in zip(CASES, measured["bytes"], strict=True):
        config = config_of(stage, dtype, global_batch=world_size * accumulation, micro_batch=1)
        gradients = (2 if dtype == "bf16" else 4) * sum(tensors.trainable)
        sizes = Sizes(tensors, passes_of(0, gradients))
        predicted = footprint(config, sizes, world_size, gpu=False)
        case = (stage, dtype, accumulation)
        stays = predicted.weights + predicted.optimizer + predicted.buckets
        assert found["stays"] == pytest.approx(stays, rel=0.03), case
        most_in_passes = max(
            predicted.passes, predicted.reduction
        )  # gradients are reduced as they come
        assert found["passes"] == pytest.approx(most_in_passes, rel=0.07), case
        # What was reduced may still be there when the update begins.
        assert (
            0.97 * predicted.update
            < found["update"]
            < 1.03 * max(predicted.update, predicted.reduction)
        ), case


def test_a_peak_is_that_of_the_largest_part_of_a_step() -> None:
    few = footprint(config_of(1, "fp32", global_batch=8, micro_batch=1), SIZES, 8, gpu=True)
    many = footprint(config_of(1, "fp32", global_batch=512, micro_batch=64), SIZES, 8, gpu=True)
    assert few.peak_part == "reduction"
    assert many.peak_part == "passes" and many.passes >= 64 * 150_000_000
    stays = many.weights + many.optimizer + many.buckets + many.clips + many.decoding
    assert many.total == stays + many.passes + many.allowance


def test_pipelines_and_mixed_in_clips_multiply_what_is_decoded_on_a_gpu() -> None:
    def decoding(gpu: bool = True, **data: Any) -> int:
        config = config_of(1, "bf16", global_batch=64, micro_batch=8)
        config = dataclasses.replace(config, data=DataConfig(**data))
        return footprint(config, SIZES, 1, gpu=gpu).decoding

    each = 9 * 448 * 256 * 3 + MODEL.image_size**2 * 3 * (1 + 4)
    assert decoding() == 8 * each and decoding(gpu=False) == 0
    mixing = Augmentation(mixup_prob=0.5)
    assert decoding(video_pipelines=2, augmentation=mixing) == 4 * 8 * each


def test_a_cpu_keeps_small_blocks_that_are_freed_and_a_gpu_none() -> None:
    config = config_of(2, "fp32", global_batch=8, micro_batch=8)
    small, large = 16 << 20, 64 << 20
    blocks = dataclasses.replace(passes_of(0, 0), fixed=np.array([small, 0]))
    on_cpu = footprint(config, Sizes(TENSORS, blocks), 1, gpu=False)
    on_gpu = footprint(config, Sizes(TENSORS, blocks), 1, gpu=True)
    assert on_cpu.peak_part == "reduction"
    assert small <= on_cpu.heap_slack <= 1.2 * small, "with holes between"
    assert on_gpu.heap_slack == 0
    blocks = dataclasses.replace(blocks, fixed=np.array([large, 0]))
    assert footprint(config, Sizes(TENSORS, blocks), 1, gpu=False).heap_slack == 0


def test_zero_shares_out_what_it_says() -> None:
    by_stage = [
        footprint(config_of(stage, "bf16", global_batch=64, micro_batch=8), SIZES, 8, gpu=True)
        for stage in (0, 1, 2, 3)
    ]
    assert by_stage[0].optimizer == 8 * by_stage[1].optimizer == 12 * SIZES.trainable
    assert by_stage[0].weights == by_stage[2].weights == 2 * SIZES.trainable
    assert by_stage[3].weights * 8 == by_stage[2].weights


def test_an_optimizer_that_a_cpu_rank_offloads_stays_in_its_memory() -> None:
    engine = EngineConfig(zero_stage=1, dtype="bf16", offload_optimizer=True)
    config = PretrainConfig(global_batch=8, micro_batch=8, lanes=8, engine=engine)
    cpu, card = (footprint(config, SIZES, 1, gpu=gpu).optimizer for gpu in (False, True))
    assert (cpu, card) == (12 * TENSORS.trainable[0], 0)


def test_the_bound_is_never_less_than_what_is_traced() -> None:
    """In fp32, of which the bound is that many bytes in bf16 too."""
    for config in (demo(), demo_finetune(), config_of(1, "fp32", global_batch=8, micro_batch=4)):
        config = dataclasses.replace(config, engine=EngineConfig(dtype="fp32"))
        traced = footprint(config, model_sizes(config), 1, gpu=False)
        bound = footprint(config, sizes_at_most(config), 1, gpu=False)
        assert traced.total <= bound.total
        assert traced.passes <= bound.passes


def test_a_large_model_is_counted_without_its_memory(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--model.modality-depth=4", "--model.decoder-depth=1"]
    words = ["audioset_huge", *sizes, "--workers", "8", "--gpus-per-worker=1"]
    before = resident_bytes()
    reset_peak()
    assert train.main([*words, "--dry-run"]) == 0
    assert peak_bytes(torch.device("cpu")) - before < 500e6, "its weights alone are 0.7 GB"
    assert "182.8 M trainable parameters, ZeRO 3" in capsys.readouterr().out


def test_one_h200_takes_the_batch_of_the_base_recipe_at_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["audioset_base", "--workers", "1", "--gpus-per-worker", "1", "--dry-run"]
    assert train.main(words) == 0
    shown = capsys.readouterr().out
    assert "takes 1024 samples at once, 1 times a step" in shown.replace("\n", " ")


def test_the_command_prints_what_a_rank_takes_refuses_too_much_and_starts_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["demo", "--workers", "4", "--memory-gb-per-worker", "0.1", "--dry-run"]
    with pytest.raises(ValueError, match=r"a rank takes .* GB and memory_gb_per_worker is 0\.1"):
        train.main(words)
    shown = capsys.readouterr().out
    assert "4 ranks" in shown and "at the peak" in shown and "sent in a step: gradients" in shown
    assert not list(tmp_path.iterdir())


def test_the_command_prints_what_fine_tuning_takes_without_its_clips_and_labels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["demo_finetune", "--workers", "2", "--dry-run"]
    assert train.main(words) == 0
    shown = capsys.readouterr().out
    assert re.search(r"all, at the peak \(\w+\)\t1\.\d\d", shown), shown
    assert "rank 0 to 1" in shown and "527 classes" in shown


@pytest.mark.parametrize("value", [-1.0])
def test_a_memory_below_zero_is_refused(value: Any) -> None:
    from cavmae.cluster.config import ClusterConfig

    with pytest.raises(ValueError, match=r"memory_gb_per_worker is -1"):
        ClusterConfig(memory_gb_per_worker=value)
