"""The series of the scaling benchmark, its goodput model, and its record."""

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest

from cavmae.benchmarks.training import scaling
from cavmae.benchmarks.training.failure_simulation import Run, simulated_month
from cavmae.benchmarks.training.scaling import (
    INPUTS,
    LLAMA_3_GPU_SECONDS_PER_FAILURE,
    Failures,
    Row,
    best_interval,
    goodput,
    months,
    rows,
)
from cavmae.trainer.cost_model.comm_volume import TensorSizes
from cavmae.trainer.cost_model.gpus import gpu_ceilings, known_gpu

DAY = 86_400.0
TENSORS = TensorSizes(trainable=(768 * 3072,) * 80 + (768,) * 300, frozen=(768,) * 240)
GPU = gpu_ceilings(known_gpu("H200"), "bf16")
VALUES = {name: value for name, (value, _) in INPUTS.items()} | {"cores_per_gpu": 64}


def of(found: list[Row], gpus: int, stage: int = 1) -> Row:
    (row,) = (one for one in found if (one.gpus, one.zero_stage) == (gpus, stage))
    return row


@pytest.fixture(scope="module")
def weak() -> list[Row]:
    return rows(VALUES, GPU, TENSORS, clips_per_gpu=128)


def test_every_stage_goes_from_1_to_4096_gpus(weak: list[Row]) -> None:
    assert len(weak) == 4 * 13
    assert {row.gpus for row in weak} == {2**power for power in range(13)}
    assert all(row.global_batch == 128 * row.gpus for row in weak)


def test_the_parts_of_a_step_add_up(weak: list[Row]) -> None:
    for row in weak:
        assert sum(row.seconds.values()) == pytest.approx(row.step_seconds)
        assert row.low_step_seconds < row.step_seconds < row.high_step_seconds
        assert row.samples_per_second * row.step_seconds == pytest.approx(row.global_batch)


def test_efficiency_begins_at_one_and_falls(weak: list[Row]) -> None:
    for stage in (0, 1, 2, 3):
        line = [of(weak, 2**power, stage).efficiency for power in range(13)]
        assert line[0] == 1.0 and line == sorted(line, reverse=True)


def test_more_gpus_fail_more_often_and_want_checkpoints_sooner(weak: list[Row]) -> None:
    few, many = of(weak, 8), of(weak, 4096)
    assert few.hours_between_failures == pytest.approx(512 * many.hours_between_failures)
    assert few.best_interval_seconds > many.best_interval_seconds
    assert few.goodput > many.goodput > 0.9


def test_a_batch_is_shared_out_only_to_gpus_that_divide_it() -> None:
    found = rows(VALUES, GPU, TENSORS, clips_per_gpu=128, global_batch=1024)
    assert max(row.gpus for row in found) == 1024
    assert {row.global_batch for row in found} == {1024}


def test_a_loader_that_is_too_slow_sets_the_pace() -> None:
    found = rows(VALUES | {"cores_per_gpu": 0.5}, GPU, TENSORS, clips_per_gpu=128)
    assert of(found, 8).samples_per_second == pytest.approx(4 / VALUES["loader_core_seconds"])


def test_the_record_names_the_source_of_every_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--out", str(tmp_path), "--share-of-links", "0.5", "--gpu", "H100"]
    assert scaling.main(words) == 0
    (path,) = tmp_path.glob("scaling-*.json")
    assert path.with_suffix(".png").exists()
    results = json.loads(path.read_text())["results"]
    assert set(results["inputs"]) == set(INPUTS)
    assert results["inputs"]["share_of_links"] == {"value": 0.5, "source": "given"}
    assert "ASSUMED" in results["inputs"]["copy_gbytes"]["source"]
    assert results["ceilings"]["name"] == "NVIDIA H100 80GB HBM3"
    assert len(results["weak"]) == 52
    assert re.search(r"copy_gbytes\t10\tASSUMED", capsys.readouterr().out)


