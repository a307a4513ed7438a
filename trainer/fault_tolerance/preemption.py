"""How a run is asked to save and leave: SIGTERM, a file in its run folder, or a notice of the
starter that a node is being taken away.

Any of them reaches all ranks with the next step's reduction. From then on there is a budget: who
has sent the notice will kill the processes at the end of it, and a checkpoint that is torn by that
is worth less than one that was not begun.
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from cavmae.atomic_write import read_json, write_json

log = logging.getLogger(__name__)

START_AGAIN_EXIT_CODE = 75
"""Of a process that ends before the run has: EX_TEMPFAIL of sysexits.h, start it again."""
_REQUEST = "stop.json"
_LOOK_EVERY_SECONDS = 1.0


def request_stop(run_dir: Path, reason: str) -> None:
    """Ask the ranks that train in a run folder to save and leave.

    Raises:
        OSError: the folder can't be written.
    """
    write_json(run_dir / _REQUEST, {"reason": reason})


def withdraw_request(run_dir: Path) -> None:
    """Forget a request, one that was followed or one of a former start."""
    (run_dir / _REQUEST).unlink(missing_ok=True)


def requested_stop(run_dir: Path) -> str:
    """Why the ranks of a run folder are asked to leave; empty: they are not."""
    try:
        return str(read_json(run_dir / _REQUEST)["reason"])
    except FileNotFoundError:
        return ""


class StopRequest:
    """What one rank knows of being asked to leave. A context: it listens to SIGTERM inside, in the
    main thread; elsewhere that signal is the starter's.

    Args:
        run_dir: where a request may appear, looked at once a second; None on ranks that need not
            look.
        budget_seconds: from the request until this process ends, saved or not; 0: no limit.
        notice: of the starter: why to leave, or an empty text. Asked at each step.
    """

    def __init__(
        self, run_dir: Path | None, budget_seconds: float, notice: Callable[[], str] = lambda: ""
    ) -> None:
        self._run_dir = run_dir
        self._budget = budget_seconds
        self._notice = notice
        self._reason = ""
        self._looked = 0.0
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
        """Why this rank was asked to leave; empty: it was not."""
        if not self._reason:
            self._set(self._notice())
        if not self._reason and self._run_dir is not None:
            now = time.monotonic()
            if now - self._looked >= _LOOK_EVERY_SECONDS:
                self._looked = now
                self._set(requested_stop(self._run_dir))
        return self._reason

    def start_budget(self) -> None:
        """From here on the process has the budget's seconds; the first call counts."""
        if self._timer is None and self._budget:
            self._timer = threading.Timer(self._budget, self._end)
            self._timer.daemon = True
            self._timer.start()

    def _set(self, reason: str) -> None:
        if reason:
            log.warning("%s: saving after this step", reason)
            self._reason = reason
            self.start_budget()

    def _on_sigterm(self, _signal: int, _frame: FrameType | None) -> None:
        self._set("SIGTERM")

    def _end(self) -> None:
        log.error(
            "ALARM: asked to leave, and not saved within checkpoint.grace_seconds = %g; "
            "this process ends, and the run goes on from the checkpoint before",
            self._budget,
        )
        os._exit(START_AGAIN_EXIT_CODE)
