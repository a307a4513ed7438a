"""One `cavmae train` as a child process, for commands that run many of them."""

import ctypes
import signal
import subprocess
import sys
import time
from pathlib import Path

from cavmae.trainer.run_status import read_status

_PR_SET_PDEATHSIG = 1


class Driver:
    """A driver that saves and stops when its parent ends, however that ends.

    Args:
        words: arguments of `cavmae train`.
        log: file to which its output is appended.
        folder: its working directory; None: the parent's.
    """

    def __init__(self, words: list[str], log: Path, folder: Path | None = None) -> None:
        self._log = log
        self._began = time.time()
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "cavmae.cluster.train", *words],
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=folder,
                preexec_fn=_stop_with_parent,
            )

    @property
    def exit_code(self) -> int | None:
        """Return the exit code; None while it runs."""
        return self._process.poll()

    def failure(self, run_dir: Path) -> str:
        """Return why the driver failed, in a line, as far as the run's status has it."""
        status = read_status(run_dir)
        written = status and status.state == "failed" and status.updated_at >= self._began
        error = status.last_error if status and written else "its status has no error"
        return f"{run_dir.name} failed with {self.exit_code}: {error} ({self._log})"

    def request_stop(self) -> None:
        """Have the ranks save a checkpoint and stop."""
        self._process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        """Wait for the end and return the exit code."""
        return self._process.wait()


def _stop_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
