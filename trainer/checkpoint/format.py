"""Checkpoints of a run: what one is, and whether it is whole.

A checkpoint is a folder `step-N` with the files of all ranks and a manifest of their sizes and
checksums. The manifest is written last and removed first, in one piece: a checkpoint exists exactly
when its manifest does, on a disk and at an object store alike. On a disk the renaming of a finished
folder would give the same, but stores have none: so there is one way, which both can go.
"""

import json
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

from cavmae.trainer.checkpoint.store import FileSum, LocalStore, Store, open_store
from cavmae.trainer.config.configs import RunConfig

SCHEMA = 1
MANIFEST = "manifest.json"
RUN_STATE = "run_state.json"

_NAME = re.compile(r"step-\d{9,}")


@dataclass(frozen=True)
class RunState:
    """Everything but tensors that a run needs to go on.

    Attributes:
        step: optimizer steps done.
        position: next position of the sample plan.
        quarantine: sample id and reason of each unreadable sample found so far.
        train_set: fingerprint of the training set.
        world_size, zero_stage, dtype: the layout that wrote the tensors.
        schema: version of this record.
    """

    step: int
    position: int
    quarantine: tuple[tuple[str, str], ...]
    train_set: str
    world_size: int
    zero_stage: int
    dtype: str
    schema: int = SCHEMA


def checkpoint_folder(config: RunConfig) -> str:
    """Folder or URL of a run's checkpoints."""
    return config.checkpoint.folder or str(Path(config.run_dir) / "checkpoints")


def checkpoint_name(step: int) -> str:
    """Name of the checkpoint of a step."""
    return f"step-{step:09d}"


def step_of(name: str) -> int:
    """Optimizer steps that had been done."""
    return int(name.removeprefix("step-"))


def checkpoints(store: Store) -> list[str]:
    """Names of the checkpoints that are there, oldest first.

    Raises:
        OSError: the store could not be read.
    """
    return [name for name in step_folders(store) if store.size(f"{name}/{MANIFEST}") is not None]


def step_folders(store: Store) -> list[str]:
    """Names of the checkpoints, and of what is left of torn ones, oldest first; raises alike."""
    return sorted(filter(_NAME.fullmatch, store.folders()), key=step_of)


def remove_checkpoint(store: Store, name: str) -> None:
    """Remove a checkpoint so that what a half-done removal leaves is none.

    Raises:
        OSError: it could not be removed.
    """
    store.remove_file(f"{name}/{MANIFEST}")
    store.remove_folder(name)


def manifest_bytes(files: dict[str, FileSum]) -> bytes:
    """The manifest of a checkpoint's files."""
    entries = {name: {"bytes": one.bytes, "crc32": one.crc32} for name, one in files.items()}
    return json.dumps({"schema": SCHEMA, "files": entries}, indent=1).encode()


def read_manifest(store: Store, name: str) -> dict[str, FileSum] | str:
    """The files of a checkpoint, or what is wrong with the manifest or their sizes.

    Raises:
        OSError: the store could not be read.
    """
    try:
        document = json.loads(store.read(f"{name}/{MANIFEST}"))
        files = {
            file: FileSum(int(entry["bytes"]), int(entry["crc32"]))
            for file, entry in document["files"].items()
        }
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST}: {type(error).__name__}: {error}"
    found = store.files(name)
    for file, expected in files.items():
        if file not in found:
            return f"{file} is missing"
        if found[file] != expected.bytes:
            return f"{file} has {found[file]} bytes of {expected.bytes}"
    return files


def file_problem(
    store: Store, name: str, expected: FileSum, copy_to: Path | None = None
) -> str | None:
    """What is wrong with a file's content; None where it is as it was written.

    Args:
        store: where it is.
        name: in the store.
        expected: what it should be.
        copy_to: where to write it on the way, if anywhere.

    Raises:
        OSError: it could not be read, or the copy could not be written.
    """
    crc32 = 0
    if copy_to is None:
        for block in store.blocks(name, expected.bytes):
            crc32 = zlib.crc32(block, crc32)
    else:
        copy_to.parent.mkdir(parents=True, exist_ok=True)
        with open(copy_to, "wb") as copy:
            for block in store.blocks(name, expected.bytes):
                crc32 = zlib.crc32(block, crc32)
                copy.write(block)
    return None if crc32 == expected.crc32 else f"{name} has changed since it was written"


def read_run_state(store: Store, name: str) -> RunState:
    """The run state of a checkpoint that is whole.

    Raises:
        ValueError: it is of another schema.
        OSError: it could not be read.
    """
    fields = json.loads(store.read(f"{name}/{RUN_STATE}"))
    if fields["schema"] != SCHEMA:
        raise ValueError(
            f"checkpoint {store.place(name)} has schema {fields['schema']}, this version reads "
            f"{SCHEMA}; use the version of cavmae that wrote it"
        )
    fields["quarantine"] = tuple((sample, reason) for sample, reason in fields["quarantine"])
    return RunState(**fields)


def checkpoint_problem(store: Store, name: str) -> str | None:
    """What is wrong with a checkpoint, all its files read; None where all is as written.

    Raises:
        OSError: the store could not be read.
    """
    files = read_manifest(store, name)
    if isinstance(files, str):
        return files
    problems = (file_problem(store, f"{name}/{file}", one) for file, one in files.items())
    return next(filter(None, problems), None)


def check_not_left_behind(now: Store, before: str, run_dir: Path) -> None:
    """A run whose checkpoints are elsewhere must not go back, or begin anew, in silence.

    Args:
        now: where this start has its checkpoints.
        before: folder or URL where the start before had them.
        run_dir: the run folder, for the error.

    Raises:
        ValueError: `before` has a newer one, or cannot be looked at while `now` has none.
    """
    here = checkpoints(now)
    there, unseen = [], ""
    try:
        store = open_store(before)
        there = checkpoints(store)
        if isinstance(store, LocalStore) and not store.folder.is_dir():
            unseen = " (a folder that is not there)"
    except (OSError, ValueError) as error:
        unseen = f" ({error})"
    last_here, last_there = (step_of(found[-1]) if found else 0 for found in (here, there))
    if last_there > last_here or (unseen and not here):
        raise ValueError(
            f"the checkpoints of {run_dir} were written to {before}{unseen}"
            f"{f', the newest at step {last_there}' if there else ''}, and checkpoint.folder is "
            f"now {now.place()}, {f'up to step {last_here}' if here else 'which has none'}; copy "
            "them there, or give the former"
        )
