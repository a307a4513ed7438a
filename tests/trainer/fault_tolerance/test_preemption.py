"""Stop requests in the run folder: written by us, made by hand, and on storage that fails."""

import errno
import logging
from pathlib import Path

import pytest

from cavmae.trainer.fault_tolerance import preemption
from cavmae.trainer.fault_tolerance.preemption import (
    StopRequest,
    request_stop,
    requested_stop,
    withdraw_request,
)


def test_a_request_stops_until_it_is_withdrawn(tmp_path: Path) -> None:
    assert requested_stop(tmp_path) == StopRequest(tmp_path, 0).reason == ""
    request_stop(tmp_path, "maintenance")
    assert requested_stop(tmp_path) == StopRequest(tmp_path, 0).reason == "maintenance"
    withdraw_request(tmp_path)
    assert requested_stop(tmp_path) == StopRequest(tmp_path, 0).reason == ""


@pytest.mark.parametrize("content", [b"", b"stop", b"[]", b"{}", b"\xff\xfe"])
def test_a_file_made_by_hand_is_a_request(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "stop.json").write_bytes(content)
    assert StopRequest(tmp_path, 0).reason == "stop.json"


def test_a_later_request_stays_when_the_one_before_was_followed(tmp_path: Path) -> None:
    request_stop(tmp_path, "more ranks fit", outranked=True)
    stop = StopRequest(tmp_path, 0)
    assert stop.reason == "more ranks fit"
    request_stop(tmp_path, "a person's")
    stop.withdraw()
    assert requested_stop(tmp_path) == "a person's"
    request_stop(tmp_path, "more ranks fit", outranked=True)
    assert requested_stop(tmp_path) == "a person's"
    later = StopRequest(tmp_path, 0)
    assert later.reason == "a person's"
    later.withdraw()
    assert requested_stop(tmp_path) == ""


def test_storage_that_fails_for_a_while_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A network file system answers ESTALE after a failover; the run polls it for a month."""
    read = preemption.read_json

    def stale(path: Path) -> dict[str, str]:
        raise OSError(errno.ESTALE, "Stale file handle", str(path))

    monkeypatch.setattr(preemption, "_POLL_SECONDS", 0.0)
    monkeypatch.setattr(preemption, "read_json", stale)
    stop = StopRequest(tmp_path, 0)
    with caplog.at_level(logging.WARNING):
        assert stop.reason == "" and stop.reason == ""
    assert caplog.text.count("Stale file handle") == 1, "once, not every second"

    monkeypatch.setattr(preemption, "read_json", read)
    request_stop(tmp_path, "maintenance")
    assert stop.reason == "maintenance", "it is found once the storage answers again"
