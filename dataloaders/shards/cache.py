"""A bounded on-disk cache of chunks of remote files, shared by all processes of a node.

A chunk is fetched once, by the first process that asks; the others wait for a lock on its name.
Reading needs no lock, since an evicted file stays readable for processes that have it open. When
the folder exceeds its limit, the least recently used chunks are evicted.
"""

import errno
import fcntl
import hashlib
import logging
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from cavmae.atomic_write import TEMPORARY_SUFFIX, atomic_write, remove_leftovers

EVICTION_TARGET = 0.9
"""Eviction goes down to this fraction of the limit, so that not every insertion evicts."""
_TRAILER = 4  # CRC-32 of the chunk, little-endian

log = logging.getLogger(__name__)


class ChunkCache:
    """An LRU cache of chunks by name.

    Args:
        folder: on a local disk of this node; created if it does not exist.
        limit_bytes: size of all chunks; each process may exceed it by one chunk in flight.

    Raises:
        OSError: the folder cannot be created or written.
        ValueError: the limit is below 1.
    """

    def __init__(self, folder: Path, limit_bytes: int):
        if limit_bytes < 1:
            raise ValueError(f"the cache {folder} is limited to {limit_bytes} bytes; use 1 or more")
        self.folder = folder
        self.limit_bytes = limit_bytes
        self._warned_of_full_disk = False
        (folder / "locks").mkdir(parents=True, exist_ok=True)

    def get(self, name: str) -> bytes | None:
        """A whole chunk, or None if it is absent or fails its checksum."""
        try:
            data = self._path(name).read_bytes()
        except FileNotFoundError:
            return None
        chunk, trailer = data[:-_TRAILER], data[-_TRAILER:]
        if trailer != _checksum(chunk):  # After a power cut, or on a bad disk.
            return None
        self._touch(self._path(name))
        return chunk

    def put(self, name: str, chunk: bytes) -> None:
        """Insert a chunk, or replace the one of this name."""
        if self.get(name) != chunk:
            self._insert(name, chunk)

    def get_or_fetch(self, name: str, fetch: Callable[[], bytes]) -> bytes:
        """A whole chunk of unknown length."""
        return self._get_or_fetch(name, lambda: self.get(name), fetch, slice(None))

    def range_or_fetch(
        self, name: str, length: int, start: int, stop: int, fetch: Callable[[], bytes]
    ) -> bytes:
        """Bytes `start` to `stop` of a chunk of `length` bytes, without its checksum."""
        read = partial(self._read_range, name, length, start, stop)
        return self._get_or_fetch(name, read, fetch, slice(start, stop))

    def _get_or_fetch(
        self,
        name: str,
        read: Callable[[], bytes | None],
        fetch: Callable[[], bytes],
        part: slice,
    ) -> bytes:
        if (found := read()) is not None:
            return found
        with self._locked(name):
            if (found := read()) is not None:
                return found
            chunk = fetch()
            self._insert(name, chunk)
            return chunk[part]

    def drop(self, name: str) -> None:
        """Remove a chunk whose bytes have turned out to be wrong."""
        self._path(name).unlink(missing_ok=True)

    # ------------------------------------------------------------------------------- chunks

    def _path(self, name: str) -> Path:
        digest = hashlib.sha256(name.encode()).hexdigest()
        return self.folder / digest[:2] / digest[2:34]

    def _read_range(self, name: str, length: int, start: int, stop: int) -> bytes | None:
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
        self._touch(path)
        return data if len(data) == stop - start else None

    def _touch(self, path: Path) -> None:
        with suppress(FileNotFoundError):  # Evicted meanwhile.
            os.utime(path)

    def _insert(self, name: str, chunk: bytes) -> None:
        path = self._path(name)
        try:
            path.parent.mkdir(exist_ok=True)
            before = path.stat().st_size if path.exists() else 0
            with atomic_write(path, durable=False) as temporary:  # a chunk has a checksum
                temporary.write_bytes(chunk + _checksum(chunk))
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            if not self._warned_of_full_disk:
                log.warning("%s: the disk is full; nothing more is cached", self.folder)
            self._warned_of_full_disk = True
            return
        self._account(len(chunk) + _TRAILER - before)

    # ------------------------------------------------------------------------------ eviction

    def _account(self, grown: int) -> None:
        """Add to the recorded size; over the limit, measure the folder and evict."""
        with open(self.folder / "bytes", "a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            recorded = file.read()
            total = int(recorded) + grown if recorded.isdigit() else self._evict()
            if total > self.limit_bytes:
                total = self._evict()
            file.seek(0)
            file.truncate()
            file.write(str(max(0, total)))

    def _evict(self) -> int:
        """Remove the least recently used chunks, and what killed processes left; returns the bytes
        that remain."""
        chunks = []
        for folder in self.folder.glob("??"):
            remove_leftovers(folder, older_than_seconds=3600)
            for path in folder.iterdir():
                with suppress(FileNotFoundError):  # Evicted meanwhile.
                    status = path.stat()
                    if path.suffix != TEMPORARY_SUFFIX:
                        chunks.append((status.st_mtime, status.st_size, path))
        chunks.sort()
        total = sum(size for _, size, _ in chunks)
        if total <= self.limit_bytes:
            return total
        for _, size, path in chunks:
            if total <= EVICTION_TARGET * self.limit_bytes:
                break
            path.unlink(missing_ok=True)
            total -= size
        return total

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Hold the lock for fetching that all chunks in the same subfolder share."""
        with open(self.folder / "locks" / self._path(name).parent.name, "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _checksum(chunk: bytes) -> bytes:
    return zlib.crc32(chunk).to_bytes(_TRAILER, "little")
