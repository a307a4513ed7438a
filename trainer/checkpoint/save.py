"""Saving checkpoints while training continues: intact or absent, and never at the run's expense.

Each rank copies its part of the state to host memory and writes the copy in a thread. Once all
ranks have finished writing, they meet for a moment, and the first one writes a manifest of every
file's size and checksum: this commits the checkpoint, and only then are old ones removed. A full
disk, or a store that is down, costs the checkpoint and not the run. Nothing is read back: the page
cache would answer, and loading verifies every file. No two attempts write to the same folder, and
the manifest is written only where there is none: what a rank that was cut off sends late replaces
nothing.
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
    SUSPECT_MANIFEST,
    Manifest,
    RunState,
    attempt_folder,
    checkpoint_name,
    list_folders,
    manifest_bytes,
    remove_checkpoint,
    set_aside,
    step_of,
)
from cavmae.trainer.checkpoint.load import list_on_two_ranks
from cavmae.trainer.checkpoint.store import FileDigest, Store
from cavmae.trainer.config.configs import CheckpointConfig
from cavmae.trainer.distributed.collectives import on_all_ranks, on_first_rank
from cavmae.trainer.distributed.engine import Engine

log = logging.getLogger(__name__)

# A disk, a mount, a quota or a store fails with these; torch.save turns some into RuntimeError.
_WRITE_ERRORS = (OSError, RuntimeError)


@dataclass(frozen=True)
class _Written:
    """The files that one rank wrote, by name, or why it failed."""

    files: dict[str, FileDigest] = field(default_factory=dict)
    error: str = ""


_UNFINISHED = _Written(error="its thread died")


class CheckpointSaver:
    """Saves the checkpoints of one run, one at a time. All ranks build it and call it alike.

    Args:
        store: where they are written, reached by all ranks.
        config: how many are kept.
        engine: whose state is saved.
        state_at: returns the rest of the state at a step; all ranks call it.
        start_step: the step this attempt resumed from; later checkpoints were found damaged. They
            are set aside, and removed once there is an intact one of their step or later.
        attempt: its number, which no other attempt of the run has.
        before_commit: called by the first rank before a checkpoint appears; an OSError costs the
            checkpoint, any other exception ends the run.

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
        attempt: int,
        before_commit: Callable[[], None],
    ) -> None:
        self._store = store
        self._attempt = attempt
        self._before_commit = before_commit
        self._config = config
        self._engine = engine
        self._state_at = state_at
        self._state: RunState | None = None
        self._written = _UNFINISHED
        self._thread: threading.Thread | None = None
        self.failures = 0
        # On the first rank: intact checkpoints, oldest first, and those still to be removed.
        self._kept: list[str] = []
        self._obsolete: list[str] = []
        self._suspect: list[str] = []
        complete = list_on_two_ranks(store)
        on_first_rank(partial(self._clean_up, complete, start_step))

    @property
    def is_open(self) -> bool:
        """Whether a checkpoint has begun and is not committed; the same on all ranks."""
        return self._state is not None

    @property
    def is_writing(self) -> bool:
        """Whether this rank's thread is still writing."""
        return self._thread is not None and self._thread.is_alive()

    def begin(self, step: int) -> None:
        """Copy the state and start writing it, after committing one that is still open."""
        if self.is_open:
            log.warning(
                "the previous checkpoint is still being written at step %d: waiting for it; save "
                "less often, or to faster storage",
                step,
            )
            self.commit()
        self._state = self._state_at(step)
        self._written = _UNFINISHED
        files = self._engine.snapshot()
        self._thread = threading.Thread(
            target=self._write, args=(checkpoint_name(step), files), name="checkpoint"
        )
        try:
            self._thread.start()
        except RuntimeError as error:  # a limit on threads: raised here, the others would wait
            self._written = _Written(error=str(error))

    def commit(self) -> bool:
        """Wait for the ranks to finish writing and make the checkpoint appear.

        Returns:
            Whether it was saved, the same on all ranks. If not, the log has the reason.

        Raises:
            Exception: `before_commit` raised it.
        """
        assert self._state is not None and self._thread is not None
        if self.is_writing:
            self._thread.join()
        state, ranks = self._state, on_all_ranks(lambda: self._written)
        errors = [f"rank {rank}: {one.error}" for rank, one in enumerate(ranks) if one.error]
        error = on_first_rank(lambda: "; ".join(errors) or self._publish(state, ranks))
        self._state = self._thread = None
        self.failures += bool(error)
        if dist.get_rank() == 0:
            if error:
                log.error(
                    "ALARM: the checkpoint of step %d could not be written (%s); training "
                    "continues, and it will be retried",
                    state.step,
                    error,
                )
            self._remove_old(checkpoint_name(state.step), saved=not error)
        return not error

    def _write(self, name: str, files: dict[str, Any]) -> None:
        """Write this rank's files, in the thread."""
        folder = attempt_folder(name, self._attempt)
        try:
            self._written = _Written(
                {
                    file: self._store.write(f"{folder}/{file}", partial(torch.save, content))
                    for file, content in files.items()
                }
            )
        except _WRITE_ERRORS as error:
            self._written = _Written(error=str(error))

    def _publish(self, state: RunState, ranks: list[_Written]) -> str:
        """Write run state and manifest, on the first rank; returns the error, if any."""
        name = checkpoint_name(state.step)
        files = {file: digest for one in ranks for file, digest in one.files.items()}
        run_state = json.dumps(asdict(state)).encode()
        files[RUN_STATE] = FileDigest(len(run_state), zlib.crc32(run_state))
        manifest = manifest_bytes(Manifest(self._attempt, files))
        try:
            self._store.put(f"{attempt_folder(name, self._attempt)}/{RUN_STATE}", run_state)
            self._before_commit()
            if not self._store.put_new(f"{name}/{MANIFEST}", manifest):
                # An attempt before this one was cut off, and late; or this one was, and has to end.
                self._before_commit()
                self._store.put(f"{name}/{MANIFEST}", manifest)
        except OSError as error:
            return str(error)
        return ""

    def _clean_up(self, complete: list[str], start_step: int) -> None:
        """Note the intact checkpoints, remove torn ones and set damaged ones aside, on the first
        rank."""
        self._kept = [name for name in complete if step_of(name) <= start_step]
        for name in complete[len(self._kept) :]:
            set_aside(self._store, name)
            log.warning(
                "%s is damaged: it is kept, with its manifest as %s, until there is a newer one",
                self._store.location(name),
                SUSPECT_MANIFEST,
            )
        others = [name for name in list_folders(self._store) if name not in self._kept]
        self._suspect = [
            name
            for name in others
            if step_of(name) > start_step
            and self._store.size(f"{name}/{SUSPECT_MANIFEST}") is not None
        ]
        self._obsolete = [name for name in others if name not in self._suspect]
        self._obsolete += [
            name for name in self._store.folders() if name.startswith(".converted-step-")
        ]
        for name in self._obsolete:
            log.info("removing %s, which is incomplete", self._store.location(name))
        self._remove_obsolete()

    def _remove_old(self, name: str, *, saved: bool) -> None:
        """Remove checkpoints that are no longer kept, or the rest of a failed one."""
        if not saved:
            own = attempt_folder(name, self._attempt)
            self._obsolete.append(own if name in self._suspect else name)
            # A full disk needs its room back at once; a store that is down would hold up the steps.
            if not self._store.is_remote:
                self._remove_obsolete()
            return
        self._kept.append(name)
        passed = [old for old in self._suspect if step_of(old) <= step_of(name)]
        self._suspect = [old for old in self._suspect if old not in passed]
        self._obsolete += passed
        if name in self._obsolete:  # an earlier one of this step, damaged or not yet removed
            self._obsolete.remove(name)
            self._remove_others(name)
        every = self._config.keep_every
        for old in self._kept[: -self._config.keep_last]:
            if not (every and step_of(old) % every == 0):
                self._kept.remove(old)
                self._obsolete.append(old)
        self._remove_obsolete()

    def _remove_others(self, name: str) -> None:
        """Remove what other attempts have written of a checkpoint; a failure is only logged."""
        try:
            self._store.remove_file(f"{name}/{SUSPECT_MANIFEST}")
            for folder in self._store.folders(name):
                if f"{name}/{folder}" != attempt_folder(name, self._attempt):
                    self._store.remove_folder(f"{name}/{folder}")
        except OSError as error:
            log.warning("a part of %s could not be removed: %s", self._store.location(name), error)

    def _remove_obsolete(self) -> None:
        """Remove what is obsolete; failures are logged and retried after the next checkpoint."""
        remaining = []
        for name in self._obsolete:
            try:
                remove_checkpoint(self._store, name)
            except OSError as error:
                log.warning("%s could not be removed: %s", self._store.location(name), error)
                remaining.append(name)
        self._obsolete = remaining
