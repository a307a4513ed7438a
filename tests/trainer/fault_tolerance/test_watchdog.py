"""Steps that stop end the process; slow starts and pauses do not."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cavmae.trainer.config.configs import WatchdogConfig
from cavmae.trainer.fault_tolerance.preemption import START_AGAIN_EXIT_CODE
from cavmae.trainer.fault_tolerance.watchdog import HANG_EXIT_CODE, Watchdog

QUICK = WatchdogConfig(hang_ratio=5, min_seconds=0.5, max_pause_seconds=2)


class Ended:
    """What a watchdog calls instead of ending this process."""

    def __init__(self) -> None:
        self.code = 0
        self.event = threading.Event()

    def __call__(self, code: int) -> None:
        self.code = code
        self.event.set()


def test_steps_that_stop_end_the_process_and_leave_the_stacks(tmp_path: Path) -> None:
    ended = Ended()
    watchdog = Watchdog(QUICK, tmp_path / "hangs", 3, ended)
    for _ in range(6):
        watchdog.step()
        time.sleep(0.01)
    assert ended.event.wait(10)
    assert ended.code == HANG_EXIT_CODE
    text = (tmp_path / "hangs/rank-3.txt").read_text()
    assert "no step for" in text
    assert "test_steps_that_stop_end_the_process" in text, "the stack of the thread that waits"


def test_the_limit_follows_the_steps(tmp_path: Path) -> None:
    ended = Ended()
    watchdog = Watchdog(QUICK, tmp_path, 0, ended)
    for _ in range(4):
        watchdog.step()
        time.sleep(0.3)
    time.sleep(0.6)  # 3 medians, over the minimum
    watchdog.close()
    assert not ended.event.is_set()


def test_the_first_steps_and_pauses_may_take_longer(tmp_path: Path) -> None:
    ended = Ended()
    watchdog = Watchdog(QUICK, tmp_path, 0, ended)
    time.sleep(0.8)
    for _ in range(5):
        watchdog.step()
    with watchdog.pause():
        time.sleep(0.8)
    watchdog.step()
    assert not ended.event.is_set()
    with watchdog.pause():
        assert ended.event.wait(10), "but not for ever"


def test_a_watchdog_that_is_closed_or_switched_off_ends_nothing(tmp_path: Path) -> None:
    ended = Ended()
    off = WatchdogConfig(hang_ratio=0, min_seconds=0.1, max_pause_seconds=0.1)
    Watchdog(off, tmp_path, 0, ended)
    closed = Watchdog(QUICK, tmp_path, 0, ended)
    closed.step()
    closed.close()
    assert not ended.event.wait(3)


@pytest.mark.parametrize(
    ("field", "value"), [("hang_ratio", 1.0), ("min_seconds", 0.0), ("max_pause_seconds", -1)]
)
def test_a_field_out_of_range_is_named(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"watchdog\.{field} is {value}"):
        WatchdogConfig(**{field: value})


BLOCKED = """
import logging, os, sys, time
from pathlib import Path
from cavmae.trainer.config.configs import WatchdogConfig
from cavmae.trainer.fault_tolerance.preemption import StopRequest
from cavmae.trainer.fault_tolerance.preemption import START_AGAIN_EXIT_CODE
from cavmae.trainer.fault_tolerance.watchdog import Watchdog

folder, guard = Path(sys.argv[1]), sys.argv[2]
os.mkfifo(folder / "rank-0.txt")  # blocks whoever opens it to write
full = os.pipe()[1]
os.set_blocking(full, False)
try:
    while True:
        os.write(full, bytes(4096))
except BlockingIOError:
    os.set_blocking(full, True)
os.dup2(full, 2)
logging.basicConfig(level=logging.INFO, handlers=[logging.StreamHandler(os.fdopen(full, "w"))])
print("ready", flush=True)
if guard == "watchdog":
    config = WatchdogConfig(hang_ratio=5, min_seconds=0.5, max_pause_seconds=1)
    watchdog = Watchdog(config, folder, 0)
    logging.error("this blocks, with the lock of the log")
else:
    with StopRequest(None, 1.0, lambda: "the node goes away") as stop:
        stop.reason
"""


@pytest.mark.parametrize("guard", ["watchdog", "grace period"])
def test_a_process_whose_log_and_folder_block_is_ended_all_the_same(
    guard: str, tmp_path: Path
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", BLOCKED, str(tmp_path), guard],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    began = time.monotonic()
    try:
        assert process.wait(30) == HANG_EXIT_CODE == START_AGAIN_EXIT_CODE
    finally:
        process.kill()
    assert time.monotonic() - began < 1 + 5
    if guard == "watchdog":
        (stacks,) = tmp_path.glob("cavmae-hang-*-rank-0.txt")
        assert "in emit" in stacks.read_text(), "where the main thread is stuck"
