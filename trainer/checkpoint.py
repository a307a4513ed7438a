"""Checkpoints of a run, verified before they are trusted.

`checkpoint_writer` makes them appear whole, with a manifest of every file's size and checksum. A
torn one (power cut, deleted file, damaged disk) fails its manifest and the one before is used, said
aloud.
"""

import json
import logging
import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from cavmae.trainer.engine import Engine, convert_checkpoint

log = logging.getLogger(__name__)

SCHEMA = 1
MANIFEST = "manifest.json"


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


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The newest checkpoint that passes its manifest; None where there is none at all.

    Raises:
        ValueError: checkpoints are there and none of them is whole.
    """
    found = checkpoints(run_dir)
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
        manifest = json.loads((checkpoint / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        return f"{MANIFEST}: {error}"
    for name, expected in manifest["files"].items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes of {expected['bytes']}"
        if checksum(path) != expected["crc32"]:
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


def checkpoints(run_dir: Path) -> list[Path]:
    """Folders of the run's checkpoints, oldest first."""
    return sorted((run_dir / "checkpoints").glob("step-*"))


def step_of(checkpoint: Path) -> int:
    """Optimizer steps that had been done."""
    return int(checkpoint.name.removeprefix("step-"))


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with open(path, "rb") as handle:
        while block := handle.read(1 << 24):
            value = zlib.crc32(block, value)
    return value
