"""`cavmae bench train` times the real loop and writes a record."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import MODEL

from cavmae.benchmarks.step.training_step import SIZES
from cavmae.benchmarks.training.summary import ORDER, Source, summarize
from cavmae.benchmarks.training.train import TrainBenchConfig, main
from cavmae.trainer.config.configs import EngineConfig, PretrainConfig
from cavmae.trainer.cost_model.flops import training_flops

SMALL = ["--model", "tiny", "--batch", "2", "--clips", "8", "--steps", "3", "--part-steps", "2"]
RATES: dict[str, Any] = {
    "flops_per_second": 1e12,
    "bytes_per_second": 1e10,
    "products": {},
    "datasheet": {"fp32": 4e12},
}
UNREAD = {"joules": None, "watts": None, "source": "nothing"}


def found(steps: list[dict[str, Any]], part_steps: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "steps": steps,
        "part_steps": part_steps,
        "energy": {"joules": 80.0, "watts": 8.0, "source": "a meter"},
        "peak_memory_bytes": 10**9,
    }


def step(data: float, loop: float) -> dict[str, Any]:
    """Of 10 s, as the loop sees it."""
    return {
        "data wait": {"step": data},
        "rest of the model": {"forward": 3.0, "backward": 6.0 - data - loop},
        "optimizer": {"step": 1.0},
        "loop": {"step": loop},
    }


def summarized(
    found: dict[Source, Any],
    *,
    ranks: int = 1,
    judged: bool = True,
    sharded: bool = True,
    device: str = "cpu",
) -> dict[str, Any]:
    """The results of a run with 4 clips of each rank in a step."""
    engine = EngineConfig(zero_stage=1 if sharded else 0, dtype="fp32")
    run = PretrainConfig(model=MODEL, global_batch=4 * ranks, micro_batch=4, engine=engine)
    return summarize(found, run, torch.device(device), RATES, judged=judged)


def test_rates_are_of_all_ranks_and_mfu_of_the_whole_machine() -> None:
    one, two = (
        summarized({"synthetic": found([step(0.0, 0.1)] * 3, [])}, ranks=ranks) for ranks in (1, 2)
    )
    assert one["synthetic"]["samples_per_second"] == pytest.approx(0.4)
    assert one["synthetic"]["mfu"] == pytest.approx(0.4 * training_flops(MODEL) / 1e12)
    assert one["synthetic"]["mfu_of_datasheet"] == pytest.approx(one["synthetic"]["mfu"] / 4)
    for name in ("samples_per_second", "mfu", "tflops"):
        assert two["synthetic"][name] == pytest.approx(2 * one["synthetic"][name])


def test_the_loop_is_all_but_model_loss_and_update() -> None:
    for loop, data, met in ((0.1, 0.1, True), (0.2, 0.2, False)):
        results = summarized({"synthetic": found([step(data, loop)] * 3, [])})
        (bar,) = results["bars"].values()
        assert bar["value"] == pytest.approx((loop + data) / 10)
        assert bar["met"] is met
    small = summarized({"synthetic": found([step(1, 1)], [])}, judged=False)
    assert next(iter(small["bars"].values()))["met"] is None


def test_shards_are_compared_with_synthetic_batches_and_judged_on_a_gpu_alone() -> None:
    slower = [{name: {kind: 2 * s for kind, s in one.items()} for name, one in step(0, 0).items()}]
    both: dict[Source, Any] = {"synthetic": found([step(0, 0)], []), "shards": found(slower, [])}
    for device, met in (("cpu", None), ("cuda", False)):
        bar = summarized(both, device=device)["bars"]["samples/s from shards over synthetic"]
        assert bar["value"] == pytest.approx(0.5)
        assert bar["met"] is met


def test_energy_is_of_each_sample() -> None:
    results = summarized({"synthetic": found([step(0, 0)] * 5, [])})
    assert results["synthetic"]["energy"]["joules_per_sample"] == 80 / (5 * 4)


def test_a_part_stands_beside_its_floor_and_one_without_work_has_none() -> None:
    timed = [{"decoder": {"forward": one, "backward": 2 * one}, "loop": {"step": 0.5}}
             for one in (1.0, 2.0, 3.0)]  # fmt: skip
    parts = summarized({"synthetic": found([step(0, 0)], timed)})
    decoder = parts["synthetic"]["parts"]["decoder"]
    assert decoder["forward"]["median_seconds"] == 2
    assert decoder["backward"]["all_seconds"] == [2, 4, 6]
    for one in decoder.values():
        assert one["floor_seconds"] == max(one["flops"] / 1e12, one["bytes"] / 1e10)
    assert "floor_seconds" not in parts["synthetic"]["parts"]["loop"]["step"]


def test_without_zero_each_rank_updates_all_weights() -> None:
    timed = [{"optimizer": {"step": 1.0}}]
    alone, replicated, shared = (
        summarized({"synthetic": found([step(0, 0)], timed)}, ranks=ranks, sharded=sharded)
        ["synthetic"]["parts"]["optimizer"]["step"]
        for ranks, sharded in ((1, True), (2, False), (2, True))
    )  # fmt: skip
    assert replicated["bytes"] == alone["bytes"]
    assert shared["bytes"] == alone["bytes"] / 2


@pytest.mark.long
@pytest.mark.slow
def test_a_record_of_two_ranks_has_both_sources_and_all_parts(tmp_path: Path) -> None:
    assert main([*SMALL, "--ranks", "2", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("train-*.json")
    record = json.loads(path.read_text())
    results = record["results"]
    for source in ("synthetic", "shards"):
        one = results[source]
        assert len(one["step"]["all_seconds"]) == 3
        assert one["samples_per_second"] > 0
        assert sum(one["shares"].values()) == pytest.approx(1)
        assert list(one["parts"]) == list(ORDER)
        for part in ("embed", "encoders", "joint", "decoder", "losses"):
            assert one["parts"][part].keys() == {"forward", "backward"}
        assert all(len(kind["all_seconds"]) == 2
                   for part in one["parts"].values() for kind in part.values())  # fmt: skip
    assert record["configuration"]["sizes"]["width"] == SIZES["tiny"].width
    assert len(results["bars"]) == 2


@pytest.mark.slow
def test_a_run_that_cannot_start_is_told_with_what_it_said(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="fewer than the 16 lanes"):
        main([*SMALL, "--batch", "16", "--only", "synthetic", "--out", str(tmp_path)])


@pytest.mark.parametrize("name", ["batch", "ranks", "steps", "warm_up"])
def test_numbers_that_make_no_sense_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0; use 1 or more"):
        TrainBenchConfig(**{name: 0})  # pyright: ignore[reportArgumentType]
