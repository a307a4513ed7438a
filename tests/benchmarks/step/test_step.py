"""`cavmae bench step` times both models in one run and writes a record."""

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from cavmae.benchmarks.step import step
from cavmae.benchmarks.step.step import StepConfig, main, memory_ratio

SMALL = ["--model", "tiny", "--device", "cpu"]


def results_in(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("step-*.json")
    return json.loads(path.read_text())["results"]


@pytest.fixture
def known_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the machine; `test_machine_peaks.py` measures them."""
    rates = {"bytes_per_second": 1e10, "flops_per_second": 1e12, "products": {}, "datasheet": None}
    monkeypatch.setattr(step, "measure_rates", lambda *_: rates)


@pytest.mark.usefixtures("known_rates")
def test_step_record_compares_both_models_in_each_precision(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = [*SMALL, "--batch", "2", "--repeats", "3", "--no-memory"]
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
            assert result[name]["mfu"] * record["results"]["machine"][precision][
                "flops_per_second"
            ] == pytest.approx(1e12 * result[name]["tflops"])
        ratios = [
            published / ours
            for published, ours in zip(
                result["published"]["all_seconds"], result["cavmae"]["all_seconds"], strict=True
            )
        ]
        assert result["speedup"] == {
            "median": statistics.median(ratios),
            "minimum": min(ratios),
            "maximum": max(ratios),
        }
        # Equal weights and inputs are not needed for a time, but both must really train.
        losses = [result[name]["last_loss"] for name in ("cavmae", "published")]
        assert losses[0] == pytest.approx(losses[1], rel=0.5)
    printed = capsys.readouterr()
    assert "fp32 batch 2 ..." in printed.err
    assert "fp32, cavmae" in printed.out and "as fast as the published step" in printed.out


def test_less_memory_than_the_published_step_is_a_ratio_below_1() -> None:
    half = {"cavmae": {"peak_memory_bytes": 100}, "published": {"peak_memory_bytes": 200}}
    assert memory_ratio(half) == {"memory": {"ratio": 0.5, "bar": 0.7, "met": True}}


@pytest.mark.usefixtures("known_rates")
def test_memory_of_ours_is_compared_with_the_published_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`test_memory.py` measures what a step takes."""
    taken = {"cavmae": 60, "published": 100}
    monkeypatch.setattr(step, "step_peak_bytes", lambda setting: taken[setting.name])
    words = ["--batch", "2", "--repeats", "1", "--precision", "fp32", "--out", str(tmp_path)]
    assert main([*SMALL, *words]) == 0
    assert results_in(tmp_path)["fp32"]["memory"] == {"ratio": 0.6, "bar": 0.7, "met": True}


@pytest.mark.usefixtures("known_rates")
def test_batch_sizes_are_swept_in_each_precision(tmp_path: Path) -> None:
    words = ["--batch", "1", "2", "--repeats", "1", "--only", "cavmae", "--no-memory"]
    assert main([*SMALL, *words, "--out", str(tmp_path)]) == 0
    results = results_in(tmp_path)
    del results["machine"]
    assert {(one["precision"], one["batch"]) for one in results.values()} == {
        (precision, batch) for precision in ("fp32", "bf16") for batch in (1, 2)
    }
    for one in results.values():
        assert "published" not in one and "speedup" not in one
        assert one["cavmae"]["samples_per_second"] == pytest.approx(
            one["batch"] / one["cavmae"]["median_seconds"]
        )


def test_no_repeats_are_refused() -> None:
    with pytest.raises(ValueError, match="repeats is 0"):
        StepConfig(repeats=0)
