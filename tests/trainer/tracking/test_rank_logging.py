"""A log that can't be written stops nothing, and is said once."""

import logging
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from cavmae.trainer.tracking.rank_logging import log_to_file

log = logging.getLogger("cavmae.test")


@pytest.fixture
def full(tmp_path: Path) -> Iterator[str]:
    """A log file on a full disk."""
    path = tmp_path / "rank-0.log"
    path.symlink_to("/dev/full")
    log_to_file(path)
    yield str(path)
    logger = logging.getLogger("cavmae")
    for handler in [one for one in logger.handlers if isinstance(one, logging.FileHandler)]:
        logger.removeHandler(handler)
        with suppress(OSError):
            handler.close()


def test_a_log_on_a_full_disk_is_said_once(full: str, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(3):
        log.error("a message")
    assert capsys.readouterr().err == (
        f"{full} could not be written ([Errno 28] No space left on device); what is logged until "
        "it can be is only here\n"
    )


def test_nor_does_standard_error_on_the_same_disk_stop_anything(
    full: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with suppress(OSError), open("/dev/full", "w", buffering=1) as stream:  # closing it fails too
        monkeypatch.setattr("sys.stderr", stream)
        log.error("a message")
        full = ""
    assert not full, "logging raised nothing"
