"""Writing of checkpoints while training goes on: whole or absent, and never at the run's expense.

Each rank copies its part of the state to host memory and writes the copy in a thread, where it
reads back what it wrote. Once no rank is writing any more, all of them meet for a moment, and the
first writes a manifest of every file's size and checksum: with it the checkpoint is there, and only
then do old ones go. A full disk, or a store that is down, costs the checkpoint and not the run.
"""

import json
import logging
import threading
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from cavmae.trainer.checkpoint.format import (
    MANIFEST,
    RUN_STATE,
    RunState,
    checkpoint_name,
    checkpoints,
    file_problem,
    manifest_bytes,
    remove_checkpoint,
    step_folders,
    step_of,
)
from cavmae.trainer.checkpoint.store import FileSum, Store
from cavmae.trainer.config.configs import CheckpointConfig
from cavmae.trainer.distributed.collectives import on_all_ranks, on_first_rank
from cavmae.trainer.distributed.engine import Engine

log = logging.getLogger(__name__)

# What a disk, a mount, a quota or a store answers; torch.save turns some of it into RuntimeError.
_WRITE_ERRORS = (OSError, RuntimeError)


@dataclass(frozen=True)
class _Part:
    """What one rank wrote, by file name, or why it could not."""

    files: dict[str, FileSum] = field(default_factory=dict)
    problem: str = ""


_UNWRITTEN = _Part(problem="its thread died")


class CheckpointWriter:
    """Writes the checkpoints of one run, one at a time. All ranks build it and call it alike.

    Args:
        store: where to, reached by all ranks.
        config: which ones are kept.
        engine: whose state is written.
        state_at: everything else to write at a step; all ranks call it.
        start_step: what this start went on from; what is there of later steps is not whole.

    Attributes:
        failures: checkpoints that could not be written; the same on all ranks.

    Raises:
        OSError: the store could not be read.
    """

    def __init__(
        self,
        store: Store,
        config: CheckpointConfig,
        engine: Engine,
        state_at: Callable[[int], RunState],
        start_step: int,
    ) -> None:
        self._store = store
        self._config = config
        self._engine = engine
        self._state_at = state_at
        self._state: RunState | None = None
        self._part = _UNWRITTEN
        self._thread: threading.Thread | None = None
        self.failures = 0
        # On the first rank: whole checkpoints, oldest first, and what is still to be removed.
        self._kept: list[str] = []
        self._obsolete: list[str] = []
        on_first_rank(partial(self._look_around, start_step))

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
                "less often, or to a faster place",
                step,
            )
            self.commit()
        self._state = self._state_at(step)
        self._part = _UNWRITTEN
        files = self._engine.snapshot()
        self._thread = threading.Thread(
            target=self._write, args=(checkpoint_name(step), files), name="checkpoint"
        )
        try:
            self._thread.start()
        except RuntimeError as error:  # a limit on threads: raised here, the others would wait
            self._part = _Part(problem=str(error))

    def commit(self) -> bool:
        """Make the checkpoint that was begun appear, waiting for it where it is being written.

        Returns:
            Whether it is there, the same on all ranks. If not, the log has the reason.
        """
        assert self._state is not None and self._thread is not None
        if self.writing:
            self._thread.join()
        parts = on_all_ranks(lambda: self._part)
        problems = [f"rank {n}: {part.problem}" for n, part in enumerate(parts) if part.problem]
        state = self._state
        problem = on_first_rank(lambda: "; ".join(problems) or self._publish(state, parts))
        self._state = self._thread = None
        self.failures += bool(problem)
        if dist.get_rank() == 0:
            if problem:
                log.error(
                    "ALARM: the checkpoint of step %d could not be written (%s); training goes on, "
                    "and it is tried again",
                    state.step,
                    problem,
                )
            self._make_room(checkpoint_name(state.step), published=not problem)
        return not problem

    def _write(self, name: str, files: dict[str, Any]) -> None:
        """In the thread: write this rank's files and read them back."""
        written: dict[str, FileSum] = {}
        try:
            for file, content in files.items():
                path = f"{name}/{file}"
                written[file] = self._store.write(path, partial(torch.save, content))
                size = self._store.size(path)
                if size != written[file].bytes or file_problem(self._store, path, written[file]):
                    place = self._store.place(path)
                    raise OSError(f"{place} reads back as something else than was written")
            self._part = _Part(written)
        except _WRITE_ERRORS as error:
            self._part = _Part(problem=str(error))

    def _publish(self, state: RunState, parts: list[_Part]) -> str:
        """On the first rank: run state and manifest; returns what went wrong."""
        name = checkpoint_name(state.step)
        files = {file: one for part in parts for file, one in part.files.items()}
        run_state = json.dumps(asdict(state)).encode()
        files[RUN_STATE] = FileSum(len(run_state), zlib.crc32(run_state))
        try:
            self._store.put(f"{name}/{RUN_STATE}", run_state)
            self._store.put(f"{name}/{MANIFEST}", manifest_bytes(files))
        except OSError as error:
            return str(error)
        return ""

    def _look_around(self, start_step: int) -> None:
        """On the first rank: note what is whole, remove what is torn or damaged."""
        there = checkpoints(self._store)
        self._kept = [name for name in there if step_of(name) <= start_step]
        self._obsolete = [name for name in step_folders(self._store) if name not in self._kept]
        self._obsolete += [
            name for name in self._store.folders() if name.startswith(".converted-step-")
        ]
        for name in self._obsolete:
            log.info("removing %s, which is not whole", self._store.place(name))
        self._remove_obsolete()

    def _make_room(self, name: str, *, published: bool) -> None:
        """On the first rank: remove what is not to be kept, or what a failure has left."""
        if not published:
            self._obsolete.append(name)
            # A full disk needs its room back at once; a store that is down would hold up the steps.
            if not self._store.far:
                self._remove_obsolete()
            return
        self._kept.append(name)
        # A former start's, of this step, that could not be removed: it was written over.
        self._obsolete = [old for old in self._obsolete if old != name]
        every = self._config.keep_every
        for old in self._kept[: -self._config.keep_last]:
            if not (every and step_of(old) % every == 0):
                self._kept.remove(old)
                self._obsolete.append(old)
        self._remove_obsolete()

    def _remove_obsolete(self) -> None:
        """What cannot be removed stops nothing: it is tried again after the next checkpoint."""
        left = []
        for name in self._obsolete:
            try:
                remove_checkpoint(self._store, name)
            except OSError as error:
                log.warning("%s could not be removed: %s", self._store.place(name), error)
                left.append(name)
        self._obsolete = left
