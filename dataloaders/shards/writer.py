"""Writes packed shards: whole or not at all, and the same bytes for the same samples.

`shard_set.py`, which reads them, describes the layout.
"""

import hashlib
import io
import tarfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from cavmae.atomic_write import (
    commit,
    named_errors,
    temporary_path,
    write_bytes,
    write_json,
    write_text,
)
from cavmae.dataloaders.constants import AUDIO_HZ, Modalities
from cavmae.dataloaders.shards.format import CONTENT_FILE, SCHEMA, ShardEntry


class _HashedFile:
    """Computes the digest of a shard while the tar is written."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.sha256 = hashlib.sha256()
        self.bytes = 0

    def write(self, data: bytes) -> int:
        if self.file.closed:  # The tar of an abandoned shard writes its end when collected.
            return len(data)
        self.sha256.update(data)
        self.bytes += len(data)
        return self.file.write(data)


class ShardWriter:
    """Writes `NAME.tar` and `NAME.idx`, which appear when `finish` is called.

    The same samples give the same bytes: no times, users or host names are stored.
    """

    def __init__(self, folder: Path, name: str):
        # webdataset imports torch (2 s); readers and packing workers never need it.
        from webdataset.writer import TarWriter

        self._path = folder / f"{name}.tar"
        self._temporary = temporary_path(self._path)
        self._file = open(self._temporary, "wb")  # noqa: SIM115 (closed by finish or abandon)
        self._hashed = _HashedFile(self._file)
        self._tar = TarWriter(
            cast(BinaryIO, self._hashed),
            encoder=False,
            user="cavmae",
            group="cavmae",
            mode=0o444,
            mtime=0,
        )
        self._lines: list[str] = []

    def add(self, key: str, members: Mapping[str, bytes]) -> None:
        """Append one sample; `members` maps extensions to bytes, in the order of the tar."""
        line = []
        for extension, data in members.items():
            # One call per member: a single call would sort them and put the JSON last.
            with named_errors(self._path):
                self._tar.write({"__key__": key, extension: data})
            blocks = -(-len(data) // tarfile.BLOCKSIZE)
            offset = self._tar.tarstream.offset - blocks * tarfile.BLOCKSIZE
            line.append(f"{extension} {offset} {len(data)} {key}.{extension}")
        self._lines.append(" ".join(line))

    def finish(self) -> ShardEntry | None:
        """Complete the shard; without samples, returns None and leaves no files."""
        if not self._lines:
            self.abandon()
            return None
        with named_errors(self._path):
            self._tar.close()
            self._file.close()
        text = f"v1.2 {len(self._lines)}\n" + "".join(line + "\n" for line in self._lines)
        write_text(self._path.with_suffix(".idx"), text)
        commit(self._temporary, self._path)
        return ShardEntry(
            self._path.name,
            len(self._lines),
            self._hashed.bytes,
            self._hashed.sha256.hexdigest(),
        )

    def abandon(self) -> None:
        """Remove the unfinished shard."""
        with suppress(OSError):  # On a full disk: the last bytes cannot be flushed.
            self._file.close()
        self._temporary.unlink(missing_ok=True)


def write_index(
    folder: Path,
    *,
    tier: str,
    audio_codec: str,
    video_codec: str | None,
    short_side: int,
    frame_choice: str,
    skipped: int,
    content: Iterable[str],
    shards: Iterable[ShardEntry],
    modality: Modalities = "both",
) -> None:
    """Write `content.npy`, and the `index.json` that marks a tier as complete.

    Args:
        content: SHA-256 of each clip's content in packing order; the first 8 bytes are kept.
        shards: of the tier; the other arguments are stored as they are.
    """
    entries = list(shards)
    file = io.BytesIO()
    np.save(file, np.array([int(one[:16], 16) for one in content], np.uint64), allow_pickle=False)
    write_bytes(folder / CONTENT_FILE, file.getvalue())
    index = {
        "schema": SCHEMA,
        "tier": tier,
        **({} if modality == "both" else {"modality": modality}),
        "audio_codec": audio_codec,
        "video_codec": video_codec,
        "short_side": short_side,
        "audio_hz": AUDIO_HZ,
        "frame_choice": frame_choice,
        "samples": sum(entry.samples for entry in entries),
        "skipped": skipped,
        "content_sha256": hashlib.sha256(file.getvalue()).hexdigest(),
        "shards": [asdict(entry) for entry in entries],
    }
    write_json(folder / "index.json", index)
