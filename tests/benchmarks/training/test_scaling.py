"""The series of the scaling benchmark, and its record."""

import json
import re
from pathlib import Path

import pytest

from cavmae.benchmarks.training import scaling
from cavmae.benchmarks.training.scaling import INPUTS, Row, rows
from cavmae.trainer.cost_model.comm_volume import TensorSizes

TENSORS = TensorSizes(trainable=(768 * 3072,) * 80 + (768,) * 300, frozen=(768,) * 240)
VALUES = {name: value for name, (value, _) in INPUTS.items()}


def of(found: list[Row], gpus: int, stage: int = 1, exchange: str = "gather") -> Row:
    (row,) = (
        one for one in found if (one.gpus, one.zero_stage, one.exchange) == (gpus, stage, exchange)
    )
    return row


@pytest.fixture(scope="module")
def weak() -> list[Row]:
    return rows(VALUES, TENSORS, clips_per_gpu=128)


def test_every_stage_and_exchange_goes_from_1_to_4096_gpus(weak: list[Row]) -> None:
    assert len(weak) == 4 * 2 * 13
    assert {row.gpus for row in weak} == {2**power for power in range(13)}
    assert all(row.global_batch == 128 * row.gpus for row in weak)


def test_the_parts_of_a_step_add_up(weak: list[Row]) -> None:
    for row in weak:
        assert sum(row.seconds.values()) == pytest.approx(row.step_seconds)
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
    found = rows(VALUES, TENSORS, clips_per_gpu=128, global_batch=1024)
    assert max(row.gpus for row in found) == 1024
    assert {row.global_batch for row in found} == {1024}


def test_a_loader_that_is_too_slow_sets_the_pace() -> None:
    found = rows(VALUES | {"cores_per_gpu": 1}, TENSORS, clips_per_gpu=128)
    assert of(found, 8).samples_per_second == pytest.approx(8 / VALUES["loader_core_seconds"])


def test_the_record_names_the_source_of_every_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--out", str(tmp_path), "--share-of-matrix-speed", "0.5"]
    assert scaling.main(words) == 0
    (path,) = tmp_path.glob("scaling-*.json")
    assert path.with_suffix(".png").exists()
    results = json.loads(path.read_text())["results"]
    assert set(results["inputs"]) == set(INPUTS)
    assert results["inputs"]["share_of_matrix_speed"] == {"value": 0.5, "source": "given"}
    assert "ASSUMED" in results["inputs"]["share_of_links"]["source"]
    assert len(results["weak"]) == 104
    assert "share_of_links 0.8: ASSUMED" in capsys.readouterr().out


def test_measured_inputs_are_those_of_the_records_that_they_name() -> None:
    folder = Path(scaling.__file__).parents[1] / "results"
    named = {name: re.findall(r"\S+\.json", source) for name, (_, source) in INPUTS.items()}
    loader = json.loads((folder / named["loader_core_seconds"][0]).read_text())["results"]
    measured = loader["contenders"]["cavmae frames, 2 workers"]["cpu_seconds_per_clip"]
    assert VALUES["loader_core_seconds"] == pytest.approx(measured)
    faults = json.loads((folder / named["restart_seconds"][0]).read_text())["results"]
    again = faults["a rank is killed (SIGKILL)"]["again_seconds"]
    assert VALUES["restart_seconds"] == pytest.approx(again, rel=0.01)


def test_an_input_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"copy_gbytes is 0.0; use a number above 0"):
        scaling.main(["--copy-gbytes", "0"])
