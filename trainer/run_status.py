"""`status.json` of a run folder: what a run is doing, for the programs and people that watch it.

Programs read it in place of log messages, which are written for people and may change. Rank 0
writes it at each change of state and every 10 s in between, from a thread: the training loop only
sets `StatusWriter.step`. What fails before the ranks begin is written by their launcher, what fails
on another rank by that rank. A status that cannot be written is logged, and training continues.
"""

import dataclasses
import json
import logging
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cavmae.atomic_write import read_json, write_json

log = logging.getLogger(__name__)

SCHEMA = 1
HEARTBEAT_SECONDS = 10.0
SILENT_AFTER_SECONDS = 60.0
"""A rank that has not updated its status for so long shows no sign of life."""
LINE_PREFIX = "CAVMAE_STATUS "
"""Begins a line of a driver's output that holds a status as JSON: an interface, not a message."""
_FLUSH_SECONDS = 30.0
_FILE = "status.json"

State = Literal[
    "waiting",  # for resources
    "starting",
    "running",
    "stopping",  # saves a checkpoint before it stops
    "stopped",  # rerun the same command to resume
    "restarting",  # the launcher starts the ranks again
    "finished",
    "failed",
]


@dataclass(frozen=True)
class RunStatus:
    """What a run is doing, as of its newest attempt.

    Attributes:
        state: see `State`.
        step: optimizer steps done.
        steps: optimizer steps of the whole run; 0 until they are known.
        reason: why it waits, stops, stopped or restarts.
        resumed_from: path or URL of the checkpoint that this attempt resumed from; empty if none.
        attempt: how often ranks have been launched, restarts by Ray included; 1 is the first.
        last_error: newest failure of any attempt, in a line; empty if none failed.
        error_type: class of that error, such as `OutOfMemory`.
        last_step_at: Unix seconds at which `step` was first seen; 0 before the first step.
        updated_at: Unix seconds.
        schema: version of this format.
    """

    state: State
    step: int = 0
    steps: int = 0
    reason: str = ""
    resumed_from: str = ""
    attempt: int = 0
    last_error: str = ""
    error_type: str = ""
    last_step_at: float = 0.0
    updated_at: float = 0.0
    schema: int = SCHEMA

    @property
    def active(self) -> bool:
        """Whether ranks are at work, as far as they wrote, and send a sign of life every 10 s."""
        return self.state in ("starting", "running", "stopping")

    @property
    def silent_seconds(self) -> float:
        """Seconds without a sign of life from an active run; 0 while there are signs."""
        seconds = time.time() - self.updated_at
        return seconds if self.active and seconds > SILENT_AFTER_SECONDS else 0.0

    @property
    def alive(self) -> bool:
        """Whether ranks are at work and have shown a sign of life lately."""
        return self.active and not self.silent_seconds

    def describe(self) -> str:
        """State and reason for people."""
        if self.silent_seconds:
            return f"no sign of life for {self.silent_seconds:.0f} s ({self.state})"
        if self.state == "running" and self.last_step_at:
            return f"running, last step {max(0.0, time.time() - self.last_step_at):.0f} s ago"
        detail = self.last_error if self.state == "failed" else self.reason
        return f"{self.state}: {detail}" if detail else self.state

    def progress(self) -> str:
        """Steps done, of all steps where they are known."""
        return f"{self.step}/{self.steps}" if self.steps else str(self.step)

    def line(self) -> str:
        """The status as one line of a driver's output; `last_line` reads it."""
        return LINE_PREFIX + json.dumps(dataclasses.asdict(self))


def read_status(run_dir: Path) -> RunStatus | None:
    """Read a run folder's status; None where no attempt has written one.

    Raises:
        OSError: it can't be read.
        ValueError: it is no status, or one of another schema.
    """
    path = run_dir / _FILE
    try:
        document = read_json(path)
    except FileNotFoundError:
        return None
    try:
        return _parsed(document)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def last_line(text: str) -> RunStatus | None:
    """Return the newest status among the lines of a driver's output; None where it has none."""
    for line in reversed(text.splitlines()):
        if LINE_PREFIX in line:
            try:
                return _parsed(json.loads(line.partition(LINE_PREFIX)[2]))
            except ValueError:  # cut off, or another process wrote into the same line
                continue
    return None


def write_status(run_dir: Path, **changes: Any) -> None:
    """Change fields of a run's status from outside its ranks; a failure to write is only logged."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        _write(run_dir, dataclasses.replace(_known(run_dir) or RunStatus("waiting"), **changes))
    except OSError as error:
        log.warning("%s could not be written: %s", run_dir / _FILE, error)


def error_fields(error: BaseException, prefix: str = "") -> dict[str, str]:
    """Return the fields of a status that name an error: its first line and its class."""
    name = type(error).__name__
    lines = str(error).strip().splitlines()
    return {"last_error": prefix + (lines[0] if lines else name), "error_type": name}


class LauncherStatus:
    """What a launcher writes of a run whose ranks it starts. A context: an exception that leaves it
    is the run's failure, unless a rank has already written its own.

    Nothing is written over the status of another launcher's ranks that are alive.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        before = _known(run_dir)
        self._attempt = before.attempt if before else 0

    def change(self, state: State, **fields: str) -> None:
        """Write a state of the run."""
        now = _known(self._run_dir)
        if now is None or now.attempt > self._attempt or not now.alive:
            write_status(self._run_dir, state=state, **fields)

    def __enter__(self) -> "LauncherStatus":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None:
            return
        now = _known(self._run_dir)
        if now is None or now.state != "failed" or now.attempt == self._attempt:
            self.change("failed", **error_fields(error))


