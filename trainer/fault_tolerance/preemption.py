"""Stop requests: SIGTERM, a file in the run folder, or the launcher's notice of a preempted node.

Any of them reaches all ranks with the next step's reduction. From then on a grace period runs:
whoever sent the notice kills the processes at its end, and a checkpoint torn by that is worth less
than one that was never begun.
"""

import logging
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from cavmae.atomic_write import read_json, write_json
from cavmae.trainer.fault_tolerance.bounded import finishes_within

log = logging.getLogger(__name__)

START_AGAIN_EXIT_CODE = 75
"""Exit code of a process that stops before the run is finished: EX_TEMPFAIL of sysexits.h."""
SIGTERM = "SIGTERM"
"""Reason of a stop that a launcher asks for, to start the run again later."""
STOP_FILE = "stop.json"
"""In the run folder: a request to save and stop."""
_POLL_SECONDS = 1.0


def request_stop(run_dir: Path, reason: str, *, outranked: bool = False) -> None:
    """Ask the ranks that train in a run folder to save and stop.

    Args:
        run_dir: the run folder.
        reason: for people.
        outranked: leave a request that is there already, as a launcher does with a person's.

    Raises:
        OSError: the folder can't be written.
    """
    if not (outranked and requested_stop(run_dir)):
        write_json(run_dir / STOP_FILE, {"reason": reason, "id": secrets.token_hex(8)})


def withdraw_request(run_dir: Path) -> None:
    """Remove a stop request that an earlier attempt left behind."""
    (run_dir / STOP_FILE).unlink(missing_ok=True)


def requested_stop(run_dir: Path) -> str:
    """Return why the ranks of a run folder are asked to stop; empty if they are not.

    Raises:
        OSError: the folder can't be read.
    """
    return _read(run_dir)[0]


def _read(run_dir: Path) -> tuple[str, str]:
    """Return reason and id of the request; a file that is empty, torn or made by hand, as by
    `touch`, is one without an id."""
    try:
        request = read_json(run_dir / STOP_FILE)
        return str(request["reason"]), str(request.get("id", ""))
    except FileNotFoundError:
        return "", ""
    except (ValueError, KeyError, TypeError, AttributeError):
        return STOP_FILE, ""


class StopRequest:
    """Collects the stop requests that reach one rank.

    As a context it handles SIGTERM, in the main thread only; elsewhere that signal is the
    launcher's.

    Args:
        run_dir: folder in which a request may appear, polled once a second; None: don't poll.
        grace_seconds: time from the request until this process exits, saved or not; 0: no limit.
        notice: returns why the launcher wants this rank to stop, or an empty text.
    """

    def __init__(
        self, run_dir: Path | None, grace_seconds: float, notice: Callable[[], str] = lambda: ""
    ) -> None:
        self._run_dir = run_dir
        self._grace_seconds = grace_seconds
        self._notice = notice
        self._reason = ""
        self._followed: str | None = None
        self._polled = 0.0
        self._failing = False
        self._timer: threading.Timer | None = None

    def __enter__(self) -> "StopRequest":
        self._listens = threading.current_thread() is threading.main_thread()
        if self._listens:
            self._before = signal.signal(signal.SIGTERM, self._on_sigterm)
        return self

    def __exit__(self, *_: object) -> None:
        if self._listens:
            signal.signal(signal.SIGTERM, self._before)
        if self._timer is not None:
            self._timer.cancel()

    @property
    def reason(self) -> str:
        """Why this rank was asked to stop; empty if it was not."""
        if not self._reason:
            self._set(self._notice())
        if not self._reason and self._run_dir is not None:
            now = time.monotonic()
            if now - self._polled >= _POLL_SECONDS:
                self._polled = now
                self._poll(self._run_dir)
        return self._reason

    def withdraw(self) -> None:
        """Remove the request that was followed; a later one stays, for the next attempt."""
        if self._run_dir is None:
            return
        try:
            if self._followed == _read(self._run_dir)[1]:
                withdraw_request(self._run_dir)
        except OSError as error:
            log.warning("the stop request in %s could not be removed: %s", self._run_dir, error)

    def start_grace_period(self) -> None:
        """Exit this process after the grace period; only the first call counts."""
        if self._timer is None and self._grace_seconds:
            self._timer = threading.Timer(self._grace_seconds, self._end)
            self._timer.daemon = True
            self._timer.start()

    def _poll(self, run_dir: Path) -> None:
        """Look for a request; a file system that fails for a while doesn't end the run."""
        try:
            reason, name = _read(run_dir)
            if reason:
                self._followed = name
            self._set(reason)
        except OSError as error:
            if not self._failing:
                log.warning("stop requests in %s can't be read, retrying: %s", run_dir, error)
            self._failing = True
        else:
            self._failing = False

    def _set(self, reason: str) -> None:
        if reason:
            self._reason = reason
            self.start_grace_period()  # before the log, which may block
            log.warning("stop requested (%s): saving after this step", reason)

    def _on_sigterm(self, _signal: int, _frame: FrameType | None) -> None:
        self._set(SIGTERM)

    def _end(self) -> None:
        finishes_within(
            2.0,
            lambda: log.error(
                "ALARM: the checkpoint was not saved within checkpoint.grace_seconds = %g of the "
                "stop request; this process exits, and the run resumes from the checkpoint before",
                self._grace_seconds,
            ),
        )
        os._exit(START_AGAIN_EXIT_CODE)