def test_measured_inputs_are_those_of_the_records_that_they_name() -> None:
    folder = Path(scaling.__file__).parents[1] / "results"
    named = {name: re.findall(r"\S+\.json", source) for name, (_, source) in INPUTS.items()}
    loader = json.loads((folder / named["loader_core_seconds"][0]).read_text())["results"]
    measured = loader["contenders"]["cavmae frames, 2 workers"]["cpu_seconds_per_clip"]
    assert VALUES["loader_core_seconds"] == pytest.approx(measured)
    faults = json.loads((folder / named["restart_seconds"][0]).read_text())["results"]
    again = faults["a rank is killed (SIGKILL)"]["again_seconds"]
    assert VALUES["restart_seconds"] == pytest.approx(again, rel=0.01)


def test_an_input_of_nothing_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        scaling.main(["--copy-gbytes", "0"])
    assert "copy_gbytes is 0.0; use a value above 0" in capsys.readouterr().err


def test_without_failures_only_checkpoints_cost() -> None:
    assert goodput(Failures(math.inf, 300.0, 0.0), 600.0) == 1.0
    assert goodput(Failures(math.inf, 300.0, 6.0), 594.0) == 0.99
    assert math.isinf(best_interval(Failures(math.inf, 300.0, 6.0)))


def test_rare_failures_cost_their_recovery_and_half_an_interval() -> None:
    found = goodput(Failures(100 * DAY, 300.0, 0.0), 600.0)
    assert 1 - found == pytest.approx((300 + 600 / 2) / (100 * DAY), rel=0.01)


def test_a_run_that_fails_all_the_time_gets_nowhere() -> None:
    assert goodput(Failures(60.0, 300.0, 6.0), 600.0) < 1e-3
    assert goodput(Failures(1e-3, 300.0, 6.0), 600.0) == 0.0


@pytest.mark.parametrize("between", [600.0, 3600.0, DAY])
@pytest.mark.parametrize("cost", [0.2, 5.0, 60.0])
def test_no_interval_beats_the_best_one(between: float, cost: float) -> None:
    failures = Failures(between, 120.0, cost)
    best = goodput(failures, best_interval(failures))
    others = [goodput(failures, best_interval(failures) * factor) for factor in (0.5, 0.8, 1.25, 2)]
    assert all(best > other for other in others)


SIMULATED = Run(
    between_failures=3600.0, hang_share=0.0, hang=0.0, recovery=120.0, interval=900.0, stall=10.0,
    write=0.0,
)  # fmt: skip


def test_a_simulated_month_has_the_goodput_of_the_formula() -> None:
    month = simulated_month(SIMULATED, gpus=8, seconds=30 * DAY)
    assert month.goodput == pytest.approx(goodput(Failures(3600.0, 120.0, 10.0), 900.0), rel=0.01)
    assert month.failures == pytest.approx(720, rel=0.02)
    assert month.worst_goodput < month.goodput


def test_hangs_and_slow_writes_cost_what_they_take() -> None:
    """Where failures are rare: the watchdog's limit, and the steps since the last commit."""
    rare = dataclasses.replace(SIMULATED, between_failures=2 * DAY, stall=0.0)
    plain = simulated_month(rare, gpus=8, seconds=3000 * DAY)
    assert plain.seconds_per_failure == pytest.approx(120 + 450, rel=0.02)
    hanging = dataclasses.replace(rare, hang_share=0.5, hang=600.0)
    found = simulated_month(hanging, gpus=8, seconds=3000 * DAY)
    assert found.seconds_per_failure == pytest.approx(120 + 450 + 300, rel=0.02)
    slow = simulated_month(dataclasses.replace(rare, write=200.0), gpus=8, seconds=3000 * DAY)
    assert slow.seconds_per_failure == pytest.approx(120 + 450 + 200, rel=0.02)


def test_a_month_at_published_failure_rates_keeps_what_was_promised() -> None:
    """419 failures in 54 days on 16,384 GPUs, with every loss that the inputs name."""
    few, many = months(VALUES, GPU, TENSORS, clips_per_gpu=128)
    assert (few.gpus, many.gpus) == (1_000, 16_384)
    assert many.failures == pytest.approx(419 / 54 * 30, rel=0.03)
    assert few.goodput >= 0.99 and many.goodput >= 0.94


def test_llama_3_failed_every_three_hours() -> None:
    assert pytest.approx(3.1, rel=0.01) == LLAMA_3_GPU_SECONDS_PER_FAILURE / 16_384 / 3600
