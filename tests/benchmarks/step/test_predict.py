"""Predictions of a step: their record, and how far they are from what was measured."""

import json
from pathlib import Path
from typing import Any

import pytest

from cavmae.benchmarks.harness.records import read_record
from cavmae.benchmarks.step import predict, step
from cavmae.cli import main

RESULTS = Path(predict.__file__).parents[1] / "results"


def newest(folder: Path, suite: str) -> dict[str, Any]:
    (path,) = folder.glob(f"{suite}-*.json")
    return json.loads(path.read_text())["results"]


def test_a_prediction_is_a_range_by_passes_parts_and_choices(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one_choice = {"micro-batch 128"}  # each is counted, which takes seconds
    choices = predict._choices

    def some(*arguments: Any) -> Any:
        found = choices(*arguments)
        assert {"recompute selective", *one_choice} <= set(found)
        return {name: found[name] for name in one_choice}

    monkeypatch.setattr(predict, "_choices", some)
    words = ["--recipe", "demo", "--gpu", "A100"]
    assert main(["bench", "predict", *words, "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "Predicted for an NVIDIA A100-SXM4-80GB, not measured" in shown
    found = newest(tmp_path, "predict")
    assert list(found["passes"]) == ["embedding", "forward", "backward", "gradients", "update"]
    assert found["step"]["low_seconds"] < found["step"]["high_seconds"]
    assert {"encoders, forward", "decoder, backward", "losses, backward"} <= set(found["parts"])
    assert found["passes"]["gradients"]["bound_by"] == "host"  # small and many
    assert found["choices"]["micro-batch 128"]["ratio"] < 1  # nothing is embedded twice


def test_a_prediction_is_compared_with_a_measured_step_of_any_machine(tmp_path: Path) -> None:
    words = ["--model", "tiny", "--only", "cavmae", "--repeats", "2", "--no-memory"]
    assert step.main([*words, "--precision", "fp32", "--out", str(tmp_path)]) == 0
    (measured,) = tmp_path.glob("step-*.json")
    assert main(["bench", "predict", "--against", str(measured), "--out", str(tmp_path)]) == 0
    (row,) = newest(tmp_path, "predict")["against"]
    assert row["ceilings"] == "measured beside the step" and row["batch"] == 8
    parts = json.loads(measured.read_text())["results"]["fp32"]["cavmae"]["parts"]
    assert set(row["parts"]) == set(parts) == {"forward", "backward", "update"}
    for name, one in row["parts"].items():
        assert one["measured_seconds"] == parts[name]["median_seconds"]
        middle = (one["low_seconds"] * one["high_seconds"]) ** 0.5
        assert one["ratio"] == pytest.approx(middle / one["measured_seconds"])


def test_a_record_without_measured_parts_is_refused() -> None:
    old = read_record(RESULTS / "step-20261126T140425-2c2693988e.json")
    with pytest.raises(ValueError, match="has no step of our model by parts with ceilings"):
        predict.compare(old)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu", "H900"], "gpu is 'H900', whose speed is not known here"),
        (["--recipe", "nothing"], "recipe is 'nothing'; use one of demo"),
    ],
)
def test_what_is_not_known_is_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        predict.main(words)
    assert message in " ".join(capsys.readouterr().err.split())
