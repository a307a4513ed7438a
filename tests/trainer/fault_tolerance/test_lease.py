"""A run has one owner: who it is, when another start may take over, and who then has to end."""

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cavmae.trainer.checkpoint.store import Store
from cavmae.trainer.fault_tolerance import lease as lease_module
from cavmae.trainer.fault_tolerance.lease import (
    OWNER_VARIABLE,
    RENEW_SECONDS,
    TAKE_OVER_SECONDS,
    Lease,
    OwnedError,
)


class Clock:
    """A clock that only sleeping moves, and what happens elsewhere at the end of each sleep."""

    def __init__(self, meanwhile: Callable[[], object] = lambda: None) -> None:
        self.now, self.meanwhile = 0.0, meanwhile

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.meanwhile()

    def lease(self) -> Lease:
        return Lease(lambda: self.now, self.sleep)


@pytest.fixture
def places(tmp_path: Path) -> dict[str, Store]:
    return {"run_dir": Store(tmp_path)}


def change(tmp_path: Path, attempt: int = 1, **fields: Any) -> None:
    """Change what a lease says of its holder."""
    path = tmp_path / f"lease/attempt-{attempt}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def leases(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "lease").iterdir())


def test_attempts_are_numbered_over_all_places_and_the_next_one_need_not_wait(
    tmp_path: Path, places: dict[str, Store]
) -> None:
    clock = Clock()
    for number in (1, 2):
        with clock.lease() as lease:
            assert lease.take(places) == number
        assert leases(tmp_path) == [f"attempt-{number}.json"]
    with clock.lease() as lease:
        assert lease.take({"checkpoint.folder": Store(tmp_path / "other"), **places}) == 3
        assert leases(tmp_path) == leases(tmp_path / "other") == ["attempt-3.json"]
    assert clock.now == 0


def test_a_second_start_is_refused_while_the_first_lives(places: dict[str, Store]) -> None:
    clock = Clock(lambda: clock.now % RENEW_SECONDS == 0 and first.renew())
    with clock.lease() as first, clock.lease() as second:
        assert first.take(places) == 1
        first_one = rf"process {os.getpid()} on .*, since .* UTC"
        with pytest.raises(OwnedError, match=f"run_dir .* is in use by {first_one}; wait for"):
            second.take(places)
        assert clock.now == RENEW_SECONDS
        first.check()


def test_one_that_gave_no_sign_of_life_loses_the_run_and_learns_of_it(
    places: dict[str, Store],
) -> None:
    clock = Clock()
    with clock.lease() as first, clock.lease() as second:
        first.take(places)
        assert second.take(places) == 2 and clock.now == TAKE_OVER_SECONDS
        second.check()
        for learns in (first.check, first.renew):
            with pytest.raises(OwnedError, match="was taken over by process"):
                learns()
        second.renew()


def test_a_start_that_was_itself_stopped_looks_again_before_it_takes_over(
    places: dict[str, Store],
) -> None:
    def wake_up_late() -> None:
        clock.now += 100
        first.renew()

    clock = Clock(wake_up_late)
    with clock.lease() as first, clock.lease() as second:
        first.take(places)
        with pytest.raises(OwnedError, match="is in use by"):
            second.take(places)


def test_one_that_ends_while_it_is_watched_is_followed_at_once(places: dict[str, Store]) -> None:
    clock = Clock(lambda: first.__exit__())
    with clock.lease() as first, clock.lease() as second:
        first.take(places)
        assert second.take(places) == 2 and clock.now < RENEW_SECONDS


