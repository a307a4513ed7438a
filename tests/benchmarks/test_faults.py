"""`cavmae bench faults` does what it says to real runs, and tells when one does not end well."""

import json
from pathlib import Path

import pytest

from cavmae.benchmarks import faults


@pytest.mark.slow
def test_a_row_is_measured_and_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "the newest checkpoint is cut short"
    words = ["--steps", "40", "--only", name, "--work-dir", str(tmp_path / "work")]
    assert faults.main([*words, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("faults-*.json")
    row = json.loads(path.read_text())["results"][name]
    assert row["largest_difference"] == 0 and 0 < row["steps_lost"] <= row["steps_allowed"]
    assert 0 < row["noticed_seconds"] < row["again_seconds"]
    assert "is not whole" in row["said"]
    assert "bit for bit" in capsys.readouterr().out


def test_a_run_that_ends_otherwise_is_no_success() -> None:
    row = faults.Row(1.0, 2.0, 5, 10, 0.0, 0.0, "")
    assert row.as_it_should_be
    assert not faults.Row(1.0, 2.0, 11, 10, 0.0, 0.0, "").as_it_should_be
    assert not faults.Row(1.0, 2.0, 5, 10, 1e-6, 0.0, "").as_it_should_be


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="--steps is 5; use 40 or more"):
        faults.main(["--steps", "5"])
