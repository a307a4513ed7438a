"""Writing of checkpoints while training goes on: whole or absent, and never at the run's expense.

Each rank copies its part of the state to host memory and writes the copy in a thread, to a hidden
folder, where it reads back what it wrote. Once no rank is writing any more, all of them meet for a
moment: the first lists every file's size and checksum in a manifest, and one rename makes the
checkpoint appear; only then do old ones go. A disk that is full costs the checkpoint, not the run.
"""

import json
import logging
import os
import shutil
import threading
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist

from cavmae.trainer.checkpoint import (
    MANIFEST,
    SCHEMA,
    RunState,
    checkpoints,
    checksum,
    step_of,
)
from cavmae.trainer.config import CheckpointConfig
from cavmae.trainer.engine import Engine

log = logging.getLogger(__name__)

# What a disk, a mount or a quota answers; torch.save turns some of it into RuntimeError.
_WRITE_ERRORS = (OSError, RuntimeError)


@dataclass(frozen=True)
class _Part:
    """What one rank wrote: size and checksum by file name, or why it could not."""

    files: dict[str, dict[str, int]]
    problem: str = ""


_UNWRITTEN = _Part({}, "its thread died")


class CheckpointWriter:
    """Writes the checkpoints of one run, one at a time. All ranks build it and call it alike.

    Args:
        run_dir: run folder, on storage that all ranks reach.
        config: which ones are kept.
        engine: whose state is written.
        state_at: everything else to write at a step; all ranks call it.

    Attributes:
        failures: checkpoints that could not be written; the same on all ranks.
    """

    def __init__(
        self,
        run_dir: Path,
        config: CheckpointConfig,
        engine: Engine,
        state_at: Callable[[int], RunState],
    ) -> None:
        self._folder = run_dir / "checkpoints"
        self._config = config
        self._engine = engine
        self._state_at = state_at
        self._state: RunState | None = None
        self._part = _UNWRITTEN
        self._thread: threading.Thread | None = None
        self.failures = 0
        if dist.get_rank() == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            for torn in self._folder.glob(".writing-*"):  # of a start that was killed meanwhile
                shutil.rmtree(torn, ignore_errors=True)

    @property
    def open(self) -> bool:
        """Whether a checkpoint was begun and not yet committed; the same on all ranks."""
        return self._state is not None

    @property
    def writing(self) -> bool:
        """Whether this rank's thread is still at it."""
        return self._thread is not None and self._thread.is_alive()

    def begin(self, step: int) -> None:
        """Copy the state and begin to write it; one that is still being written ends first."""
        if self.open:
            log.warning(
                "the checkpoint before is still being written at step %d: waiting for it; save "
                "less often, or to a faster disk",
                step,
            )
            self.commit()
        self._state = self._state_at(step)
        self._part = _UNWRITTEN
        files = self._engine.snapshot()
        self._thread = threading.Thread(
            target=self._write, args=(self._writing_folder, files), name="checkpoint"
        )
        self._thread.start()

    def commit(self) -> bool:
        """Make the checkpoint that was begun appear, waiting for it where it is being written.

        Returns:
            Whether it is there, the same on all ranks. If not, the log has the reason.
        """
        assert self._state is not None and self._thread is not None
        self._thread.join()
        parts = [_UNWRITTEN] * dist.get_world_size()
        dist.all_gather_object(parts, self._part)
        outcome = [""]
        if dist.get_rank() == 0:
            problems = [f"rank {n}: {part.problem}" for n, part in enumerate(parts) if part.problem]
            outcome = ["; ".join(problems) or self._publish(self._state, parts)]
            if outcome[0]:
                shutil.rmtree(self._writing_folder, ignore_errors=True)
                log.error(
                    "ALARM: the checkpoint of step %d could not be written (%s); training goes on, "
                    "and it is tried again",
                    self._state.step,
                    outcome[0],
                )
        dist.broadcast_object_list(outcome)
        self._state = self._thread = None
        self.failures += bool(outcome[0])
        return not outcome[0]

    @property
    def _writing_folder(self) -> Path:
        assert self._state is not None
        return self._folder / f".writing-step-{self._state.step:09d}"

    def _write(self, folder: Path, files: dict[str, Any]) -> None:
        """In the thread: write, flush and read back this rank's files."""
        written: dict[str, dict[str, int]] = {}
        try:
            for name, content in files.items():
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                with open(path, "wb") as file:
                    summed = _SummedFile(file)
                    torch.save(content, summed)
                    file.flush()
                    os.fsync(file.fileno())
                if checksum(path) != summed.crc32:
                    raise OSError(f"{path} reads back as something else than was written")
                written[name] = {"bytes": summed.bytes, "crc32": summed.crc32}
            self._part = _Part(written)
        except _WRITE_ERRORS as error:
            self._part = _Part({}, str(error))

    def _publish(self, state: RunState, parts: list[_Part]) -> str:
        """On the first rank: manifest, rename, and old ones removed; returns what went wrong."""
        folder, target = self._writing_folder, self._folder / f"step-{state.step:09d}"
        try:
            run_state = json.dumps(asdict(state)).encode()
            _write_synced(folder / "run_state.json", run_state)
            files = {name: entry for part in parts for name, entry in part.files.items()}
            files["run_state.json"] = {"bytes": len(run_state), "crc32": zlib.crc32(run_state)}
            manifest = json.dumps({"schema": SCHEMA, "files": files}, indent=1)
            _write_synced(folder / MANIFEST, manifest.encode())
            shutil.rmtree(target, ignore_errors=True)
            os.rename(folder, target)
            _sync_folder(self._folder)
            every = self._config.keep_every
            for old in checkpoints(self._folder.parent)[: -self._config.keep_last]:
                if not (every and step_of(old) % every == 0):
                    shutil.rmtree(old)
        except OSError as error:
            return str(error)
        return ""


class _SummedFile:
    """A file to write to, whose size and checksum are known without reading it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.bytes = self.crc32 = 0

    def write(self, data: Any) -> int:
        self.crc32 = zlib.crc32(data, self.crc32)
        self.bytes += len(memoryview(data).cast("B"))
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def _write_synced(path: Path, data: bytes) -> None:
    """Write a file that is on the disk when this returns."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