@pytest.mark.field
@pytest.mark.parametrize("end", ["reaped", "zombie", "its number is another's"])
def test_a_process_of_this_machine_that_has_ended_is_followed_at_once(
    tmp_path: Path, places: dict[str, Store], end: str
) -> None:
    """Its number alone says nothing: in a container that was started again it is the same."""
    clock = Clock()
    program = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    ended = subprocess.Popen(program, stdin=subprocess.PIPE)
    assert ended.stdin
    before = {"pid": ended.pid, "pid_started": lease_module._started(ended.pid)}
    ended.stdin.close()
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    if end == "reaped":
        ended.wait()
    with clock.lease() as first, clock.lease() as second:
        first.take(places)
        change(tmp_path, **({"pid_started": 1} if end.startswith("its") else before))
        assert second.take(places) == 2 and clock.now == 0
    ended.wait()


@pytest.mark.field
@pytest.mark.parametrize("field", ["machine", "host"])
def test_nothing_is_concluded_from_the_processes_of_another_machine_or_container(
    tmp_path: Path, places: dict[str, Store], field: str
) -> None:
    clock = Clock()
    with clock.lease() as first, clock.lease() as second:
        first.take(places)
        change(tmp_path, **{field: "elsewhere", "pid_started": 1})
        assert second.take(places) == 2 and clock.now == TAKE_OVER_SECONDS


def test_the_next_attempt_of_the_same_launch_takes_over_at_once(
    places: dict[str, Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(OWNER_VARIABLE, "driver")
    clock = Clock()
    with clock.lease() as first, clock.lease() as second:
        first.take(places)
        assert second.take(places) == 2 and clock.now == 0
        with pytest.raises(OwnedError, match="its launcher has replaced it"):
            first.check()


def test_of_two_that_found_it_free_one_gets_it(
    places: dict[str, Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Lease() as first, Lease() as second:
        first.take(places)
        monkeypatch.setattr(second, "_once_free", lambda *_: 0)
        with pytest.raises(OwnedError, match="is in use by process"):
            second.take(places)
        first.check()


def test_one_that_was_overwritten_learns_of_it(tmp_path: Path, places: dict[str, Store]) -> None:
    """As where a store can't refuse to overwrite, and two starts were equally fast."""
    with Lease() as lease:
        lease.take(places)
        change(tmp_path, start="another")
        with pytest.raises(OwnedError, match="was taken over by"):
            lease.renew()
        assert "another" in (tmp_path / "lease/attempt-1.json").read_text()


def test_a_file_that_is_no_lease_is_watched_like_one(
    tmp_path: Path, places: dict[str, Store]
) -> None:
    (tmp_path / "lease").mkdir()
    (tmp_path / "lease/attempt-7.json").write_text("")
    clock = Clock()
    with clock.lease() as lease:
        assert lease.take(places) == 8 and clock.now == TAKE_OVER_SECONDS


def test_the_owner_of_a_full_disk_still_gives_signs_of_life(
    places: dict[str, Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    clock = Clock(lambda: clock.now % RENEW_SECONDS == 0 and first.renew())
    with clock.lease() as first, clock.lease() as second:
        first.take(places)
        monkeypatch.setattr("cavmae.trainer.checkpoint.store.write_bytes", full)
        with pytest.raises(OwnedError, match="is in use by process"):
            second.take(places)


def test_a_run_folder_that_fails_for_a_while_ends_no_run(
    tmp_path: Path,
    places: dict[str, Store],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(lease_module, "RENEW_SECONDS", 0.005)

    def wait_for(happened: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 30
        while not happened():
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def renewals() -> int:
        return json.loads((tmp_path / "lease/attempt-1.json").read_text())["renewals"]

    with Lease() as lease, caplog.at_level(logging.WARNING):
        lease.take(places)
        wait_for(lambda: renewals() > 0)
        (tmp_path / "lease").rename(tmp_path / "away")
        (tmp_path / "lease").touch()  # no folder: can't be written to
        wait_for(lambda: "could not be renewed, retrying" in caplog.text)
        (tmp_path / "lease").unlink()
        (tmp_path / "away").rename(tmp_path / "lease")
        before = renewals()
        wait_for(lambda: renewals() > before)
        assert not lease.lost
        change(tmp_path, start="another")
        wait_for(lambda: bool(lease.lost))
