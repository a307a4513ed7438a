"""Writes packed shards: whole or not at all, and the same bytes for the same samples.

`shard_set.py`, which reads them, describes the layout.
"""

import hashlib
import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO, cast

from cavmae.dataloaders.constants import AUDIO_HZ
from cavmae.dataloaders.shards.format import SCHEMA, ShardEntry


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file that is seen whole or not at all, even after a power cut."""
    part = path.with_name(path.name + ".part")
    with _named_errors(part), open(part, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    _flush_folder(path.parent)


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """Put the file's name into errors of calls that do not know it, such as on a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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

        self.folder = folder
        self.name = name
        self._part = folder / f"{name}.tar.part"
        self._file = open(self._part, "wb")  # noqa: SIM115 (closed by finish or abandon)
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
            with _named_errors(self._part):
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
        with _named_errors(self._part):
            self._tar.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        text = f"v1.2 {len(self._lines)}\n" + "".join(line + "\n" for line in self._lines)
        write_atomically(self.folder / f"{self.name}.idx", text.encode())
        os.replace(self._part, self.folder / f"{self.name}.tar")
        _flush_folder(self.folder)
        return ShardEntry(
            f"{self.name}.tar",
            len(self._lines),
            self._hashed.bytes,
            self._hashed.sha256.hexdigest(),
        )

    def abandon(self) -> None:
        """Remove the unfinished shard."""
        with suppress(OSError):  # On a full disk: the last bytes cannot be flushed.
            self._file.close()
        self._part.unlink(missing_ok=True)


def write_index(
    folder: Path,
    *,
    tier: str,
    audio_codec: str,
    video_codec: str | None,
    short_side: int,
    frame_choice: str,
    skipped: int,
    shards: Iterable[ShardEntry],
) -> None:
    """Write the `index.json` that marks a tier as complete."""
    entries = list(shards)
    index = {
        "schema": SCHEMA,
        "tier": tier,
        "audio_codec": audio_codec,
        "video_codec": video_codec,
        "short_side": short_side,
        "audio_hz": AUDIO_HZ,
        "frame_choice": frame_choice,
        "samples": sum(entry.samples for entry in entries),
        "skipped": skipped,
        "shards": [asdict(entry) for entry in entries],
    }
    write_atomically(folder / "index.json", (json.dumps(index, indent=1) + "\n").encode())
