"""The format of a run's checkpoints, and how to tell an intact one from a torn one.

A checkpoint is a folder `step-N` with a manifest, and below it a folder `attempt-N` with the files
of all ranks, of which the manifest has sizes and checksums. The manifest is written last and
removed first, in one piece: a checkpoint exists exactly when its manifest does. Renaming a finished
folder would give the same on a disk, but object stores cannot rename; this way works on both. As no
two attempts share a folder, a rank that was cut off and goes on writing harms no other attempt.
"""

import json
import re
import zlib
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cavmae.trainer.checkpoint.store import FileDigest, Store
from cavmae.trainer.config.configs import RunConfig

SCHEMA = 2
MANIFEST = "manifest.json"
SUSPECT_MANIFEST = "manifest.suspect.json"
"""The manifest of a checkpoint that was found damaged: it is not used, and not yet removed."""
RUN_STATE = "run_state.json"

_NAME = re.compile(r"step-\d{9,}")


class CorruptCheckpointError(ValueError):
    """A checkpoint is damaged or incomplete."""


@dataclass(frozen=True)
class RunState:
    """Everything but tensors that a run needs to resume.

    Attributes:
        step: optimizer steps done.
        position: next position of the sample plan.
        quarantine: sample id and reason of each unreadable sample found so far.
        train_set: fingerprint of the training set.
        world_size, zero_stage, dtype: the layout that wrote the tensors.
    """

    step: int
    position: int
    quarantine: tuple[tuple[str, str], ...]
    train_set: str
    world_size: int
    zero_stage: int
    dtype: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint consists of.

    Attributes:
        attempt: number of the attempt that wrote it.
        files: by name in that attempt's folder.
    """

    attempt: int
    files: dict[str, FileDigest]


def checkpoint_folder(config: RunConfig) -> str:
    """Return the folder or URL of a run's checkpoints."""
    return config.checkpoint.folder or str(Path(config.run_dir) / "checkpoints")


def checkpoint_name(step: int) -> str:
    """Return the name of the checkpoint of a step."""
    return f"step-{step:09d}"


def attempt_folder(name: str, attempt: int) -> str:
    """Return the folder of a checkpoint's files that an attempt writes."""
    return f"{name}/attempt-{attempt}"


def step_of(name: str) -> int:
    """Return the step of a checkpoint's name."""
    return int(name.removeprefix("step-"))


def list_checkpoints(store: Store) -> list[str]:
    """List the names of the checkpoints, oldest first; raises OSError."""
    return [name for name in list_folders(store) if store.size(f"{name}/{MANIFEST}") is not None]


def list_folders(store: Store) -> list[str]:
    """List the folders of checkpoints and of torn ones, oldest first; raises OSError."""
    return sorted(filter(_NAME.fullmatch, store.folders()), key=step_of)


def set_aside(store: Store, name: str) -> None:
    """Leave a damaged checkpoint as it is but for its manifest's name, so that nobody takes it.

    Raises:
        OSError: the manifest could not be moved.
    """
    store.put(f"{name}/{SUSPECT_MANIFEST}", store.read(f"{name}/{MANIFEST}"))
    store.remove_file(f"{name}/{MANIFEST}")


def remove_checkpoint(store: Store, name: str) -> None:
    """Remove a checkpoint, its manifest first, so that no part of it is taken for one.

    Raises:
        OSError: it could not be removed.
    """
    store.remove_file(f"{name}/{MANIFEST}")
    store.remove_folder(name)


def manifest_bytes(manifest: Manifest) -> bytes:
    """Serialize a manifest."""
    return json.dumps({"schema": SCHEMA} | asdict(manifest), indent=1).encode()


