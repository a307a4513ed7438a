"""What a pod does before Kubernetes ends it: `python -m cavmae.cluster.local.drain SECONDS`.

Drivers of runs in this pod get SIGTERM, so that their ranks save and stop. Where ranks are in this
pod, its node is drained: Ray tells all ranks of their run, which save and are started again without
this node. It returns when neither is left, or after the time that the pod has.
"""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

_POLL_SECONDS = 0.5
_DRAIN_SECONDS = 20.0
"""Limit of the request to Ray's head, which may be gone."""


def main(arguments: list[str]) -> int:
    """Run the command; returns its exit code."""
    seconds = float(arguments[0])
    deadline = time.monotonic() + seconds
    for driver in drivers():
        with suppress(ProcessLookupError):  # it has just ended
            os.kill(driver, signal.SIGTERM)
    if ranks():
        reason = ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=the pod is ended"]
        command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", *reason]
        with suppress(subprocess.TimeoutExpired):
            subprocess.run(
                [*command, f"--deadline-remaining-seconds={seconds:.0f}"], timeout=_DRAIN_SECONDS
            )
    while (drivers() or ranks()) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    return 0


def drivers() -> list[int]:
    """Return the process ids of `cavmae train` that are seen here."""
    return [pid for pid, words in _processes() if is_driver(words)]


def ranks() -> list[int]:
    """Return the process ids of the ranks that are seen here."""
    return [pid for pid, words in _processes() if words[0].startswith("ray::RayTrainWorker")]


def is_driver(words: list[str]) -> bool:
    """Return whether a command line is one of `cavmae train`, not of a shell that runs it."""
    if not Path(words[0]).name.startswith("python"):
        return False
    program = [Path(word).name for word in words[1:3]]
    return ["cavmae", "train"] in (program, words[2:4]) or program == ["-m", "cavmae.cluster.train"]


def _processes() -> list[tuple[int, list[str]]]:
    return [
        (one.pid, one.info["cmdline"])
        for one in psutil.process_iter(["cmdline"])
        if one.info["cmdline"]
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
