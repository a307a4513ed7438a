"""`cavmae bench memory`: what real processes took stands beside what was said."""

from pathlib import Path
from typing import Any

import pytest

from cavmae.benchmarks import memory
from cavmae.benchmarks.records import read_record


@pytest.mark.slow
def test_a_record_has_what_was_said_and_what_each_step_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "CASES", (("demo", 2, "fp32", 1, 16, 2),))
    assert memory.main(["--recipes", "demo", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("memory-*.json")
    (row,) = read_record(path).results["rows"]
    assert row["case"] == "demo, 2 ranks, fp32, ZeRO 1, batch 16 x 2 accumulated"
    assert len(row["measured_bytes"]) == 5
    # Beside a model of 7 MB the process's own doings are not small.
    assert 0.3 < row["ratio"] < 1.5
    assert row["said_tensor_bytes"] <= row["said_bytes"]


def test_cases_are_runs_of_their_recipes() -> None:
    case: Any = ("audioset_base", 2, "bf16", 3, 4, 2)
    config = memory.config_of(case)
    assert (config.global_batch, config.micro_batch, config.lanes) == (16, 4, 16)
    assert (config.engine.zero_stage, config.engine.dtype) == (3, "bf16")
