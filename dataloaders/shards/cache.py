"""A bounded folder of pieces of remote files, shared by all processes of a node.

A piece is fetched once, whoever asks first: the others wait for a lock on its name. Reading needs
no lock, since a file that is evicted stays readable for those who have it open. When the folder
grows over its limit, the pieces that were used longest ago go.
"""

import errno
import fcntl
import hashlib
import logging
import os
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cavmae.atomic_write import TEMPORARY_SUFFIX, atomic_write

STRIPES = 256
"""Locks for fetching; pieces share them by the hash of their names."""
KEPT_SHARE = 0.9
"""Of the limit, when pieces are evicted: not at every insertion."""
_TRAILER = 4  # CRC-32 of the piece, little-endian

log = logging.getLogger(__name__)


class ChunkCache:
    """Pieces by name.

    Args:
        folder: on a disk of this node; made where it is not there.
        limit_bytes: of all pieces together; one piece more for each process may be on its way.

    Raises:
        OSError: the folder cannot be made or written.
        ValueError: the limit is below 1.
    """

    def __init__(self, folder: Path, limit_bytes: int):
        if limit_bytes < 1:
            raise ValueError(f"the cache {folder} is limited to {limit_bytes} bytes; use 1 or more")
        self.folder = folder
        self.limit_bytes = limit_bytes
        self._full_disk_said = False
        (folder / "locks").mkdir(parents=True, exist_ok=True)

    def kept(self, name: str) -> bytes | None:
        """A whole piece if it is here and its checksum holds."""
        try:
            data = self._path(name).read_bytes()
        except FileNotFoundError:
            return None
        piece, trailer = data[:-_TRAILER], data[-_TRAILER:]
        if trailer != _checksum(piece):  # What a power cut or a bad disk has left.
            return None
        self._used(self._path(name))
        return piece

    def keep(self, name: str, piece: bytes) -> None:
        """Put a piece in the place of any of this name."""
        if self.kept(name) != piece:
            self._insert(name, piece)

    def whole(self, name: str, fetch: Callable[[], bytes]) -> bytes:
        """A whole piece, whose length only its bytes tell."""
        found = self.kept(name)
        if found is None:
            with self._locked(name):
                found = self.kept(name)
                if found is None:
                    found = fetch()
                    self._insert(name, found)
        return found

    def part(
        self, name: str, length: int, start: int, stop: int, fetch: Callable[[], bytes]
    ) -> bytes:
        """Bytes `start` to `stop` of a piece of `length` bytes."""
        found = self._part(name, length, start, stop)
        if found is None:
            with self._locked(name):
                found = self._part(name, length, start, stop)
                if found is None:
                    piece = fetch()
                    self._insert(name, piece)
                    found = piece[start:stop]
        return found

    def forget(self, name: str) -> None:
        """Remove a piece: its bytes are not what they should be."""
        self._path(name).unlink(missing_ok=True)

    # ------------------------------------------------------------------------------- pieces

    def _path(self, name: str) -> Path:
        digest = hashlib.sha256(name.encode()).hexdigest()
        return self.folder / digest[:2] / digest[2:34]

    def _part(self, name: str, length: int, start: int, stop: int) -> bytes | None:
        path = self._path(name)
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            if os.fstat(descriptor).st_size != length + _TRAILER:
                return None
            data = os.pread(descriptor, stop - start, start)
        finally:
            os.close(descriptor)
        self._used(path)
        return data if len(data) == stop - start else None

    def _used(self, path: Path) -> None:
        with suppress(FileNotFoundError):  # Evicted meanwhile.
            os.utime(path)

    def _insert(self, name: str, piece: bytes) -> None:
        path = self._path(name)
        try:
            path.parent.mkdir(exist_ok=True)
            before = path.stat().st_size if path.exists() else 0
            with atomic_write(path, durable=False) as temporary:  # a piece has a checksum
                temporary.write_bytes(piece + _checksum(piece))
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            if not self._full_disk_said:
                log.warning("%s: the disk is full; what is fetched now is not kept", self.folder)
            self._full_disk_said = True
            return
        self._account(len(piece) + _TRAILER - before)

    # ------------------------------------------------------------------------------ eviction

    def _account(self, grown: int) -> None:
        """Add to the bytes noted; over the limit, count what is there and evict."""
        with open(self.folder / "bytes", "a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            noted = file.read()
            total = int(noted) + grown if noted.isdigit() else self._evict()
            if total > self.limit_bytes:
                total = self._evict()
            file.seek(0)
            file.truncate()
            file.write(str(max(0, total)))

    def _evict(self) -> int:
        """Remove the pieces used longest ago until `KEPT_SHARE` is left; returns what is."""
        pieces = sorted(self._pieces())
        total = sum(size for _, size, _ in pieces)
        if total <= self.limit_bytes:
            return total
        for _, size, path in pieces:
            if total <= KEPT_SHARE * self.limit_bytes:
                break
            path.unlink(missing_ok=True)
            total -= size
        return total

    def _pieces(self) -> Iterator[tuple[float, int, Path]]:
        """When each piece was used, its bytes, its path; leftovers of killed processes go."""
        for folder in self.folder.iterdir():
            if not folder.is_dir() or folder.name == "locks":
                continue
            for path in folder.iterdir():
                try:
                    status = path.stat()
                except FileNotFoundError:
                    continue
                if path.suffix != TEMPORARY_SUFFIX:
                    yield status.st_mtime, status.st_size, path
                elif time.time() - status.st_mtime > 3600:
                    path.unlink(missing_ok=True)

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        stripe = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) % STRIPES
        with open(self.folder / "locks" / str(stripe), "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _checksum(piece: bytes) -> bytes:
    return zlib.crc32(piece).to_bytes(_TRAILER, "little")
