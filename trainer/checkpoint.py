"""Checkpoints of a run: whole or absent, never half, and verified before they are trusted.

A checkpoint is written to a hidden folder, every file's size and checksum is listed in a manifest,
and one rename makes it appear. A torn one (power cut, full disk, deleted file) fails its manifest
and the one before is used, said aloud.
"""

import json
import logging
import os
import shutil
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist

from cavmae.trainer.engine import Engine, convert_checkpoint

log = logging.getLogger(__name__)

SCHEMA = 1
_MANIFEST = "manifest.json"


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


def save_checkpoint(run_dir: Path, engine: Engine, state: RunState, *, keep_last: int) -> Path:
    """Write a checkpoint and remove old ones; all ranks call it.

    Raises:
        OSError: the disk refused; nothing that looks whole is left.
    """
    folder = run_dir / "checkpoints"
    target = folder / f"step-{state.step:09d}"
    writing = folder / f".writing-step-{state.step:09d}"
    if dist.get_rank() == 0:
        for torn in folder.glob(".writing-*"):  # of a start that was killed while it wrote
            shutil.rmtree(torn)
        writing.mkdir(parents=True)
    dist.barrier()
    engine.save(writing)
    dist.barrier()
    if dist.get_rank() == 0:
        (writing / "run_state.json").write_text(json.dumps(asdict(state)))
        _write_manifest(writing)
        shutil.rmtree(target, ignore_errors=True)
        os.rename(writing, target)
        _sync(folder)
        for old in _checkpoints(run_dir)[:-keep_last]:
            shutil.rmtree(old)
    dist.barrier()
    return target


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The newest checkpoint that passes its manifest; None where there is none at all.

    Raises:
        ValueError: checkpoints are there and none of them is whole.
    """
    found = _checkpoints(run_dir)
    for checkpoint in reversed(found):
        problem = checkpoint_problem(checkpoint)
        if problem is None:
            return checkpoint
        log.warning("checkpoint %s is not whole (%s): trying the one before", checkpoint, problem)
    if found:
        raise ValueError(
            f"none of the {len(found)} checkpoints in {run_dir / 'checkpoints'} is whole; restore "
            "one from a copy, or start again with another run_dir"
        )
    return None


def checkpoint_problem(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files; None where all is as written."""
    try:
        manifest = json.loads((checkpoint / _MANIFEST).read_text())
    except (OSError, ValueError) as error:
        return f"{_MANIFEST}: {error}"
    for name, expected in manifest["files"].items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes of {expected['bytes']}"
        if _checksum(path) != expected["crc32"]:
            return f"{name} has changed since it was written"
    return None


def load_checkpoint(checkpoint: Path, engine: Engine) -> RunState:
    """Load tensors and state; all ranks call it. Another rank count's files are converted first.

    Raises:
        ValueError: the checkpoint is of another schema, stage or dtype than this run.
    """
    fields = json.loads((checkpoint / "run_state.json").read_text())
    if fields["schema"] != SCHEMA:
        raise ValueError(
            f"checkpoint {checkpoint} has schema {fields['schema']}, this version reads {SCHEMA}; "
            "use the version of cavmae that wrote it"
        )
    fields["quarantine"] = tuple((name, reason) for name, reason in fields["quarantine"])
    state = RunState(**fields)
    for name, now in (("zero_stage", engine.zero_stage), ("dtype", engine.dtype)):
        if getattr(state, name) != now:
            raise ValueError(
                f"checkpoint {checkpoint} was written with engine.{name} "
                f"{getattr(state, name)} and this run has {now}; go on with the former"
            )
    world_size = dist.get_world_size()
    if state.world_size == world_size or state.zero_stage == 0:
        engine.load(checkpoint)
        return state
    converted = checkpoint.parent / f".converted-{checkpoint.name}"
    if dist.get_rank() == 0:
        log.info("converting %s from %d to %d ranks", checkpoint, state.world_size, world_size)
        convert_checkpoint(checkpoint, converted)
    dist.barrier()
    engine.load(converted, converted=True)
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(converted)
    return state


def _checkpoints(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "checkpoints").glob("step-*"))


def _write_manifest(folder: Path) -> None:
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            _sync(path)
            files[str(path.relative_to(folder))] = {
                "bytes": path.stat().st_size,
                "crc32": _checksum(path),
            }
    (folder / _MANIFEST).write_text(json.dumps({"schema": SCHEMA, "files": files}, indent=1))
    _sync(folder / _MANIFEST)
    _sync(folder)


def _checksum(path: Path) -> int:
    value = 0
    with open(path, "rb") as handle:
        while block := handle.read(1 << 24):
            value = zlib.crc32(block, value)
    return value


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
