"""A step's computed time: its limits, and what must make it longer or shorter."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from cavmae.trainer.config.configs import EngineConfig, LossConfig, PretrainConfig
from cavmae.trainer.config.recipes import demo
from cavmae.trainer.cost_model.comm_volume import (
    PREFETCH_ELEMENTS,
    Collective,
    TensorSizes,
    collectives,
)
from cavmae.trainer.cost_model.step_time import (
    CPU_CORE_FLOPS_PER_SECOND,
    Device,
    Links,
    StepTime,
    collective_seconds,
    sample_flops,
    step_time,
)

TENSORS = TensorSizes(trainable=(768 * 3072,) * 80 + (768,) * 300, frozen=(768,) * 240)
RESULTS = Path(__file__).resolve().parents[3] / "benchmarks" / "results"
DEVICE = Device(compute_seconds=0.1, flops_per_second=300e12)


def run(world_size: int, stage: int = 1, **loss: Any) -> PretrainConfig:
    """128 clips a rank, at once."""
    return PretrainConfig(
        global_batch=128 * world_size,
        micro_batch=128,
        lanes=max(64, world_size),
        loss=LossConfig(**loss),
        engine=EngineConfig(zero_stage=stage, dtype="bf16"),  # pyright: ignore[reportArgumentType]
    )


def time_of(config: PretrainConfig, world_size: int, links: Links | None = None) -> StepTime:
    return step_time(config, TENSORS, world_size, DEVICE, links or Links())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_one_gpu_waits_for_nobody(stage: int) -> None:
    config = run(1, stage, contrastive_weight=0.0)
    found = time_of(config, 1)
    assert found.total == found.compute == DEVICE.compute_seconds


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_of_equal_shares_takes_longer_on_more_gpus(stage: int) -> None:
    totals = [time_of(run(2**power, stage), 2**power).total for power in range(11)]
    assert totals == sorted(totals) and len(set(totals)) == len(totals)


@pytest.mark.parametrize("kind", ["all_reduce", "reduce_scatter", "all_gather"])
def test_a_collective_takes_longer_for_more_bytes_calls_and_slower_links(kind: Any) -> None:
    def seconds(payload_bytes: int = 10**9, calls: int = 1, **links: Any) -> float:
        one = Collective("gradients", kind, payload_bytes, calls)
        return collective_seconds(one, 64, Links(**links))

    assert seconds(2 * 10**9) > seconds()
    assert seconds(calls=100) > seconds()
    assert seconds(between_nodes=10e9) > seconds()
    assert seconds(share=0.4) > seconds()


def test_large_reductions_reach_the_speed_of_the_links() -> None:
    one = Collective("gradients", "all_reduce", 10**11, 1)
    within = collective_seconds(one, 8, Links(share=1.0))
    assert within == pytest.approx(2 * 7 / 8 * 1e11 / 450e9, rel=0.01)
    cards = collective_seconds(one, 16, Links(share=1.0))
    assert cards == pytest.approx(2 * 15 / 16 * 1e11 / (8 * 50e9), rel=0.01)


def test_small_reductions_go_up_and_down_a_tree() -> None:
    small = Collective("scalars", "all_reduce", 8, 1)
    doubled = [collective_seconds(small, ranks, Links()) for ranks in (1024, 2048, 4096)]
    assert doubled[2] - doubled[1] == pytest.approx(doubled[1] - doubled[0], rel=0.01)
    assert doubled[2] < 200e-6


def test_a_slow_loader_is_waited_for_and_a_fast_one_is_not() -> None:
    config, slow = run(8), Device(0.1, 300e12, clips_per_second=100.0)
    assert step_time(config, TENSORS, 8, slow, Links()).total == pytest.approx(1.28)
    assert time_of(config, 8).data == 0


def test_the_contrastive_loss_is_computed_for_the_whole_group() -> None:
    few, many = (time_of(run(ranks), ranks) for ranks in (8, 16))
    assert many.contrast == pytest.approx(2 * few.contrast) and few.contrast > 0


def seconds_of(config: PretrainConfig, world_size: int, purpose: str, links: Links) -> list[float]:
    """Of each of the step's collectives for a purpose, if nothing else happened meanwhile."""
    return [
        collective_seconds(one, world_size, links)
        for one in collectives(config, TENSORS, world_size)
        if one.purpose == purpose
    ]


def test_gathered_embeddings_are_waited_for() -> None:
    slow = Links(between_nodes=1e9)
    config = run(64)
    (gathered,) = seconds_of(config, 64, "embeddings", slow)
    assert time_of(config, 64, slow).embeddings == gathered


def test_stage_3_waits_for_its_first_weights_and_for_those_after_the_update() -> None:
    config = run(64, 3)
    ahead, after = seconds_of(config, 64, "weights", Links())
    slow, fast = Device(1e3, 1e9), Device(0.0, math.inf)
    fetches = math.ceil(768 * 3072 * 80 / PREFETCH_ELEMENTS)
    hidden = step_time(config, TENSORS, 64, slow, Links()).weights
    assert hidden == pytest.approx(ahead / fetches + after)
    assert step_time(config, TENSORS, 64, fast, Links()).weights == pytest.approx(ahead + after)


@pytest.mark.parametrize(
    ("dtype", "record"),
    [("fp32", "demo-2026-11-25-b10141e051.json"), ("bf16", "demo-2026-11-23-8152ce394c.json")],
)
def test_two_cpu_ranks_take_the_time_that_the_demo_took(dtype: Any, record: str) -> None:
    results = json.loads((RESULTS / record).read_text())["results"]
    recipe = demo()
    config = dataclasses.replace(
        recipe, lanes=64, engine=dataclasses.replace(recipe.engine, dtype=dtype)
    )
    seconds = 64 * sample_flops(config, 2) / CPU_CORE_FLOPS_PER_SECOND[dtype]
    assert 128 / seconds == pytest.approx(results["samples_per_second"], rel=0.03)
