"""A run's status in the output of its driver, for readers that the run folder is out of reach of:
`cavmae status` and `cavmae stop` read the lines from a job's log."""

import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from cavmae.trainer.run_status import RunStatus, read_status

VARIABLE = "CAVMAE_STATUS_LINES"
"""Set to 1 in a job's environment by `cavmae submit`: its driver writes the lines."""
_POLL_SECONDS = 1.0
_UPDATE_SECONDS = 30.0
"""A state that stays is repeated this often, with its step and as a sign of life."""


class StatusRelay:
    """Repeats a run's status on standard output, a line at each change of state, in a job. A
    context."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._printed = self._read()  # by an attempt before
        self._printed_at = 0.0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._relay, name="status relay", daemon=True)

    def __enter__(self) -> None:
        if os.environ.get(VARIABLE) == "1":
            self._thread.start()

    def __exit__(self, *_: Any) -> None:
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def _relay(self) -> None:
        closed = False
        while not closed:
            closed = self._closed.wait(_POLL_SECONDS)
            status = self._read()
            if status is None or status == self._printed:
                continue
            if (
                closed
                or _headline(status) != _headline(self._printed)
                or time.monotonic() - self._printed_at > _UPDATE_SECONDS
            ):
                sys.stdout.write(f"{status.line()}\n")
                sys.stdout.flush()
                self._printed, self._printed_at = status, time.monotonic()

    def _read(self) -> RunStatus | None:
        try:
            return read_status(self._run_dir)
        except (OSError, ValueError):
            return None


def _headline(status: RunStatus | None) -> tuple[object, ...]:
    """Return what readers should see at once when it changes: all but later steps and times."""
    if status is None:
        return ()
    steps_begun = status.last_step_at > 0
    return status.state, status.reason, status.attempt, status.last_error, steps_begun
