"""`cavmae bench step` times both models in one run and writes a record."""

import json
from pathlib import Path

import pytest

from cavmae.benchmarks.step import main


def test_step_record_compares_both_models_in_each_precision(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--model", "tiny", "--batch", "2", "--repeats", "3", "--device", "cpu"]
    assert main([*small, "--decoder-depth", "1", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("step-*.json")
    record = json.loads(path.read_text())
    assert record["configuration"]["sizes"]["decoder_depth"] == 1
    for precision in ("fp32", "bf16"):
        result = record["results"][precision]
        for name in ("cavmae", "published"):
            assert len(result[name]["all_seconds"]) == 3
            assert result[name]["samples_per_second"] > 0
            assert result[name]["peak_memory_bytes"] is None
        speedup = result["speedup"]
        assert speedup["minimum"] <= speedup["median"] <= speedup["maximum"]
        # Equal weights and inputs are not needed for a time, but both must really train.
        losses = [result[name]["last_loss"] for name in ("cavmae", "published")]
        assert losses[0] == pytest.approx(losses[1], rel=0.5)
    assert "fp32 batch 2" in capsys.readouterr().out


def test_no_repeats_are_refused() -> None:
    with pytest.raises(ValueError, match="--repeats is 0"):
        main(["--repeats", "0"])
