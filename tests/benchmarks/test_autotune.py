"""`cavmae bench autotune`: real trials, and fields that a run takes."""

import json
from pathlib import Path

import pytest
from tiny_run import tiny_run

from cavmae.benchmarks import autotune
from cavmae.benchmarks.autotune_trial import (
    expected_rate,
    run_trial,
    short_run,
    with_fields,
    words,
)
from cavmae.benchmarks.records import read_record
from cavmae.trainer.config import EngineConfig, LossConfig, PretrainConfig
from cavmae.trainer.run_folder import load_run_config, save_config

STEP = {"model": {"forward": 1.0, "backward": 2.0}, "optimizer": {"optimizer": 0.5}}


def test_fields_change_a_run_and_are_words_of_its_command_line() -> None:
    fields = {"micro_batch": 3, "engine.zero_stage": 0, "engine.compile": False, "data.train": "x"}
    changed = with_fields(PretrainConfig(global_batch=12), fields)
    assert (changed.micro_batch, changed.engine.zero_stage, changed.data.train) == (3, 0, "x")
    assert changed.global_batch == 12
    assert words(fields) == (
        "--micro-batch 3 --engine.zero-stage 0 --engine.no-compile --data.train x"
    )


def test_fields_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ValueError, match=r"engine\.compile is on and engine\.zero_stage is 3"):
        with_fields(PretrainConfig(), {"engine.compile": True, "engine.zero_stage": 3})


def test_a_trial_has_two_micro_batches_a_step_where_the_run_has_more(tmp_path: Path) -> None:
    config = PretrainConfig(global_batch=96, micro_batch=4, loss=LossConfig(contrastive_group=12))
    trial = short_run(config, 2, tmp_path)
    assert (trial.global_batch, trial.micro_batch) == (16, 4)
    assert trial.loss.contrastive_group == 0, "groups of 12 do not fit in 16 clips"
    assert short_run(PretrainConfig(global_batch=8, micro_batch=4), 2, tmp_path).global_batch == 8


@pytest.mark.parametrize(
    ("times", "expected"),
    [(1, 4 / 3.5), (2, 8 / 3.5), (4, 16 / 6.5)],  # 3 s of two micro-batches at most, and an update
)
def test_micro_batches_repeat_and_the_update_does_not(times: int, expected: float) -> None:
    config = PretrainConfig(global_batch=4 * times, micro_batch=4)
    assert expected_rate(config, 1, [STEP, STEP]) == pytest.approx(expected)


@pytest.mark.slow
def test_a_trial_that_fails_is_an_answer(packed_synthetic: Path, tmp_path: Path) -> None:
    config = tiny_run(packed_synthetic, tmp_path / "run")
    found = {
        name: run_trial(
            config,
            fields,
            tmp_path / name,
            ranks=1,
            gpus=False,
            real_data=real_data,
            within_seconds=200,
        )
        for name, fields, real_data in (
            ("good", {"micro_batch": 8}, False),
            ("loader", {"data.reader_workers": 2}, True),
            ("bad", {"initial_weights": str(tmp_path / "absent.pth")}, False),
        )
    }
    for name in ("good", "loader"):
        assert found[name].problem == ""
        assert found[name].samples_per_second > 0 and len(found[name].step_seconds) == 4
    assert "absent.pth" in found["bad"].problem and found["bad"].samples_per_second == 0


@pytest.mark.slow
def test_what_it_writes_is_a_run_that_computes_the_same(
    packed_synthetic: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tiny_run(packed_synthetic, tmp_path / "run", engine=EngineConfig(dtype="fp32"))
    save_config(before, tmp_path / "config.json")
    tuned = tmp_path / "tuned" / "run.json"
    flags = ["--budget", "30s", "--save", str(tuned), "--out", str(tmp_path / "results")]
    assert autotune.main([str(tmp_path / "config.json"), *flags]) == 0
    shown = capsys.readouterr().out
    assert "fields to use: --micro-batch" in shown
    assert "left out: " in shown, "not all can be tried in that time"
    (record,) = (tmp_path / "results").glob("autotune-*.json")
    results = read_record(record).results
    rates = [trial["samples_per_second"] for trial in results["trials"]]
    fields = json.loads(record.read_text())["results"]["fields"]
    best = next(trial for trial in results["trials"] if trial["fields"] == fields)
    assert max(rates) <= autotune.FASTER * best["samples_per_second"]
    after = load_run_config(tuned)
    assert all(getattr(after, name) == getattr(before, name) for name in before.FIXED)
    assert after.micro_batch == fields["micro_batch"]


def test_ranks_that_cannot_share_the_batch_are_refused() -> None:
    with pytest.raises(ValueError, match="--ranks is 3; use a number that divides global_batch"):
        autotune.main(["demo", "--ranks", "3"])
