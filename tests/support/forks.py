"""Ranks as forks of one process that has imported torch, DeepSpeed and MLflow.

Nine tenths of a rank of a tiny run are imports, which would be the same each time. What a user's
start is, from the first line of the interpreter on, is for `test_launchers.py` and the tests of
Ray.
"""

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import TextIO

import torch

PRELOADED = "preloaded"
"""The module, beside this one, that the server imports before its first fork."""


class Fork:
    """A program in a fork: what a test needs of `subprocess.Popen`."""

    def __init__(
        self,
        program: str,
        arguments: list[str],
        folder: Path,
        environment: dict[str, str],
        log: Path,
    ) -> None:
        _ensure_server()
        self._process = ForkServerProcess(
            target=_become, args=(program, arguments, str(folder), environment, str(log))
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid
        atexit.register(self.kill)  # or `multiprocessing` waits for what a failed test left

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if (code := self._process.exitcode) is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
        return code

    def send_signal(self, number: signal.Signals) -> None:
        if self._process.exitcode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start_program(
    program: str, arguments: list[str], folder: Path, environment: dict[str, str], log: Path
) -> "Fork | subprocess.Popen[bytes]":
    """Start `program`, a module or a script, in `folder`; what it says is added to `log`."""
    if not torch.cuda.is_available():
        return Fork(program, arguments, folder, environment, log)
    # A process that has asked for its GPUs can't use them after a fork.
    words = [program] if program.endswith(".py") else ["-m", program]
    with log.open("a") as file:
        return subprocess.Popen(
            [sys.executable, *words, *arguments],
            cwd=folder,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
        )


class ForkingSubprocess:
    """Stands for `subprocess` in `cavmae.benchmarks.harness.processes`: modules start as forks."""

    STDOUT, TimeoutExpired = subprocess.STDOUT, subprocess.TimeoutExpired

    @staticmethod
    def Popen(
        command: list[str], *, stdout: TextIO, stderr: int, env: dict[str, str]
    ) -> "Fork | subprocess.Popen[bytes]":
        python, dash_m, module, *words = command
        assert (python, dash_m, stderr) == (sys.executable, "-m", subprocess.STDOUT)
        return start_program(module, words, Path.cwd(), env, Path(stdout.name))


def _ensure_server() -> None:
    """The server of this process, which ends with it."""
    multiprocessing.set_forkserver_preload([PRELOADED])
    before = dict(os.environ)
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parents[1])])
    # One thread, so that there is none in the server that a fork would not have.
    os.environ |= {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def _become(
    program: str, arguments: list[str], folder: str, environment: dict[str, str], log: str
) -> None:
    """In the fork."""
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    assert PRELOADED in sys.modules, "the server could not import what it is for"
    os.environ.clear()
    os.environ.update(environment | sys.modules[PRELOADED].SET)
    tempfile.tempdir = None
    os.chdir(folder)
    for place in environment.get("PYTHONPATH", "").split(os.pathsep):
        if (custom := Path(place, "sitecustomize.py")).is_file():  # as an interpreter does
            runpy.run_path(str(custom))
    sys.argv = [program, *arguments]
    try:
        if program.endswith(".py"):
            sys.path.insert(0, str(Path(program).parent))
            runpy.run_path(program, run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # which `multiprocessing` leaves out
