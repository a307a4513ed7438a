"""`cavmae bench autotune` searches among a run's fields; what a trial gives is set here."""

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import ForkingSubprocess
from launch import MUTED
from starts import place_store
from tiny_run import tiny_run

from cavmae.benchmarks.harness import processes
from cavmae.benchmarks.training import autotune
from cavmae.benchmarks.training.autotune import Search, main
from cavmae.benchmarks.training.autotune_trial import (
    Fields,
    Step,
    Trial,
    expected_rate,
    problem_of,
    run_trial,
)
from cavmae.command import exit_code
from cavmae.dataloaders.config import DataConfig
from cavmae.trainer.config.configs import PretrainConfig
from cavmae.trainer.config.serialize import save_config
from cavmae.trainer.fault_tolerance.host_memory import Memory
from cavmae.trainer.run_status import RunStatus

Answer = Callable[[Fields], float | str]
"""Samples a second of a trial with these fields, or why it failed."""


@pytest.fixture(autouse=True)
def on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Search]:
    """A whole search over a global batch of 24 that begins with micro-batches of 12 of them."""

    def searched(answer: Answer, *, fits: int = 24, **changes: Any) -> Search:
        def trial(_: Any, fields: Fields, __: Any, *, real_data: bool, **___: Any) -> Trial:
            given = answer(fields)
            rate, problem = (0.0, given) if isinstance(given, str) else (given, "")
            return Trial(fields, real_data, rate, problem, 0, 0.0)

        def fields_fit(_: Search, fields: Fields) -> bool:
            return fields["micro_batch"] <= fits

        monkeypatch.setattr(autotune, "run_trial", trial)
        monkeypatch.setattr(Search, "_fits", fields_fit)
        sizes = {"global_batch": 24, "micro_batch": 12, "lanes": 0} | changes
        found = Search(tiny_run(tmp_path, tmp_path, **sizes), 1, tmp_path, 600)
        found.run()
        return found

    return searched


def micro_batches(search: Search) -> list[int]:
    """Of the trials until another field is changed."""
    start = search.trials[0].fields | {"micro_batch": None}
    return [
        trial.fields["micro_batch"]
        for trial in search.trials
        if not trial.real_data and trial.fields | {"micro_batch": None} == start
    ]


def at_most(limit: int) -> Answer:
    """The larger the faster, and out of memory above the limit."""

    def answer(fields: Fields) -> float | str:
        value = fields["micro_batch"]
        return "out of memory" if value > limit else 10.0 * value

    return answer


@pytest.mark.slow
def test_a_trial_is_read_from_what_its_run_writes_whatever_the_words_of_messages(
    packed_synthetic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "tree_environment", lambda: {"PYTHONPATH": MUTED})
    monkeypatch.setattr(processes, "subprocess", ForkingSubprocess)
    place_store(tmp_path)
    run = tiny_run(packed_synthetic, tmp_path / "run")
    options = {"ranks": 1, "real_data": False, "within_seconds": 300}
    good = run_trial(run, {"micro_batch": 2}, tmp_path / "good", **options)
    assert not good.problem and good.samples_per_second > 0
    nowhere = {"initial_weights": str(tmp_path / "nowhere.pth")}
    bad = run_trial(run, nowhere, tmp_path / "bad", **options)
    assert "nowhere.pth" in bad.problem and bad.samples_per_second == 0
    assert "nowhere.pth" not in (tmp_path / "bad/log").read_text(), "as programs see it"


@pytest.mark.parametrize(
    ("code", "status", "problem"),
    [
        (1, RunStatus("failed", error_type="OutOfMemory"), "out of memory"),
        (1, RunStatus("failed", last_error="no such file"), "no such file"),
        (-9, RunStatus("running"), "killed, as for want of memory"),
        (247, None, "killed, as for want of memory"),
        (None, RunStatus("running"), "took too long"),
        (1, None, "ended with 1"),
    ],
)
def test_why_a_trial_failed(code: int | None, status: RunStatus | None, problem: str) -> None:
    assert problem_of(code, status) == problem


@pytest.mark.parametrize("problem", ["out of memory", "killed, as for want of memory"])
def test_a_start_that_fails_is_halved_until_one_ends_well(
    search: Callable[..., Search], problem: str
) -> None:
    found = search(lambda fields: problem if fields["micro_batch"] > 3 else 10.0)
    assert micro_batches(found)[:3] == [12, 6, 3]
    assert found.best["micro_batch"] == 3


def test_after_a_start_that_failed_nothing_as_large_is_tried_again(
    search: Callable[..., Search],
) -> None:
    found = search(at_most(8))
    assert micro_batches(found) == [12, 6, 8]
    assert found.best["micro_batch"] == 8


def test_where_no_micro_batch_ends_well_no_other_field_and_no_loader_is_tried(
    search: Callable[..., Search],
) -> None:
    found = search(at_most(0))
    assert micro_batches(found) == [12, 6, 3, 1] == [t.fields["micro_batch"] for t in found.trials]
    assert found.best == {}


def test_a_trial_with_the_loader_has_the_best_fields(search: Callable[..., Search]) -> None:
    found = search(at_most(6))
    loaded = [trial.fields for trial in found.trials if trial.real_data]
    assert loaded
    assert {fields["micro_batch"] for fields in loaded} == {6}


