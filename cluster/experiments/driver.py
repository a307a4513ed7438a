"""One `cavmae train` as a child process, for commands that run many of them."""

import ctypes
import signal
import subprocess
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1


class Driver:
    """A driver that saves and stops when its parent ends, however that ends.

    Args:
        words: arguments of `cavmae train`.
        log: file to which its output is appended.
        folder: its working directory; None: the parent's.
    """

    def __init__(self, words: list[str], log: Path, folder: Path | None = None) -> None:
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
        """Exit code; None while it runs."""
        return self._process.poll()

    def request_stop(self) -> None:
        """Have the ranks save and stop."""
        self._process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        """Wait for the end; return the exit code."""
        return self._process.wait()


def _stop_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
