"""`cavmae bench ablations` times our step with one change, and every change is a real one."""

import json
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cavmae.benchmarks.step import step
from cavmae.benchmarks.step.ablations import (
    CHANGED,
    DESIGNS,
    AblationsConfig,
    main,
    possible,
)
from cavmae.benchmarks.step.training_step import SIZES, Choices, StepSetting, TrainingStep

CPU = torch.device("cpu")


def test_a_change_is_timed_beside_the_step_that_runs_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`test_memory.py` measures what a step takes."""
    taken = {"sdpa": 300, Choices().attention: 200}
    monkeypatch.setattr(step, "step_peak_bytes", lambda setting: taken[setting.choices.attention])
    words = ["--model", "tiny", "--device", "cpu", "--batch", "2", "--repeats", "2"]
    only = ["--only", "attention by sdpa", "--precision", "fp32"]
    assert main([*words, *only, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("ablations-*.json")
    found = json.loads(path.read_text())["results"]["fp32"]["attention by sdpa"]
    for way in ("as_runs_do", "changed"):
        assert len(found[way]["all_seconds"]) == 2
    changed, usual = found["changed"], found["as_runs_do"]
    pairs = zip(changed["all_seconds"], usual["all_seconds"], strict=True)
    ratios = [slow / fast for slow, fast in pairs]
    assert found["ratio"] == {
        "median": statistics.median(ratios),
        "minimum": min(ratios),
        "maximum": max(ratios),
    }
    assert found["memory_ratio"] == 1.5


@pytest.mark.parametrize("name", [name for name in possible(CPU) if name != "blocks compiled"])
def test_every_change_trains_like_the_step_that_runs_do(name: str) -> None:
    losses = []
    for choices in (Choices(), CHANGED[name]):
        trained = TrainingStep(StepSetting("cavmae", SIZES["tiny"], 4, "fp32", CPU, choices))
        losses.append([float(trained()) for _ in range(3)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_every_change_is_one() -> None:
    assert Choices() not in CHANGED.values()
    assert all(replace(SIZES["base"], **one) != SIZES["base"] for one in DESIGNS.values())


def test_another_design_is_timed_with_its_own_operations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step, "step_peak_bytes", lambda setting: 100)
    words = ["--model", "tiny", "--device", "cpu", "--batch", "2", "--repeats", "1"]
    only = ["--only", "cross-attention decoder", "--precision", "fp32"]
    assert main([*words, *only, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("ablations-*.json")
    found = json.loads(path.read_text())["results"]["fp32"]["cross-attention decoder"]
    changed, usual = (
        found[way]["tflops"] / found[way]["samples_per_second"] for way in ("changed", "as_runs_do")
    )
    assert changed < 0.9 * usual


def test_an_unknown_change_and_no_repeats_are_refused() -> None:
    with pytest.raises(ValueError, match="only names no change; use some of attention by sdpa"):
        AblationsConfig(only=("no change",))
    with pytest.raises(ValueError, match="repeats is 0"):
        AblationsConfig(repeats=0)