def test_a_doubled_micro_batch_that_the_model_of_memory_refuses_is_tried_between(
    search: Callable[..., Search],
) -> None:
    found = search(at_most(24), fits=6, micro_batch=4)
    assert micro_batches(found) == [4, 6]  # 8 is refused
    assert found.best["micro_batch"] == 6


def test_smaller_ones_are_tried_where_the_model_of_memory_refuses_all_larger(
    search: Callable[..., Search],
) -> None:
    found = search(lambda fields: 100.0 / fields["micro_batch"], fits=12)
    assert micro_batches(found) == [12, 6]
    assert found.best["micro_batch"] == 6


@pytest.mark.parametrize(("rate", "kept"), [(102.9, 12), (103.1, 24)])
def test_a_value_is_kept_where_it_is_faster_by_three_percent(
    search: Callable[..., Search], rate: float, kept: int
) -> None:
    found = search(lambda fields: {24: rate, 12: 100.0}.get(fields["micro_batch"], 1.0))
    assert {24, 12} <= set(micro_batches(found))
    assert found.best["micro_batch"] == kept


def test_what_is_slower_is_never_chosen(search: Callable[..., Search]) -> None:
    first: list[Fields] = []

    def slower_than_the_first(fields: Fields) -> float:
        first.append(fields)
        return 100.0 if fields == first[0] else 50.0 - len(first)

    found = search(slower_than_the_first)
    assert {trial.fields["engine.compile"] for trial in found.trials} == {True, False}
    assert {trial.fields["engine.zero_stage"] for trial in found.trials} == {0, 1}
    assert found.best == first[0]


def test_nothing_that_fits_ends_with_the_reason_and_without_a_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_trial(*_: Any, **__: Any) -> Trial:
        pytest.fail("a trial was begun")

    monkeypatch.setattr(autotune, "run_trial", no_trial)
    monkeypatch.setattr(autotune, "machine_memory", lambda: Memory(10**6, 10**6))
    run, saved, out = (tmp_path / name for name in ("run.json", "tuned.json", "results"))
    save_config(tiny_run(tmp_path, tmp_path / "run"), run)
    words = [str(run), "--ranks", "1", "--save", str(saved), "--out", str(out)]
    assert exit_code(main, words) == 1
    said = capsys.readouterr()
    assert "error: no micro_batch fits" in said.err and "0.001 GB are free" in said.err
    assert "fields to use" not in said.out
    assert not saved.exists() and not out.exists()


@pytest.mark.parametrize(("available", "fits"), [(10**6, False), (10**12, True)])
def test_clips_are_generated_only_where_something_fits(
    available: int, fits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders: list[Path] = []
    trained_on: list[str] = []

    def generated(work: Path, *_: Any, **__: Any) -> Path:
        folders.append(work)
        return work / "shards/frames"

    def failed(config: PretrainConfig, fields: Fields, *_: Any, **__: Any) -> Trial:
        trained_on.append(config.data.train)
        return Trial(fields, False, 0.0, "out of memory", 0, 0.0)

    monkeypatch.setattr(autotune, "synthetic_shards", generated)
    monkeypatch.setattr(autotune, "run_trial", failed)
    monkeypatch.setattr(autotune, "machine_memory", lambda: Memory(available, available))
    config = tiny_run(tmp_path, tmp_path, data=DataConfig())
    with nullcontext() if fits else pytest.raises(ValueError, match="no micro_batch fits"):
        Search(config, 1, tmp_path, 600).run()
    assert len(folders) == fits
    assert set(trained_on) == ({str(tmp_path / "shards/frames")} if fits else set())


def test_no_trial_that_ends_well_ends_with_code_1_and_without_a_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failed(_: Any, fields: Fields, __: Any, *, real_data: bool, **___: Any) -> Trial:
        return Trial(fields, real_data, 0.0, "out of memory", 0, 0.0)

    monkeypatch.setattr(autotune, "run_trial", failed)
    run, saved, out = (tmp_path / name for name in ("run.json", "tuned.json", "results"))
    save_config(tiny_run(tmp_path, tmp_path / "run"), run)
    words = [str(run), "--ranks", "1", "--save", str(saved), "--out", str(out)]
    assert exit_code(main, words) == 1
    assert "error: no trial succeeded" in capsys.readouterr().err
    assert not saved.exists() and not out.exists()


def timed_steps(passes: float, update: float) -> list[Step]:
    """Three alike but for one that took longer, as medians do not see."""
    return [
        {"model": {"forward": passes / 2, "backward": passes / 2}, "optimizer": {"step": update}}
        for passes in (passes, passes, 10 * passes)
    ]


@pytest.mark.parametrize(
    ("global_batch", "ranks", "passes", "expected"),
    [
        (4, 1, 2.0, 4 / (2.0 + 1.0)),  # one micro-batch of 2 s and the update
        (8, 1, 4.0, 8 / (4.0 + 1.0)),  # two, as timed
        (40, 1, 4.0, 40 / (20.0 + 1.0)),  # ten of 2 s, of which two were timed
        (80, 2, 4.0, 80 / (20.0 + 1.0)),  # ten on each of two ranks
    ],
)
def test_the_rate_is_that_of_the_whole_batch_with_one_update(
    global_batch: int, ranks: int, passes: float, expected: float, tmp_path: Path
) -> None:
    config = tiny_run(tmp_path, tmp_path)
    config = dataclasses.replace(config, global_batch=global_batch, micro_batch=4)
    assert expected_rate(config, ranks, timed_steps(passes, 1.0)) == pytest.approx(expected)