class StatusWriter:
    """The status of an attempt, as its ranks write it. A context: an exception that leaves it is
    the run's failure.

    Rank 0 takes the file over from the attempt before, at once where that one shows no sign of
    life, else when the run folder was accepted (`opened`): a command that is refused leaves the
    status of a run that trains alone. From the moment that another process writes the file (a
    rank that failed, a launcher), rank 0 leaves it to that one.

    Args:
        run_dir: run folder; made if it does not exist.
        rank: of this process. Ranks above 0 write nothing but their failure.

    Attributes:
        step: optimizer steps done, which the training loop sets.
    """

    def __init__(self, run_dir: Path, rank: int) -> None:
        self.step = 0
        self._run_dir = run_dir
        self._rank = rank
        self._status = RunStatus("starting")
        self._written: RunStatus | None = None
        self._owns = False
        self._failing = False
        self._step_seen, self._last_step_at = 0, 0.0
        self._wake = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._keep_writing, name="status", daemon=True)

    def __enter__(self) -> "StatusWriter":
        self._began = time.time()
        if self._rank == 0:
            before = _known(self._run_dir) or RunStatus("waiting")
            self.step = self._step_seen = before.step
            self._status = dataclasses.replace(
                before, state="starting", reason="", resumed_from="", attempt=before.attempt + 1
            )
            self._owns = not before.alive
            self._thread.start()
            self._wake.set()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None:
            self._fail(error)
        self._closed = True
        self._wake.set()
        if self._rank == 0:
            self._thread.join(_FLUSH_SECONDS)

    @property
    def attempt(self) -> int:
        """The number of this attempt in the status, on rank 0."""
        return self._status.attempt

    def opened(self, steps: int, attempt: int) -> None:
        """Note that the run folder is this attempt's.

        Args:
            steps: of the run.
            attempt: rank 0's.
        """
        self._owns, self._written = True, None
        self.change("starting", steps=steps, attempt=attempt)

    def running(self, step: int, resumed_from: str) -> None:
        """Note that the training loop begins.

        Args:
            step: optimizer steps done before.
            resumed_from: checkpoint that it resumes from; empty if none.
        """
        self.step = self._step_seen = step
        self._last_step_at = 0.0
        self.change("running", resumed_from=resumed_from)

    def change(self, state: State, **fields: Any) -> None:
        """Have the thread write another state, and other values of fields with it."""
        self._status = dataclasses.replace(self._status, state=state, **fields)
        self._wake.set()

    def _fail(self, error: BaseException) -> None:
        """Have the failure written, unless another rank, or the launcher, has written one."""
        if not self._owns:
            return
        if self._rank == 0:
            self.change("failed", **error_fields(error))
            return
        now = _known(self._run_dir)
        if now and now.attempt > self.attempt:  # it is the run's by now
            return
        if now is None or now.state != "failed" or now.updated_at < self._began:
            prefix = f"rank {self._rank}: "
            write_status(self._run_dir, state="failed", **error_fields(error, prefix))

    def _keep_writing(self) -> None:
        """Write in the thread: at once after each change, otherwise every 10 s, and at the end."""
        while True:
            closed = self._closed  # before what is written
            if self._owns:
                self._update()
            if closed:
                return
            self._wake.wait(HEARTBEAT_SECONDS)
            self._wake.clear()

    def _update(self) -> None:
        step = self.step
        if step != self._step_seen:
            self._step_seen, self._last_step_at = step, time.time()
        status = dataclasses.replace(self._status, step=step, last_step_at=self._last_step_at)
        try:
            self._run_dir.mkdir(parents=True, exist_ok=True)
            if self._written is not None and self._taken_over():
                self._owns = False
                return
            self._written = _write(self._run_dir, status)
        except OSError as error:
            if not self._failing:
                log.warning("%s could not be written: %s", self._run_dir / _FILE, error)
            self._failing = True
        else:
            self._failing = False

    def _taken_over(self) -> bool:
        """Whether another process has written the file since this one did."""
        try:
            return read_status(self._run_dir) not in (None, self._written)
        except ValueError:
            return False


def _parsed(document: Any) -> RunStatus:
    """Build a status from JSON.

    Raises:
        ValueError: it is none, or of another schema.
    """
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise ValueError(f"no status of schema {SCHEMA}; read it with the version that wrote it")
    try:
        return RunStatus(**document)
    except TypeError as error:  # names a method of ours
        raise ValueError(f"its fields are not those of a status of schema {SCHEMA}") from error


def _known(run_dir: Path) -> RunStatus | None:
    """Return the run's status; None where there is none that this version can read."""
    try:
        return read_status(run_dir)
    except (OSError, ValueError) as error:
        log.warning("%s", error)
        return None


def _write(run_dir: Path, status: RunStatus) -> RunStatus:
    """Write a status; returns it with the time.

    Raises:
        OSError: it can't be written.
    """
    status = dataclasses.replace(status, updated_at=time.time())
    write_json(run_dir / _FILE, dataclasses.asdict(status))
    return status
