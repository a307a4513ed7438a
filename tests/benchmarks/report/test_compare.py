"""`cavmae bench compare`: a regression is found, noise is none, and nonsense is refused."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cavmae.benchmarks.harness.measurements import Measurement, measurements
from cavmae.benchmarks.harness.records import read_record, timing
from cavmae.benchmarks.report.compare import changes, differences, main

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
RECORDS = sorted(RESULTS.glob("*.json"))
STEP = RESULTS / "step-20261123T112301-b643018af8.json"
DATA = RESULTS / "data-20261125T145816-75fd7db5c4.json"
OVERHEAD = RESULTS / "overhead-20261126T034746-c1234da15c.json"


def changed(path: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a record with a change made to it."""
    document = copy.deepcopy(json.loads(path.read_text()))
    change(document)
    out = tmp_path / path.name
    out.write_text(json.dumps(document))
    return out


def run(*words: object) -> int:
    return main([str(word) for word in words])


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_every_record_is_understood_and_equal_to_itself(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(path, path) == 0
    said = capsys.readouterr().out
    record = read_record(path)
    if record.suite in ("memory", "shuffle"):
        assert f"`{record.suite}` records no times and no rates: nothing to compare" in said
    else:
        assert f"{len(measurements(record))} more are the same to the last digit" in said


def test_a_regression_is_found_and_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def slower(document: dict[str, Any]) -> None:
        one = document["results"]["fp32"]["cavmae"]
        one |= timing([1.2 * seconds for seconds in one["all_seconds"]])

    after = changed(STEP, tmp_path, slower)
    assert run(STEP, after) == 1
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("regression")]
    assert lines == ["regression: fp32 cavmae 1.20x (1.13 to 1.27)"]
    assert run(after, STEP) == 0  # the other way it has become faster
    assert run(STEP, after, "--threshold", 0.25) == 0


def test_noise_is_no_regression() -> None:
    rng = np.random.default_rng(1)
    found = 0
    for _ in range(200):
        before, after = (
            Measurement("seconds", tuple(rng.normal(1.0, 0.1, 10)), False) for _ in range(2)
        )
        (change,) = changes({"step": before}, {"step": after})
        found += change.verdict(0.05) == "slower"
    assert found <= 2


def test_of_a_rate_less_is_slower() -> None:
    before = Measurement("per second", (100.0, 101.0, 99.0), False)
    after = Measurement("per second", (80.0, 81.0, 79.0), False)
    (change,) = changes({"clips": before}, {"clips": after})
    assert change.ratio == pytest.approx(1.25)
    assert change.verdict(0.05) == "slower"


def test_one_value_is_shown_and_not_judged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = next(RESULTS.glob("storage-faults-*.json"))

    def slower(document: dict[str, Any]) -> None:
        document["results"]["day_seconds"] *= 3

    assert run(path, changed(path, tmp_path, slower)) == 0
    assert "2 of 2 not judged: fewer than 3 values" in capsys.readouterr().out


def test_what_is_computed_is_judged_by_its_one_value(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = next(RESULTS.glob("scaling-*.json"))

    def slower(document: dict[str, Any]) -> None:
        document["results"]["weak"][0]["step_seconds"] *= 1.1

    assert run(path, changed(path, tmp_path, slower)) == 1
    said = capsys.readouterr().out
    assert "gpus 1 zero_stage 0 global_batch 128 step_seconds 1.10x" in said


def test_steps_of_one_start_are_one_value() -> None:
    found = measurements(read_record(OVERHEAD))
    assert {name: len(one.values) for name, one in found.items()} == {
        "deepspeed": 3,
        "ray": 3,
        "deepspeed with checkpoints": 3,
    }


def test_a_rate_that_comes_from_a_timing_is_not_counted_twice() -> None:
    found = measurements(read_record(STEP))
    assert set(found) == {"fp32 published", "fp32 cavmae", "bf16 published", "bf16 cavmae"}
    ways = measurements(read_record(DATA))
    assert len(ways["contenders published, 2 workers cpu_seconds_per_clip"].values) == 3
    assert not any("clips_per_second" in name for name in ways)


def test_what_went_in_is_not_measured() -> None:
    found = measurements(read_record(next(RESULTS.glob("scaling-*.json"))))
    assert not any("inputs" in name for name in found)


def test_another_benchmark_and_another_shape_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="benchmark: step, then tiers"):
        run(STEP, next(RESULTS.glob("tiers-*.json")))

    def larger(document: dict[str, Any]) -> None:
        document["configuration"]["batch"] = 8

    larger_batch = changed(STEP, tmp_path, larger)
    with pytest.raises(ValueError, match="batch: 4, then 8; --allow-different"):
        run(STEP, larger_batch)
    assert run(STEP, larger_batch, "--allow-different") == 0


def test_other_hardware_and_effort_are_said_and_compared(tmp_path: Path) -> None:
    def elsewhere(document: dict[str, Any]) -> None:
        document["hardware"]["cores"] = 64
        document["configuration"]["repeats"] = 7
        document["commit"] = "abc"

    other = changed(STEP, tmp_path, elsewhere)
    refused, noted = differences(read_record(STEP), read_record(other))
    assert refused == []
    assert noted == [
        "repeats: 3, then 7",
        "hardware cores: 2, then 64",
        "commit: b643018af8, then abc",
    ]


def test_records_with_other_parts_are_refused(tmp_path: Path) -> None:
    def renamed(document: dict[str, Any]) -> None:
        document["results"] = {"fp8": document["results"]["fp32"]}

    with pytest.raises(ValueError, match="no times and no rates in common"):
        run(STEP, changed(STEP, tmp_path, renamed))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is no record"),
        ('{"suite": "step", "commit": "a", "time": "t"}', "it has no schema"),
        ('{"schema": 2, "suite": "step"}', "has no time, commit, hardware, versions, conf"),
        ('{"schema": 1}', "has schema 1 and this version reads 2; measure again, or compare"),
    ],
)
def test_a_file_that_is_no_record_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "a.json", STEP)
