"""Going on from the newest checkpoint that is whole, with the work shared among the ranks.

All ranks check files at the same time. What lies at an object store is checked while it is copied
to a folder of the node, which DeepSpeed can read: each node takes what its own ranks need, once, or
everything where another rank count wrote it. A checkpoint that is not whole (a deleted file, a
damaged disk) is said aloud, and the one before is used.
"""

import logging
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch.distributed as dist

from cavmae.trainer.checkpoint.format import (
    RUN_STATE,
    RunState,
    checkpoints,
    file_problem,
    read_manifest,
    read_run_state,
)
from cavmae.trainer.checkpoint.store import FileSum, LocalStore, Store
from cavmae.trainer.distributed.collectives import on_all_ranks, on_first_rank
from cavmae.trainer.distributed.engine import Engine, convert_checkpoint, files_of_rank

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Found:
    """A checkpoint whose files are all there. Attributes: name; files, but for the run state, by
    their names in it; state."""

    name: str
    files: dict[str, FileSum]
    state: RunState


@dataclass(frozen=True)
class _Node:
    """Where ranks find files that DeepSpeed can read.

    Attributes:
        folder: of the checkpoints' folders.
        members: the ranks that share it; the first of them tidies up.
        copies: it holds copies, made for this start.
    """

    folder: Path
    members: list[int]
    copies: bool

    @property
    def first(self) -> bool:
        return self.members[0] == dist.get_rank()


def load_newest(store: Store, engine: Engine) -> tuple[str, RunState] | None:
    """Load the newest whole checkpoint; all ranks call it. Another rank count's is converted first.

    Returns:
        Its path or URL, and its state; None where there is no checkpoint at all.

    Raises:
        ValueError: checkpoints are there and none of them is whole, or the newest whole one is of
            another schema, stage or dtype than this run.
        OSError: the store could not be read, or the node's copy could not be written.
        RuntimeError: a checkpoint could not be converted.
    """
    names = on_first_rank(lambda: checkpoints(store))
    if not names:
        return None
    with _node_of(store) as node:
        for name in reversed(names):
            found = on_first_rank(partial(_looked_at, store, name))
            problem = found if isinstance(found, str) else _fetched(store, found, node)
            if problem is None:
                assert isinstance(found, _Found)
                _load(store, found, node, engine)
                return store.place(name), found.state
            if dist.get_rank() == 0:
                log.warning(
                    "checkpoint %s is not whole (%s): trying the one before",
                    store.place(name),
                    problem,
                )
    raise ValueError(
        f"none of the {len(names)} checkpoints in {store.place()} is whole; restore one from a "
        "copy, or start again with another run_dir"
    )


@contextmanager
def _node_of(store: Store) -> Iterator[_Node]:
    """The folder of this rank's node, as long as it is needed; all ranks call it."""
    rank = dist.get_rank()
    if isinstance(store, LocalStore):
        yield _Node(store.folder, list(range(dist.get_world_size())), copies=False)
        return
    # Each rank makes a folder; the first one that can be seen from here is the node's.
    prefix = f"cavmae-checkpoint-{zlib.crc32(store.place().encode()):08x}-"
    offered = on_all_ranks(lambda: tempfile.mkdtemp(prefix=prefix))
    folder = next(Path(one) for one in offered if Path(one).is_dir())
    chosen = on_all_ranks(lambda: str(folder))
    node = _Node(folder, [n for n, one in enumerate(chosen) if one == str(folder)], copies=True)
    if chosen[rank] != offered[rank]:
        Path(offered[rank]).rmdir()
    if node.first:
        for left in folder.parent.glob(f"{prefix}*"):  # of starts that were killed meanwhile
            if str(left) not in offered:
                shutil.rmtree(left, ignore_errors=True)
    try:
        yield node
    finally:
        if node.first:
            shutil.rmtree(folder, ignore_errors=True)


def _looked_at(store: Store, name: str) -> _Found | str:
    """On the first rank: what is there of a checkpoint, or what is missing."""
    files = read_manifest(store, name)
    if isinstance(files, str):
        return files
    if RUN_STATE not in files:
        return f"{RUN_STATE} is not in the manifest"
    problem = file_problem(store, f"{name}/{RUN_STATE}", files.pop(RUN_STATE))
    return problem or _Found(name, files, read_run_state(store, name))


def _fetched(store: Store, found: _Found, node: _Node) -> str | None:
    """Check the files that this node needs, each by one of its ranks; copies where it has copies.

    Returns:
        What is wrong with one of them, the same on all ranks.
    """
    wanted = set(found.files)
    if node.copies and not _converts(found.state):
        wanted = {name for rank in node.members for name in files_of_rank(found.files, rank)}
    mine = sorted(wanted)[node.members.index(dist.get_rank()) :: len(node.members)]

    def check() -> str | None:
        for file in mine:
            name = f"{found.name}/{file}"
            copy_to = node.folder / name if node.copies else None
            problem = file_problem(store, name, found.files[file], copy_to)
            if problem:
                return problem
        return None

    problem = next(filter(None, on_all_ranks(check)), None)
    if problem and node.copies and node.first:
        shutil.rmtree(node.folder / found.name)  # makes room for the one before
    return problem


def _load(store: Store, found: _Found, node: _Node, engine: Engine) -> None:
    state, folder = found.state, node.folder / found.name
    for name, now in (("zero_stage", engine.zero_stage), ("dtype", engine.dtype)):
        if getattr(state, name) != now:
            raise ValueError(
                f"checkpoint {store.place(found.name)} was written with engine.{name} "
                f"{getattr(state, name)} and this run has {now}; go on with the former"
            )
    if not _converts(state):
        engine.load(folder)
        dist.barrier()  # copies go when all have read them
        return
    converted = node.folder / f".converted-{found.name}"

    def convert() -> None:
        if node.first:
            world_size = dist.get_world_size()
            log.info("converting %s from %d to %d ranks", folder, state.world_size, world_size)
            convert_checkpoint(folder, converted)

    on_all_ranks(convert)
    engine.load(converted, converted=True)
    dist.barrier()
    if node.first:
        shutil.rmtree(converted)


def _converts(state: RunState) -> bool:
    return state.zero_stage > 0 and state.world_size != dist.get_world_size()
