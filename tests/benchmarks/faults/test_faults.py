"""`cavmae bench faults` does what it says to real runs, and tells when one does not end well."""

import dataclasses
import json
import re
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from forks import ForkingSubprocess
from launch import MUTED
from starts import place_store

from cavmae.benchmarks.faults import faults
from cavmae.benchmarks.faults.faulted_run import FaultedRun
from cavmae.benchmarks.faults.observed_rank import trained_samples
from cavmae.benchmarks.faults.outcome import Expected, Failed, Row, Skipped, largest_difference
from cavmae.benchmarks.faults.runs import Bench
from cavmae.benchmarks.harness import processes
from cavmae.benchmarks.harness.processes import Start
from cavmae.benchmarks.report.sections import _faults
from cavmae.cluster.jobs import run_state
from cavmae.dataloaders.shards.shard_set import ShardSet
from cavmae.trainer.config.configs import PretrainConfig
from cavmae.trainer.run_status import write_status

GOOD = Row(
    noticed_seconds=1.0,
    again_seconds=2.0,
    steps_lost=5,
    steps_allowed=10,
    samples_equal=True,
    largest_difference=0.0,
    tolerance=0.0,
    compared_with="the undisturbed run",
    said="rank 0 failed",
)


@pytest.mark.slow
def test_rows_are_measured_and_recorded_whatever_the_words_of_messages(
    packed_synthetic: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Faults that the product's own tests leave out, and one that ends an attempt."""
    monkeypatch.setattr(processes, "tree_environment", lambda: {"PYTHONPATH": MUTED})
    monkeypatch.setattr(processes, "subprocess", ForkingSubprocess)
    place_store(tmp_path / "work")
    shutil.copytree(packed_synthetic, tmp_path / "work/shards")
    names = [
        *("a gradient is NaN: update skipped", "a shard is damaged"),
        "all ranks are preempted (SIGTERM)",
    ]
    words = ["--steps", "40", "--only", *names, "--work-dir", str(tmp_path / "work")]
    assert faults.main([*words, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("faults-*.json")
    results = json.loads(path.read_text())["results"]
    for row in results.values():
        assert row["samples_equal"] and row["largest_difference"] == 0
        assert row["steps_lost"] == 0 and row["noticed_seconds"] > 0
    assert results[names[0]]["said"] == "skipped_updates is 1 at step 21"
    assert "crc_mismatch" in results[names[1]]["said"]
    assert results[names[2]]["said"] in ("stopping: SIGTERM", "stopped: SIGTERM")
    (log, *_) = (tmp_path / "work").glob("a-shard-is-damaged-*.log")
    assert "in other words" in log.read_text() and "crc_mismatch" not in log.read_text()
    assert run_state(tmp_path / "work/a-shard-is-damaged") == ("finished", "40/40")
    assert "bit for bit" in capsys.readouterr().out
    # The runs themselves: all positions were noted, and damaged clips are in none of them.
    undisturbed = trained_samples(tmp_path / "work/undisturbed")
    assert sorted(undisturbed) == list(range(40 * 8))
    assert set(undisturbed.values()) == set(clips_of(tmp_path / "work/shards/frames"))
    damaged = trained_samples(tmp_path / "work/a-shard-is-damaged")
    assert len(set(undisturbed.values()) - set(damaged.values())) == 4


def clips_of(folder: Path) -> list[str]:
    shards = ShardSet(folder)
    return [
        shards.sample_id(shard, sample)
        for shard, size in enumerate(shards.sizes)
        for sample in range(size)
    ]


@pytest.mark.parametrize(
    "bad",
    [
        {"steps_lost": 11},
        {"largest_difference": 1e-9},
        {"samples_equal": False},
        {"noticed_seconds": 30.0},
    ],
    ids=lambda bad: next(iter(bad)),
)
def test_a_run_that_ends_otherwise_is_no_success(bad: dict[str, float]) -> None:
    row = dataclasses.replace(GOOD, **bad)
    assert faults.exit_code({"good": GOOD}) == 0
    assert faults.exit_code({"good": GOOD, "bad": row}) == 1
    assert "bad: FAILED" in shown({"good": GOOD, "bad": row})


def test_a_fault_that_this_machine_cannot_have_is_shown_with_its_reason() -> None:
    rows = {"a node is killed": Skipped("network namespaces need root")}
    assert "skipped: network namespaces need root" in shown(rows)
    assert faults.exit_code(rows) == 0
    assert dataclasses.asdict(rows["a node is killed"]) == {
        "skipped": "network namespaces need root"
    }


def test_a_run_that_does_not_come_to_its_end_is_no_success() -> None:
    rows = {"good": GOOD, "the disk is full": Failed("checkpoint 20 did not happen:\nlog\nlog")}
    assert faults.exit_code(rows) == 1
    assert re.search("the disk is full .* FAILED: checkpoint 20 did not happen:", shown(rows))


def test_a_start_that_has_ended_is_not_waited_for(tmp_path: Path) -> None:
    start = Start([([sys.executable, "-c", "print('late')"], {})], tmp_path / "log")
    assert start.wait_for(start.text, "a line").startswith("late")
    with pytest.raises(RuntimeError, match="a step did not happen:\nlate"):
        start.wait_for(lambda: False, "a step")


def test_a_row_counts_the_repeated_steps_and_the_time_until_a_new_one(tmp_path: Path) -> None:
    """A fault at step 25, a resume from step 20 by a second attempt, and an end at step 30."""
    run_dir = tmp_path / "run"
    (run_dir / "samples").mkdir(parents=True)
    logged = [*range(1, 26), *range(21, 31)]

    def launch(_: PretrainConfig) -> Start:
        return Start([([sys.executable, "-c", ""], {})], tmp_path / "log")

    def write_metrics(steps: list[int], began: float) -> None:
        lines = [
            json.dumps({"step": step, "loss": 1.0 + step, "unix_seconds": began + number})
            for number, step in enumerate(steps)
        ]
        with (run_dir / "metrics.jsonl").open("a") as file:
            file.write("".join(f"{line}\n" for line in lines))

    bench = object.__new__(Bench)  # no data is made
    bench.work = tmp_path
    run = FaultedRun(bench, PretrainConfig(run_dir=str(run_dir)), launch)
    write_metrics(logged[:25], time.time() - 100)
    write_status(run_dir, state="running", attempt=1)
    run.fault_is_now()
    write_status(run_dir, state="restarting", last_error="rank 1 failed")
    run.wait_until_noticed(run.failure)
    run.launch()
    write_status(run_dir, state="running", attempt=2, resumed_from="checkpoints/step-000000020")
    write_metrics(logged[25:], time.time() + 60)
    row = run.row(
        resumed=20, expected=Expected([1.0 + step for step in range(1, 31)], {}, "another run")
    )
    assert (row.steps_lost, row.said, row.compared_with) == (5, "rank 1 failed", "another run")
    assert row.largest_difference == 0 and row.samples_equal
    assert row.noticed_seconds > 0 and row.again_seconds >= 60


def test_losses_are_compared_step_by_step() -> None:
    expected = Expected([2.0, 4.0], {}, "the undisturbed run")
    assert largest_difference(Expected([2.0, 4.0], {}, "a run"), expected) == 0
    assert largest_difference(Expected([2.0, 4.5], {}, "a run"), expected) == 0.125
    with pytest.raises(RuntimeError, match="a run has 1 steps and the undisturbed run 2"):
        largest_difference(Expected([2.0], {}, "a run"), expected)


def test_the_clip_of_a_position_is_the_one_trained_on_last(tmp_path: Path) -> None:
    folder = tmp_path / "samples"
    folder.mkdir()
    torn = '{"positions": [8], "sample_'
    (folder / "1-rank-0.jsonl").write_text(line([0, 1], ["a", "b"]) + line([4, 5], ["c", "d"]))
    (folder / "2-rank-1.jsonl").write_text(line([2], ["e"]) + torn)
    (folder / "3-rank-0.jsonl").write_text(line([4], ["again"]))
    assert trained_samples(tmp_path) == {0: "a", 1: "b", 2: "e", 4: "again", 5: "d"}


def line(positions: list[int], sample_ids: list[str]) -> str:
    return json.dumps({"positions": positions, "sample_ids": sample_ids}) + "\n"


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="steps is 5; use 40 or more"):
        faults.FaultsConfig(steps=5)


def test_an_unknown_fault_is_refused() -> None:
    with pytest.raises(ValueError, match="only has 'a fire'; use some of: a rank is killed"):
        faults.FaultsConfig(only=("a fire",))


def shown(rows: Mapping[str, Row | Skipped | Failed]) -> str:
    """The rows of the report's table."""
    (grid,) = _faults(faults.recorded(rows)).grids
    return "\n".join(" | ".join(cells) for cells in grid.rows)