def read_manifest(store: Store, name: str) -> Manifest:
    """Read the manifest of a checkpoint and compare the sizes of its files.

    Raises:
        CorruptCheckpointError: the manifest is damaged, or a file is missing or cut short.
        ValueError: it has another schema.
        OSError: the store could not be read.
    """
    try:
        document = json.loads(store.read(f"{name}/{MANIFEST}"))
        schema = int(document["schema"])
        manifest = _manifest_in(document) if schema == SCHEMA else None
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptCheckpointError(f"{MANIFEST}: {type(error).__name__}: {error}") from error
    if manifest is None:
        raise ValueError(
            f"checkpoint {store.location(name)} has schema {schema}, this version reads {SCHEMA}; "
            "use the version that wrote it"
        )
    found = store.files(attempt_folder(name, manifest.attempt))
    for file, expected in manifest.files.items():
        if file not in found:
            raise CorruptCheckpointError(f"{file} is missing")
        if found[file] != expected.bytes:
            raise CorruptCheckpointError(f"{file} has {found[file]} bytes of {expected.bytes}")
    return manifest


def _manifest_in(document: dict[str, Any]) -> Manifest:
    files = {
        file: FileDigest(int(entry["bytes"]), int(entry["crc32"]))
        for file, entry in document["files"].items()
    }
    return Manifest(int(document["attempt"]), files)


def verify_file(store: Store, name: str, expected: FileDigest, copy_to: Path | None = None) -> None:
    """Read a file and compare its checksum.

    Args:
        store: where it is.
        name: in the store.
        expected: what was written.
        copy_to: a local path to copy it to on the way.

    Raises:
        CorruptCheckpointError: its content has changed.
        OSError: it could not be read, or the copy could not be written.
    """
    crc32 = 0
    if copy_to:
        copy_to.parent.mkdir(parents=True, exist_ok=True)
    with copy_to.open("wb") if copy_to else nullcontext() as copy:
        for block in store.read_blocks(name, expected.bytes):
            crc32 = zlib.crc32(block, crc32)
            if copy:
                copy.write(block)
    if crc32 != expected.crc32:
        raise CorruptCheckpointError(f"{name} has changed since it was written")


def verify_checkpoint(store: Store, name: str) -> None:
    """Read all files of a checkpoint; raises as `read_manifest` and `verify_file` do."""
    manifest = read_manifest(store, name)
    for file, expected in manifest.files.items():
        verify_file(store, f"{attempt_folder(name, manifest.attempt)}/{file}", expected)


def read_run_state(store: Store, name: str) -> RunState:
    """Read the run state of an intact checkpoint.

    Raises:
        OSError: it could not be read.
        ValueError: it is damaged, or of another schema.
    """
    folder = attempt_folder(name, read_manifest(store, name).attempt)
    fields = json.loads(store.read(f"{folder}/{RUN_STATE}"))
    fields["quarantine"] = tuple((sample, reason) for sample, reason in fields["quarantine"])
    return RunState(**fields)


def check_not_left_behind(store: Store, previous: str, run_dir: Path) -> None:
    """Refuse to resume from older checkpoints, or to start over, after checkpoint.folder changed.

    Args:
        store: where this attempt has its checkpoints.
        previous: folder or URL where the attempt before had them.
        run_dir: the run folder, for the error.

    Raises:
        ValueError: `previous` has a newer one, or cannot be read while `store` has none.
    """
    current = list_checkpoints(store)
    left: list[str] = []
    unreadable = ""
    try:
        previous_store = Store(previous)
        left = list_checkpoints(previous_store)
        if previous_store.folder and not previous_store.folder.is_dir():
            unreadable = " (the folder does not exist)"
    except (OSError, ValueError) as error:
        unreadable = f" ({error})"
    newest, newest_left = (step_of(names[-1]) if names else 0 for names in (current, left))
    if newest_left > newest or (unreadable and not current):
        raise ValueError(
            f"the checkpoints of {run_dir} were written to {previous}{unreadable}"
            f"{f', the newest at step {newest_left}' if left else ''}, and checkpoint.folder is "
            f"now {store.location()}, {f'up to step {newest}' if current else 'which has none'}; "
            "copy them to the new folder, or use the previous one"
        )
