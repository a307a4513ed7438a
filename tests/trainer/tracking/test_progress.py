"""A terminal gets a bar, a log file gets plain lines."""

import contextlib
import io
import os
import pty
import re
import time

import pytest

from cavmae.trainer.tracking.progress import Progress

STEPS = ((1, 2.5), (2, 2.25), (3, 2.0), (4, 1.75), (5, 1.5))


def run(progress: Progress) -> None:
    for step, loss in STEPS:
        progress.update(step, loss, samples_per_second=96.25, data_wait_share=0.125)
    progress.close()


class FullDisk(io.BytesIO):
    def write(self, _data: object) -> int:
        raise OSError(28, "No space left on device")


def on_terminal() -> str:
    """What a terminal receives."""
    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as terminal:
        run(Progress(5, 0, stream=terminal))
    received = b""
    with contextlib.suppress(OSError):
        # What is written arrives a little later; a terminal that is closed and read to the end
        # answers with an error.
        while part := os.read(master, 1_000_000):
            received += part
    os.close(master)
    return received.decode()


def plain(text: str) -> list[str]:
    """Lines without control sequences."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text).replace("\r", "\n").strip().splitlines()


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("colour", ["", "1"])
def test_a_log_file_gets_a_plain_line_for_every_update(
    colour: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", colour)  # as machines of continuous integration do
    stream = io.StringIO()
    run(Progress(total_steps=5, start_step=0, stream=stream))
    assert stream.getvalue().splitlines()[1::2] == [
        "step 2/5  loss 2.2500  96.2 samples/s  data wait 12%  0:00:00 left",
        "step 4/5  loss 1.7500  96.2 samples/s  data wait 12%  0:00:00 left",
    ]
    assert len(stream.getvalue().splitlines()) == 5


def test_a_terminal_gets_a_bar_that_ends_with_the_last_numbers() -> None:
    text = on_terminal()
    assert "━" in text
    last = plain(text)[-1]
    for part in ("5/5", "loss 1.5000", "96.2 samples/s", "data wait 12%", "left"):
        assert part in last


def test_the_bar_fits_on_one_line_of_80_columns() -> None:
    lines = [line for line in plain(on_terminal()) if line]
    assert all(len(line) <= 80 and "step" in line for line in lines)


def test_a_full_disk_under_the_log_stops_nothing() -> None:
    stream = io.TextIOWrapper(FullDisk(), line_buffering=True)
    run(Progress(5, 0, stream=stream))
    stream.detach()


def test_a_bar_gives_the_cursor_back() -> None:
    text = on_terminal()
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


def test_the_time_left_is_that_of_the_steps_of_this_start() -> None:
    stream = io.StringIO()
    progress = Progress(total_steps=100_000, start_step=50_000, stream=stream)
    time.sleep(0.05)
    progress.update(50_001, 1.0, 1.0, 0.0)
    (left,) = re.findall(r"(\d+):\d\d:\d\d left", stream.getvalue())
    assert int(left) >= 49_999 * 0.05 // 3600  # counting all 50,001 steps would say 0:00:00


def test_no_time_left_is_said_before_a_step_is_done() -> None:
    stream = io.StringIO()
    Progress(10, 5, stream=stream).update(5, 1.0, 1.0, 0.0)
    assert stream.getvalue().endswith("-:--:-- left\n")
