"""Where checkpoints are stored: a folder that all ranks reach, or a URL of an object store.

Both offer the little that checkpoints need, with the same guarantees: a small file appears whole or
not at all, and a large one is durable when `write` returns. No folder is renamed, which object
stores cannot do.
"""

import uuid
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from fsspec.implementations.local import LocalFileSystem

from cavmae.atomic_write import sync, write_bytes, write_new
from cavmae.dataloaders.shards.storage import (
    LocalFolder,
    RemoteFolder,
    StoredFile,
    as_os_errors,
    open_storage,
    open_url,
    retried,
)

BLOCK_BYTES = 64 << 20
"""Bytes read or sent at once. S3 takes 10,000 parts a file: 640 GB."""
STORE_TRIES = 2
"""Attempts of a request to a store, each with the retries of its library."""


@dataclass(frozen=True)
class FileDigest:
    """Length and CRC-32 of a file."""

    bytes: int
    crc32: int


Save = Callable[[IO[bytes]], object]
"""Writes a file's content, as torch.save does; called again where an attempt failed."""


class _DigestWriter:
    """A file to write to that computes length and checksum on the way.

    Args:
        send: passes the bytes on.
    """

    def __init__(self, send: Callable[[memoryview], object]) -> None:
        self._send = send
        self._bytes = self._crc32 = 0
        self._error: OSError | None = None

    def digest_of(self, save: Save) -> FileDigest:
        """Run `save` on this file and return the digest of what it wrote.

        Raises:
            OSError: `send` raised it; torch.save would report an unexpected position instead.
        """
        try:
            save(cast(IO[bytes], self))
        except RuntimeError:
            if self._error is not None:
                raise self._error from None
            raise
        return FileDigest(self._bytes, self._crc32)

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), BLOCK_BYTES):
            block = view[start : start + BLOCK_BYTES]
            try:
                self._send(block)
            except OSError as error:
                self._error = error
                raise
            self._crc32 = zlib.crc32(block, self._crc32)
        self._bytes += len(view)
        return len(view)

    def flush(self) -> None:
        """Do nothing: the file behind `send` is flushed when it is closed."""


