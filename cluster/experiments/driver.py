"""One `cavmae train` as a process of its own, for those who run many of them."""

import ctypes
import signal
import subprocess
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1


class Driver:
    """A driver that saves and leaves when its parent ends, however that ends.

    Args:
        words: after `cavmae train`.
        log: what it says is added here.
        folder: where relative paths of the words start; None: where its parent stands.
    """

    def __init__(self, words: list[str], log: Path, folder: Path | None = None) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "cavmae.cluster.train", *words],
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=folder,
                preexec_fn=_leave_with_parent,
            )

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def ask_to_leave(self) -> None:
        """Have the ranks save and leave."""
        self._process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        """Wait for the end; returns the exit code."""
        return self._process.wait()


def _leave_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
