"""Exits a rank whose steps have stopped, after dumping the stacks of all threads.

A collective that waits for a rank which is dead, stopped or in an endless loop waits without an
error, on every other rank. So each rank watches its own steps: one that takes far longer than the
steps before ends the process, and the launcher resumes from the newest checkpoint.
"""

import faulthandler
import logging
import os
import statistics
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from cavmae.trainer.config.configs import WatchdogConfig
from cavmae.trainer.fault_tolerance.bounded import finishes_within

log = logging.getLogger(__name__)

HANG_EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: another attempt may succeed."""
_REMEMBERED_STEPS = 100
_STEPS_TO_KNOW = 3


class Watchdog:
    """Watches the steps of one rank from a thread, until `close`.

    Args:
        config: the timeouts.
        folder: gets `rank-N.txt`, the stacks of a rank that hung; they are written to the
            temporary folder too.
        rank: this rank.
        end: exits the process.
    """

    def __init__(
        self,
        config: WatchdogConfig,
        folder: Path,
        rank: int,
        end: Callable[[int], object] = os._exit,
    ) -> None:
        self._config = config
        self._path = folder / f"rank-{rank}.txt"
        self._end = end
        self._seconds: deque[float] = deque(maxlen=_REMEMBERED_STEPS)
        self._began = time.monotonic()
        self._counts = False
        self._limit = config.max_pause_seconds
        self._closed = threading.Event()
        if config.hang_ratio:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def step(self) -> None:
        """Note that a step is done and the next one begins."""
        now = time.monotonic()
        if self._counts:
            self._seconds.append(now - self._began)
        self._began, self._counts = now, True
        if len(self._seconds) >= _STEPS_TO_KNOW:
            median = statistics.median(self._seconds)
            self._limit = max(self._config.min_seconds, self._config.hang_ratio * median)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Allow for something that takes longer than a step, such as validation."""
        limit, self._limit = self._limit, self._config.max_pause_seconds
        self._began = time.monotonic()
        try:
            yield
        finally:
            self._began, self._counts = time.monotonic(), False
            self._limit = limit

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._limit / 4)):
            waited = time.monotonic() - self._began
            if waited > self._limit:
                self._report(waited)
                self._end(HANG_EXIT_CODE)
                return

    def _report(self, waited: float) -> None:
        """Write the stacks where writing works, and log where they are; takes 4 s at most.

        What made the run hang may be the file system of its folder, or of its log.
        """
        stacks = f"{time.strftime('%Y-%m-%d %H:%M:%S')}: no step for {waited:.0f} s\n{_stacks()}"
        local = Path(tempfile.gettempdir()) / f"cavmae-hang-{os.getpid()}-{self._path.name}"
        places = [
            path
            for path in (self._path, local)
            if finishes_within(1.5, partial(_append, path, stacks))
        ]
        finishes_within(
            1.0,
            lambda: log.error(
                "HANG: no step for %.0f s (the limit is %.0f s); the stacks of all threads are in "
                "%s; this process exits, so that the run can be resumed",
                waited,
                self._limit,
                places[0] if places else "no file: neither the run folder nor /tmp is writable",
            ),
        )


def _append(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(text)


def _stacks() -> str:
    """Return the stacks of all threads. They are written to memory first: faulthandler holds the
    interpreter's lock while it writes, so a file that blocks would stop every thread."""
    with os.fdopen(os.memfd_create("stacks"), "w+") as memory:
        faulthandler.dump_traceback(memory, all_threads=True)
        memory.seek(0)
        return memory.read()
