"""The folder that a packing run writes: whose it is, what of it is finished, when it is whole.

`pack.json` notes the options and a digest of the list, so that a restart cannot mix two runs.
`finished/NNNNNN.json` is written after the files of a shard: a shard that has it is kept by a
restart. `report.jsonl` names what was skipped, `duplicates.jsonl` what was packed twice,
`statistics.json` tells the rest, and `index.json` of each tier declares it complete.
"""

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cavmae.atomic_write import TEMPORARY_SUFFIX, write_json, write_text
from cavmae.dataloaders.shards.shard_set import SCHEMA


@contextmanager
def claimed(
    out: Path, options: dict[str, Any], tiers: tuple[str, ...], clips: int, digest: str
) -> Iterator[None]:
    """Make the folder, refuse one of another run, and keep other packers out.

    Raises:
        OSError: it cannot be written, holds other things, or another process packs into it.
        ValueError: it was begun with other options or another list.
    """
    note = {"schema": SCHEMA, "options": options, "clips": clips, "clips_sha256": digest}
    path = out / "pack.json"
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file; give a folder for the shards")
    if path.exists():
        _compare(out, note)
    else:
        leftover = f"pack.json.*{TEMPORARY_SUFFIX}"
        strangers = sorted(path.name for path in out.glob("*") if not path.match(leftover))
        if strangers:
            raise FileExistsError(
                f"{out} exists and was not made by this command (it holds {strangers[0]!r}); "
                f"give a new or empty folder"
            )
        out.mkdir(parents=True, exist_ok=True)
        write_json(path, note)
    for folder in ("finished", *tiers):
        (out / folder).mkdir(exist_ok=True)
    with locked(path, f"packing into {out}"):
        yield


@contextmanager
def locked(note: Path, doing: str) -> Iterator[None]:
    """Keep other processes out of the folder that has this file, which is never replaced.

    Raises:
        BlockingIOError: another process is `doing` it.
    """
    with open(note) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"another process is {doing}") from None
        yield


def _compare(out: Path, note: dict[str, Any]) -> None:
    path = out / "pack.json"
    try:
        before = json.loads(path.read_bytes())
        options, clips = before["options"], before["clips"]
        same_list = before["clips_sha256"] == note["clips_sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove {out}") from error
    for name, value in note["options"].items():
        if options.get(name) != value:
            raise ValueError(
                f"{name} is {value!r}, but {out} was begun with {options.get(name)!r}; "
                f"use that, remove {out} or give another folder"
            )
    if not same_list:
        raise ValueError(
            f"the list of clips has changed since {out} was begun ({clips} clips then, "
            f"{note['clips']} now); remove {out} or give another folder"
        )


def write_report(out: Path, shard: int, report: dict[str, Any]) -> None:
    """Note that a shard is finished.

    Args:
        report: `tiers` (tier to index entry or None), `seconds`, `skipped` (lines of
            `report.jsonl`) and `packed`: `key`, `source`, `labels`, `codec` and `content` of each
            clip.
    """
    write_text(out / "finished" / f"{shard:06d}.json", json.dumps(report))


def finished_report(out: Path, shard: int) -> dict[str, Any] | None:
    """The report of a shard that lies there whole, or None."""
    path = out / "finished" / f"{shard:06d}.json"
    if not path.exists():
        return None
    report = json.loads(path.read_bytes())
    for tier, entry in report["tiers"].items():
        if entry is None:  # Every clip of the shard was skipped.
            continue
        tar = out / tier / entry["name"]
        if not (tar.exists() and tar.with_suffix(".idx").exists()):
            return None
        if tar.stat().st_size != entry["bytes"]:
            return None
    return report


def finished_reports(out: Path) -> Iterator[dict[str, Any]]:
    """The reports of finished shards, in order, read one at a time."""
    folder = out / "finished"
    for path in sorted(folder.glob("[0-9]*.json")) if folder.is_dir() else []:
        yield json.loads(path.read_bytes())


def remove_unfinished(out: Path, tiers: tuple[str, ...], pending: list[int]) -> None:
    """Remove what an interrupted run has left of shards that will be packed."""
    names = {f"{shard:06d}" for shard in pending}
    for folder in (out, out / "finished", *(out / tier for tier in tiers)):
        for path in folder.iterdir():
            if (
                path.suffix == TEMPORARY_SUFFIX
                or path.stem in names
                or (path.name == "index.json" and pending)
            ):
                path.unlink()
