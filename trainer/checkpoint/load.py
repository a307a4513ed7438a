"""Loading the newest intact checkpoint, with the work shared among the ranks.

All ranks verify files in parallel. Files of an object store are copied to a folder of the node on
the way, which DeepSpeed can read: each node copies what its own ranks need, once, or everything
where another rank count wrote it. A corrupt checkpoint (a deleted file, a damaged disk) is
reported, and the previous one is used. What one rank finds corrupt is read again by another first.
"""

import logging
import re
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections import ChainMap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import torch.distributed as dist

from cavmae.trainer.checkpoint.format import (
    RUN_STATE,
    CorruptCheckpointError,
    RunState,
    attempt_folder,
    list_checkpoints,
    read_manifest,
    read_run_state,
    step_of,
    verify_file,
)
from cavmae.trainer.checkpoint.store import FileDigest, Store
from cavmae.trainer.distributed.collectives import on_all_ranks, on_first_rank
from cavmae.trainer.distributed.engine import Engine

log = logging.getLogger(__name__)

_FILE_OF_RANK = re.compile(r"zero_pp_rank_(\d+)_mp_rank_\d+_(?:model|optim)_states\.pt$")
"""Names of DeepSpeed's files that belong to one rank."""


@dataclass(frozen=True)
class _Checkpoint:
    """A complete checkpoint: its name, the folder of its files, these without the run state, and
    the run state."""

    name: str
    folder: str
    files: dict[str, FileDigest]
    state: RunState

    @property
    def needs_conversion(self) -> bool:
        """Whether another rank count wrote its partitioned state."""
        return self.state.zero_stage > 0 and self.state.world_size != dist.get_world_size()


@dataclass(frozen=True)
class _Node:
    """Where the ranks of a node find files that DeepSpeed can read.

    Attributes:
        folder: of the checkpoints' folders.
        members: the ranks that share it; the first of them cleans up.
        holds_copies: its files are copies, made for this attempt.
    """

    folder: Path
    members: list[int]
    holds_copies: bool

    @property
    def is_first(self) -> bool:
        return self.members[0] == dist.get_rank()


def load_newest(store: Store, engine: Engine) -> tuple[str, RunState] | None:
    """Load the newest intact checkpoint, converted for this rank count; all ranks call it.

    Returns:
        Its path or URL, and its state; None where there is no checkpoint.

    Raises:
        ValueError: all checkpoints are corrupt, or the newest intact one has another schema, stage
            or dtype than this run.
        OSError: the store could not be read, or the node's copy could not be written.
        RuntimeError: a checkpoint could not be converted.
    """
    names = list_on_two_ranks(store)
    if not names:
        return None
    with _node_folder(store) as node:
        for name in reversed(names):
            try:
                checkpoint = _open(store, name)
                _verify(store, checkpoint, node)
            except CorruptCheckpointError as error:
                if dist.get_rank() == 0:
                    log.warning(
                        "checkpoint %s is corrupt or incomplete (%s): trying the previous one",
                        store.location(name),
                        error,
                    )
                continue
            _load(store, checkpoint, node, engine)
            return store.location(name), checkpoint.state
    raise ValueError(
        f"none of the {len(names)} checkpoints in {store.location()} is intact; restore one from a "
        "backup, or start a new run with another run_dir"
    )


def list_on_two_ranks(store: Store) -> list[str]:
    """List the names of the checkpoints that the first or the last rank sees, oldest first; all
    ranks call it. A network file system may show one machine a folder as it was a minute ago.

    Raises:
        OSError: one of them could not read the store.
    """
    two = (0, dist.get_world_size() - 1)
    seen = on_all_ranks(lambda: list_checkpoints(store) if dist.get_rank() in two else [])
    return sorted({name for names in seen for name in names}, key=step_of)


@contextmanager
def _node_folder(store: Store) -> Iterator[_Node]:
    """Provide the folder of this rank's node; all ranks call it."""
    rank = dist.get_rank()
    if store.folder is not None:
        yield _Node(store.folder, list(range(dist.get_world_size())), holds_copies=False)
        return
    # Every rank creates a folder; ranks that see the same first one share a node.
    prefix = f"cavmae-checkpoint-{zlib.crc32(store.location().encode()):08x}-"
    created = on_all_ranks(lambda: tempfile.mkdtemp(prefix=prefix))
    folder = next(Path(path) for path in created if Path(path).is_dir())
    chosen = on_all_ranks(lambda: str(folder))
    members = [member for member, path in enumerate(chosen) if path == str(folder)]
    node = _Node(folder, members, holds_copies=True)
    if chosen[rank] != created[rank]:
        Path(created[rank]).rmdir()
    if node.is_first:
        for leftover in folder.parent.glob(f"{prefix}*"):  # of attempts that were killed
            if str(leftover) not in created:
                shutil.rmtree(leftover, ignore_errors=True)
    try:
        yield node
    finally:
        if node.is_first:
            shutil.rmtree(folder, ignore_errors=True)


def _open(store: Store, name: str) -> _Checkpoint:
    """Read manifest and run state, on the first rank; the last one reads again what is corrupt.

    Raises:
        CorruptCheckpointError: both found it so.
    """
    try:
        return on_first_rank(partial(_read, store, name))
    except CorruptCheckpointError as error:
        last = dist.get_world_size() - 1
        checkpoint = on_all_ranks(lambda: _read(store, name) if dist.get_rank() == last else None)
        _warn_of_wrong_read(store, name, str(error))
        return cast(_Checkpoint, checkpoint[last])


