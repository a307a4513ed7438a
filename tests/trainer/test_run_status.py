"""`status.json` says what a run is doing, whoever writes it and whatever else fails."""

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cavmae.trainer import run_status
from cavmae.trainer.run_status import (
    LauncherStatus,
    RunStatus,
    StatusWriter,
    last_line,
    read_status,
    write_status,
)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_status, "HEARTBEAT_SECONDS", 0.02)


def status_of(run_dir: Path) -> RunStatus:
    status = read_status(run_dir)
    assert status is not None
    return status


def wait_for(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def has(run_dir: Path, state: str) -> Callable[[], bool]:
    return lambda: (status := read_status(run_dir)) is not None and status.state == state


def test_an_attempt_is_written_from_its_start_to_its_end(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert read_status(tmp_path) is None
    with StatusWriter(run_dir, rank=0) as writer:
        wait_for(has(run_dir, "starting"))
        writer.opened(40, 1)
        writer.running(10, "checkpoints/step-000000010")
        wait_for(has(run_dir, "running"))
        status = status_of(run_dir)
        assert (status.attempt, status.step, status.steps) == (1, 10, 40)
        assert status.resumed_from.endswith("step-000000010") and status.last_step_at == 0
        writer.step = 11  # all that a step does
        wait_for(lambda: status_of(run_dir).step == 11)
        assert time.time() - 30 < status_of(run_dir).last_step_at <= status_of(run_dir).updated_at
        writer.step = 12
        writer.change("stopped", reason="SIGTERM")
    status = status_of(run_dir)
    assert (status.state, status.reason, status.step) == ("stopped", "SIGTERM", 12)
    with StatusWriter(run_dir, rank=0) as writer:
        writer.change("finished", reason="")
    assert (status_of(run_dir).state, status_of(run_dir).attempt) == ("finished", 2)


def test_an_error_is_kept_in_a_line_with_its_class_until_there_is_another(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lanes"), StatusWriter(tmp_path, rank=0):
        raise ValueError("lanes is 3\nand more")
    status = status_of(tmp_path)
    assert (status.state, status.last_error, status.error_type) == (
        *("failed", "lanes is 3", "ValueError"),
    )
    assert status.describe() == "failed: lanes is 3"
    with StatusWriter(tmp_path, rank=0) as writer:
        writer.change("finished")
    assert status_of(tmp_path).last_error == "lanes is 3"


def test_a_write_that_fails_stops_nothing_and_is_logged_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    attempts = 0

    def full(*_: object) -> None:
        nonlocal attempts
        attempts += 1
        raise OSError("No space left on device")

    with caplog.at_level(logging.WARNING), StatusWriter(tmp_path, rank=0) as writer:
        wait_for(has(tmp_path, "starting"))
        with monkeypatch.context() as patch:
            patch.setattr(run_status, "write_json", full)
            writer.running(0, "")
            wait_for(lambda: attempts > 3)
        wait_for(has(tmp_path, "running"))
        writer.change("finished")
    assert status_of(tmp_path).state == "finished"
    assert len([one for one in caplog.records if "No space left" in one.message]) == 1
    monkeypatch.setattr(run_status, "write_json", full)
    write_status(tmp_path, state="failed")
    assert status_of(tmp_path).state == "finished"


@pytest.mark.parametrize("state", ["starting", "running", "stopping"])
def test_ranks_that_write_nothing_for_a_minute_show_no_sign_of_life(
    state: run_status.State,
) -> None:
    now = time.time()
    assert RunStatus(state, updated_at=now - 50).alive
    silent = RunStatus(state, updated_at=now - 75)
    assert not silent.alive and 75 <= silent.silent_seconds < 100
    assert silent.describe().startswith("no sign of life for 7")
    assert RunStatus("stopped", reason="SIGTERM").describe() == "stopped: SIGTERM"


def test_a_launcher_writes_what_failed_before_the_ranks_began(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with pytest.raises(FileNotFoundError), LauncherStatus(run_dir) as launcher:
        launcher.change("waiting", reason="8 GPUs")
        assert status_of(run_dir).describe() == "waiting: 8 GPUs"
        raise FileNotFoundError("no shards in /nowhere")
    status = status_of(run_dir)
    assert (status.state, status.last_error) == ("failed", "no shards in /nowhere")
    assert status.attempt == 0, "no rank was launched"


def test_the_error_of_a_rank_is_not_replaced_by_what_its_launcher_makes_of_it(
    tmp_path: Path,
) -> None:
    with pytest.raises(RuntimeError), LauncherStatus(tmp_path):
        with pytest.raises(MemoryError), StatusWriter(tmp_path, rank=0):
            raise MemoryError("rank 0")
        raise RuntimeError("the ranks failed")
    assert status_of(tmp_path).error_type == "MemoryError"
    with pytest.raises(RuntimeError), LauncherStatus(tmp_path):
        raise RuntimeError("no node")
    assert status_of(tmp_path).last_error == "no node"


def test_a_refused_command_leaves_the_status_of_a_run_that_is_alive(tmp_path: Path) -> None:
    with StatusWriter(tmp_path, rank=0) as alive:
        alive.opened(40, 1)
        alive.running(0, "")
        wait_for(has(tmp_path, "running"))
        with pytest.raises(ValueError), LauncherStatus(tmp_path):
            raise ValueError("data.train is empty")
        with pytest.raises(ValueError), StatusWriter(tmp_path, rank=0):
            raise ValueError("the run was started with another width")
        alive.step = 7
        wait_for(lambda: status_of(tmp_path).step == 7)
        with StatusWriter(tmp_path, rank=0) as second:
            second.opened(40, 2)
            second.running(3, "")
            wait_for(lambda: (status_of(tmp_path).attempt, status_of(tmp_path).step) == (2, 3))
            time.sleep(0.2)
            assert (status_of(tmp_path).attempt, status_of(tmp_path).step) == (2, 3)


def test_the_failure_of_another_rank_is_written_over_the_first_ranks_signs_of_life(
    tmp_path: Path,
) -> None:
    with StatusWriter(tmp_path, rank=0) as first:
        first.opened(40, 1)
        first.running(0, "")
        wait_for(has(tmp_path, "running"))
        with pytest.raises(OSError), StatusWriter(tmp_path, rank=3) as other:
            other.opened(40, 1)
            other.running(0, "")
            raise OSError("disk full")
        time.sleep(0.2)
        status = status_of(tmp_path)
        assert (status.state, status.last_error) == ("failed", "rank 3: disk full")


def test_a_rank_that_was_cut_off_and_fails_late_leaves_the_status_of_the_attempt_after_it(
    tmp_path: Path,
) -> None:
    with pytest.raises(OSError), StatusWriter(tmp_path, rank=3) as late:
        late.opened(40, 1)
        write_status(tmp_path, state="running", attempt=2)
        raise OSError("the other ranks are gone")
    assert status_of(tmp_path).state == "running"


def test_a_status_is_a_line_of_output(tmp_path: Path) -> None:
    status = RunStatus("failed", step=3, last_error='a "quoted"\tline', updated_at=1.5)
    text = f"step 1\n{RunStatus('running').line()}\n{status.line()}\nthe end\n"
    assert last_line(text) == status
    cut = text + status.line()[:40]
    assert last_line(cut) == status
    other = {"schema": 99, "state": "running"}
    assert last_line(f"{run_status.LINE_PREFIX}{json.dumps(other)}") is None
    (tmp_path / "status.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match=r"status\.json: no status of schema 1; read it with the"):
        read_status(tmp_path)
    (tmp_path / "status.json").write_text(json.dumps({"schema": 1, "state": "running", "x": 1}))
    with pytest.raises(ValueError, match=r"json: its fields are not those of a status of schema 1"):
        read_status(tmp_path)
    (tmp_path / "status.json").write_text('{"schema": 1')
    with pytest.raises(ValueError, match=rf"^{tmp_path}/status\.json is not JSON"):
        read_status(tmp_path)


def test_a_writer_whose_clock_is_ahead_is_not_silent() -> None:
    """Machines' clocks differ (db-scheduler 433): one that is ahead shows no negative silence."""
    ahead = time.time() + 90
    status = RunStatus("running", step=3, updated_at=ahead, last_step_at=ahead)
    assert status.alive and status.silent_seconds == 0
    assert status.describe() == "running, last step 0 s ago"
