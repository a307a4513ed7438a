"""Families of processes that a benchmark starts, watches and ends: its own, by their numbers.

Nothing here looks for a process by its name: other people run Ray on the same machine.
"""

import os
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

import cavmae

PATIENCE_SECONDS = 300.0
"""After this, what is waited for won't happen."""
_POLL_SECONDS = 0.02


def module_command(module: str, *words: str) -> list[str]:
    """The command that runs a module of this tree, or of an installed package, in this Python."""
    return [sys.executable, "-m", module, *words]


def deepspeed_command(
    module: str, *words: str, ranks: int, gpus: bool
) -> tuple[list[str], dict[str, str]]:
    """The command that runs a module as ranks of this machine, by the `deepspeed` launcher.

    Args:
        module, words: what each rank runs.
        ranks: how many.
        gpus: each has one; otherwise they share the CPU.

    Returns:
        The command, and variables to add to its environment.
    """
    programs = sysconfig.get_path("scripts")
    command = [
        *(str(Path(programs) / "deepspeed"), "--num_gpus" if gpus else "--num_accelerators"),
        # Ranks are told their place by their environment alone.
        *(str(ranks), "--master_port", str(free_port()), "--no_local_rank"),
        *("--module", module, *words),
    ]
    environment = {"PATH": os.pathsep.join([programs, os.environ["PATH"]])}
    return command, environment if gpus else environment | {"DS_ACCELERATOR": "cpu"}


def tree_environment() -> dict[str, str]:
    """Variables with which a process imports this tree, whatever is installed."""
    return {"PYTHONPATH": str(Path(cavmae.__file__).resolve().parents[1])}


def free_port() -> int:
    """A TCP port of loopback that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answers(port: int) -> bool:
    """Whether somebody listens on a port of loopback."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def unwind_on_sigterm() -> None:
    """Have SIGTERM end this process as an error does, so that it ends what it has started."""
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))


def end_family(roots: list[psutil.Process]) -> None:
    """SIGKILL to processes and all that descend from them, as a power cut does.

    Args:
        roots: those that have ended are passed over, even if others have their numbers now.
    """
    family = [*roots, *(child for one in roots for child in descendants(one))]
    for process in family:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, timeout=30)


def descendants(process: psutil.Process) -> list[psutil.Process]:
    """All processes below one; none where it has ended, even if another one has its number now."""
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def words_of(process: psutil.Process) -> str:
    """The command line of a process; empty where it has ended."""
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


class BadExit(RuntimeError):
    """A process did not end well. Attributes: code, its exit code; None if it ran for too long."""

    def __init__(self, code: int | None, message: str) -> None:
        super().__init__(message)
        self.code = code


class Start:
    """One start of something: its processes and the one log that they share. Leaving its context
    kills what still runs.

    Args:
        commands: each with variables to add to this process's environment.
        log: written anew.

    Attributes:
        processes: one for each command.
        first: the first of them, which stays itself when its number is given to another.
    """

    def __init__(self, commands: list[tuple[list[str], dict[str, str]]], log: Path) -> None:
        self.log = log
        with log.open("w") as output:
            self.processes = [
                subprocess.Popen(
                    command,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=os.environ | tree_environment() | environment,
                )
                for command, environment in commands
            ]
        self._roots = [psutil.Process(process.pid) for process in self.processes]
        self.first = self._roots[0]

    def __enter__(self) -> "Start":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def text(self) -> str:
        """Return the log so far, for people."""
        return self.log.read_text(errors="replace")

    def ranks(self) -> list[psutil.Process]:
        """Processes of the ranks that Ray has placed on this machine."""
        return self.named("ray::RayTrainWorker")

    def named(self, title: str) -> list[psutil.Process]:
        """Processes of the first command's family whose command line begins with a title."""
        return [one for one in descendants(self.first) if words_of(one).startswith(title)]

    @property
    def ended(self) -> bool:
        """Return whether none of the processes runs any more."""
        return all(process.poll() is not None for process in self.processes)

    def kill(self) -> None:
        """Kill all processes and their descendants."""
        end_family(self._roots)

    def finish(self, within_seconds: float = PATIENCE_SECONDS) -> None:
        """Wait for the end, which must be a success.

        Raises:
            BadExit: a process ended with another code than 0, or not in time; with the end of the
                log.
        """
        for process in self.processes:
            try:
                code = process.wait(timeout=within_seconds)
                problem = f"ended with exit code {code}"
            except subprocess.TimeoutExpired:
                code, problem = None, f"still running after {within_seconds:g} s"
            if code != 0:
                raise BadExit(code, f"{problem}:\n{self.text()[-4000:]}")

    def wait_for(self, happened: Callable[[], Any], what: str) -> Any:
        """Return the first true answer of `happened`.

        Raises:
            RuntimeError: there was none until all processes had ended, or for too long; with the
                end of the log.
        """
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            over = time.monotonic() > deadline or self.ended  # before the last look
            answer = happened()
            if answer:
                return answer
            if over:
                raise RuntimeError(f"{what} did not happen:\n{self.text()[-4000:]}")
            time.sleep(_POLL_SECONDS)