def _read(store: Store, name: str) -> _Checkpoint:
    manifest = read_manifest(store, name)
    folder, files = attempt_folder(name, manifest.attempt), dict(manifest.files)
    if RUN_STATE not in files:
        raise CorruptCheckpointError(f"{RUN_STATE} is not in the manifest")
    verify_file(store, f"{folder}/{RUN_STATE}", files.pop(RUN_STATE))
    return _Checkpoint(name, folder, files, read_run_state(store, name))


def _warn_of_wrong_read(store: Store, name: str, what: str) -> None:
    if dist.get_rank() == 0:
        log.warning(
            "%s of %s was read wrongly once, and rightly when read again",
            what,
            store.location(name),
        )


def _verify(store: Store, checkpoint: _Checkpoint, node: _Node) -> None:
    """Verify, and copy from a remote store, the files that this node needs, each by one rank.

    A file that one rank finds damaged is read again by the next rank of its node (of the run, where
    all share a disk), and if that one finds it intact by the first once more.

    Raises:
        CorruptCheckpointError: one of them is damaged, on all ranks alike.
        OSError: a rank reads wrongly what another one reads right: its machine has to be looked at.
    """
    needed = set(checkpoint.files)
    if node.holds_copies and not checkpoint.needs_conversion:
        needed = {name for rank in node.members for name in files_of_rank(checkpoint.files, rank)}
    place, count = node.members.index(dist.get_rank()), len(node.members)

    def damaged(share: int, among: set[str]) -> dict[str, str]:
        """Read a share of these files; returns those that are damaged, with what is wrong."""
        found = {}
        for file in (one for one in sorted(needed)[share % count :: count] if one in among):
            name = f"{checkpoint.folder}/{file}"
            copy_to = node.folder / name if node.holds_copies else None
            try:
                verify_file(store, name, checkpoint.files[file], copy_to)
            except CorruptCheckpointError as error:
                found[file] = str(error)
        return found

    def all_damaged(share: int, among: set[str]) -> dict[str, str]:
        return dict(ChainMap(*on_all_ranks(lambda: damaged(share, among))))

    suspect = all_damaged(place, needed)
    if not suspect:
        return
    if confirmed := all_damaged(place + 1, set(suspect)):
        if node.holds_copies and node.is_first:
            # Frees the disk for the previous one.
            shutil.rmtree(node.folder / checkpoint.name, ignore_errors=True)
        raise CorruptCheckpointError("; ".join(sorted(confirmed.values())))
    if wrong := all_damaged(place, set(suspect)):
        raise OSError(
            f"{', '.join(sorted(wrong))} of {store.location(checkpoint.name)} is read wrongly by "
            f"one rank and rightly by another, twice: look for errors of a disk or of memory"
        )
    _warn_of_wrong_read(store, checkpoint.name, ", ".join(sorted(suspect)))


def _load(store: Store, checkpoint: _Checkpoint, node: _Node, engine: Engine) -> None:
    state, folder = checkpoint.state, node.folder / checkpoint.folder
    for name, current in (("zero_stage", engine.zero_stage), ("dtype", engine.dtype)):
        if getattr(state, name) != current:
            raise ValueError(
                f"checkpoint {store.location(checkpoint.name)} was written with engine.{name} "
                f"{getattr(state, name)} and this run has {current}; resume with the former"
            )
    if not checkpoint.needs_conversion:
        engine.load(folder)
        dist.barrier()  # before the copies are removed
        return
    converted = node.folder / f".converted-{checkpoint.name}"

    def convert() -> None:
        if node.is_first:
            world_size = dist.get_world_size()
            log.info("converting %s from %d to %d ranks", folder, state.world_size, world_size)
            convert_checkpoint(folder, converted)

    on_all_ranks(convert)
    engine.load(converted, converted=True)
    dist.barrier()
    if node.is_first:
        shutil.rmtree(converted)


def files_of_rank(names: Iterable[str], rank: int) -> list[str]:
    """Select the snapshot files that `load` reads on a rank: its own, and those of no rank.

    Args:
        names: files of all ranks' snapshots, written by as many ranks as read them.
        rank: the rank that reads.
    """
    owners = {name: _FILE_OF_RANK.search(name) for name in names}
    return [name for name, owner in owners.items() if owner is None or int(owner[1]) == rank]


def convert_checkpoint(folder: Path, target: Path) -> None:
    """Write a checkpoint that any rank count can load; one process calls it.

    Raises:
        RuntimeError: DeepSpeed's converter failed, or a file holds something else than data.
    """
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    command = [
        *(sys.executable, "-m", "cavmae.trainer.distributed.state_files"),
        *("--input_folder", str(folder / "state"), "--output_folder", str(target / "universal")),
        *("--num_extract_workers", "1", "--num_merge_workers", "1", "--inject_missing_state"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        shutil.rmtree(target, ignore_errors=True)
        raise RuntimeError(
            f"the checkpoint {folder} could not be converted to this rank count: "
            f"{done.stderr.strip().splitlines()[-1]}"
        )
