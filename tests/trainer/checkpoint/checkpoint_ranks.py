"""Ranks that write checkpoints and go on from them, while something fails on one of them.

Run by `launch.run_ranks` with the folder to use.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
import torch.distributed as dist

from cavmae.trainer.checkpoint import load
from cavmae.trainer.checkpoint.format import (
    CorruptCheckpointError,
    Manifest,
    RunState,
    list_checkpoints,
    read_manifest,
    verify_file,
)
from cavmae.trainer.checkpoint.load import load_newest
from cavmae.trainer.checkpoint.save import CheckpointSaver
from cavmae.trainer.checkpoint.store import Store
from cavmae.trainer.config.configs import CheckpointConfig
from cavmae.trainer.distributed.collectives import on_all_ranks, on_first_rank
from cavmae.trainer.distributed.engine import Engine


class Part:
    """A rank's part of an engine's state: a file of its own."""

    zero_stage = 1
    dtype = "fp32"

    def __init__(self) -> None:
        self.step = 0

    def snapshot(self) -> dict[str, Any]:
        return {self.file: torch.tensor(self.step)}

    def load(self, folder: Path) -> None:
        self.step = int(torch.load(folder / self.file))

    @property
    def file(self) -> str:
        return f"state/zero_pp_rank_{dist.get_rank()}_mp_rank_00_optim_states.pt"


def error_of(call: Callable[[], Any]) -> list[str]:
    try:
        call()
    except (OSError, ValueError) as error:
        return [type(error).__name__, str(error)]
    return []


def on_rank(rank: int, error: Exception) -> Callable[[], None]:
    def work() -> None:
        if dist.get_rank() == rank:
            raise error

    return work


def wrong_on_the_second(*arguments: Any) -> None:
    """Verify a file as a machine does that reads everything wrongly, on rank 1."""
    if dist.get_rank() == 1:
        raise CorruptCheckpointError("it has changed")
    verify_file(*arguments)


def outdated_on_the_first(store: Store) -> list[str]:
    """List checkpoints as a network file system may show them to rank 0: as they were."""
    return list_checkpoints(store)[: -1 if dist.get_rank() == 0 else None]


def wrong_on_the_first(store: Store, name: str) -> Manifest:
    if dist.get_rank() == 0:
        raise CorruptCheckpointError("it is cut short")
    return read_manifest(store, name)


def main() -> None:
    folder, output = Path(json.loads(sys.argv[1])), Path(sys.argv[2])
    dist.init_process_group("gloo")
    first, second = PermissionError(13, "of rank 0"), ValueError("of rank 1")
    errors = [
        error_of(lambda: on_first_rank(on_rank(0, first))),
        error_of(lambda: on_all_ranks(on_rank(1, second))),
    ]

    store, part = Store(folder / "checkpoints"), Part()

    def saver(start_step: int) -> CheckpointSaver:
        return CheckpointSaver(
            store,
            CheckpointConfig(every_steps=10),
            cast(Engine, part),
            lambda step: RunState(step, step, (), "set", 2, 1, "fp32"),
            start_step=start_step,
            attempt=1,
            before_commit=lambda: None,
        )

    writer = saver(0)
    saved = []
    for part.step in (10, 20, 30):
        if part.step == 20 and dist.get_rank() == 1:
            full = folder / "checkpoints/step-000000020/attempt-1" / part.file
            full.parent.mkdir(parents=True, exist_ok=True)  # the other rank may be ahead
            full.symlink_to("/dev/full")
        writer.begin(part.step)
        saved.append(writer.commit())

    load_newest(store, cast(Engine, part))
    loaded = part.step
    with mock.patch.object(load, "verify_file", wrong_on_the_second):
        misread = error_of(lambda: load_newest(store, cast(Engine, part)))
    with mock.patch.object(load, "list_checkpoints", outdated_on_the_first):
        load_newest(store, cast(Engine, part))
        saver(part.step)
    with mock.patch.object(load, "read_manifest", wrong_on_the_first):
        load_newest(store, cast(Engine, part))
    in_spite_of_the_first = part.step
    on_first_rank(lambda: store.put(f"step-000000030/attempt-1/{part.file}", b"damaged"))
    load_newest(store, cast(Engine, part))
    without = part.step
    found = on_all_ranks(lambda: (errors, saved, loaded, misread, in_spite_of_the_first, without))
    if dist.get_rank() == 0:
        names = ("errors", "saved", "loaded", "misread", "in spite of the first", "without newest")
        output.write_text(json.dumps(dict(zip(names, zip(*found, strict=True), strict=True))))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