class Store:
    """Files below one folder or URL, by names such as `step-000000010/manifest.json`.

    Every method raises OSError where the store could not be read or written, however often it was
    tried.

    Args:
        folder: a path that this machine mounts, or a URL that fsspec opens.

    Attributes:
        folder: the path; None for an object store.

    Raises:
        ValueError: no package is installed for this kind of URL.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder: Path | None = None
        self._files: Any = LocalFileSystem()
        try:
            reader = open_storage(folder, None)
        except ValueError as error:
            raise ValueError(f"checkpoint.folder: {error}") from error
        if isinstance(reader, LocalFolder):
            self.folder = reader.folder
            self._path = reader.folder.absolute().as_posix()
        else:
            assert isinstance(reader, RemoteFolder)
            self._files, self._path = open_url(reader.url)
        self._reader = reader

    @property
    def is_remote(self) -> bool:
        """Whether it answers over a network, which may take long."""
        return self.folder is None

    def location(self, name: str = "") -> str:
        """Return a path or URL, for messages."""
        return self._reader.location(name).rstrip("/")

    def folders(self, inside: str = "") -> list[str]:
        """List the names of the folders directly in it, or in one of its folders, sorted; none
        where that does not exist."""
        top = f"{self._path}/{inside}".rstrip("/")
        entries = self._query(lambda: self._files.ls(top, detail=True), [])
        # A link to a folder has the type "other".
        names = [one["name"].rstrip("/") for one in entries if one["type"] != "file"]
        return sorted(name.rpartition("/")[2] for name in names)

    def files(self, folder: str) -> dict[str, int]:
        """Return the bytes of all files below one of its folders, by their names in it."""
        top = f"{self._path}/{folder}"
        found = self._query(lambda: self._files.find(top, detail=True), {})
        return {name.removeprefix(f"{top}/"): one["size"] for name, one in found.items()}

    def size(self, name: str) -> int | None:
        """Return the bytes of a file; None where it does not exist."""
        return self._query(lambda: self._files.info(f"{self._path}/{name}")["size"], None)

    def read(self, name: str) -> bytes:
        """Read a whole file; raises FileNotFoundError where it does not exist."""
        return self._reader.read(name)

    def read_blocks(self, name: str, size: int) -> Iterator[bytes]:
        """Yield the first `size` bytes of a file, a block at a time."""
        # A reader keeps local files open, also when they are replaced: a new one does not.
        reader, file = open_storage(self.location(), None), StoredFile(name, "", size)
        for start in range(0, size, BLOCK_BYTES):
            yield reader.read_range(file, start, min(BLOCK_BYTES, size - start))

    def put(self, name: str, data: bytes) -> None:
        """Write a small file atomically and durably."""
        if self.folder is None:
            self.write(name, lambda file: file.write(data))  # an object appears whole
            return
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, data)
        self._sync_folders(name)

    def rewrite(self, name: str, data: bytes) -> None:
        """Write a small file over the bytes that it has, which needs no room on a full disk. A
        crash, or a reader at the same time, may meet some of either."""
        if self.folder is None:
            self.put(name, data)
            return
        with open(self.folder / name, "r+b") as file:
            file.write(data)
        sync(self.folder / name)

    def put_new(self, name: str, data: bytes) -> bool:
        """Write a small file atomically and durably where there is none.

        An object store that knows no such condition is asked first whether there is one.

        Returns:
            Whether it is there with this content. A request whose answer was lost is sent again,
            and may meet its own file.
        """
        try:
            self._create(name, data)
        except OSError:
            if self.size(name) is not None:
                return self.read(name) == data
            if self.folder is not None:
                raise
            self.put(name, data)
        return True

    def _create(self, name: str, data: bytes) -> None:
        """Write a file that does not exist yet; raises OSError where it does, as far as the store
        can tell."""
        if self.folder is None:
            with as_os_errors():
                self._files.pipe_file(f"{self._path}/{name}", data, mode="create")
            return
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_new(path, data)
        self._sync_folders(name)

    def write(self, name: str, save: Save) -> FileDigest:
        """Write a large file, durable when this returns; a failure may leave a part of it.

        Returns:
            The digest of what was written.

        Raises:
            RuntimeError: `save` raised it.
        """
        if self.folder is None:
            return retried(
                lambda: self._upload(name, save),
                self.location(name),
                STORE_TRIES,
                may_be_missing=True,
                done="written",
            )
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            written = _DigestWriter(file.write).digest_of(save)
        sync(path)
        self._sync_folders(name)
        return written

    def remove_file(self, name: str) -> None:
        """Remove a file, durably, if it exists."""
        with suppress(FileNotFoundError), as_os_errors():
            self._files.rm_file(f"{self._path}/{name}")
            self._sync_folders(name)

    def remove_folder(self, folder: str) -> None:
        """Remove all files below a folder."""
        with suppress(FileNotFoundError), as_os_errors():
            self._files.invalidate_cache()
            self._files.rm(f"{self._path}/{folder}", recursive=True)

    def _sync_folders(self, name: str) -> None:
        """Flush the folders that lead to a local file."""
        for folder in (self.folder / name).parents if self.folder else ():
            sync(folder)
            if folder == self.folder:
                break

    def _upload(self, name: str, save: Save) -> FileDigest:
        with as_os_errors():
            file = self._files.open(f"{self._path}/{name}", "wb", block_size=BLOCK_BYTES)

        def send(block: memoryview) -> None:
            with as_os_errors():
                file.write(block)

        try:
            written = _DigestWriter(send).digest_of(save)
            with as_os_errors():
                file.close()
        except BaseException:
            # close(), also by the garbage collector, would send the part that was written.
            with suppress(Exception):
                file.discard()
            file.closed = True
            raise
        return written

    def _query(self, question: Callable[[], Any], missing: Any) -> Any:
        """Ask the store itself, not fsspec's cache; return `missing` for a file not found."""

        def once() -> Any:
            with as_os_errors():
                self._files.invalidate_cache()
                return question()

        try:
            return retried(once, self.location(), STORE_TRIES, may_be_missing=True)
        except FileNotFoundError:
            return missing


def check_writable(store: Store) -> None:
    """Write a small file, read it and remove it, so that a bad folder fails at the start.

    Raises:
        ValueError: the bucket does not exist, or permissions are missing.
        OSError: the store does not answer, or the disk is full.
    """
    name = f"probe-{uuid.uuid4().hex}"
    try:
        store.put(name, b"probe")
        store.read(name)
        store.remove_file(name)
    except OSError as error:
        text = f"checkpoint.folder {store.location()} cannot be written, read and cleared: {error}"
        permanent = (FileNotFoundError, PermissionError)
        if isinstance(error, permanent) or isinstance(error.__cause__, permanent):
            raise ValueError(f"{text}; create the bucket or folder, and allow all three") from error
        raise OSError(text) from error
