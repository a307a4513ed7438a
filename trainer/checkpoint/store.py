"""Where checkpoints lie: a folder that all ranks reach, or a URL of an object store.

Both do the little that checkpoints need, and promise the same: a small file appears whole or not at
all, and a large one is on the disk, or with the store, when its writing ends. No folder is renamed,
which object stores cannot do.
"""

import os
import shutil
import uuid
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, cast

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
"""Read or sent at once. S3 takes 10,000 parts a file: 640 GB."""
STORE_TRIES = 2
"""Of a request to a store, each with the tries of its library; a checkpoint that fails is tried
again as well."""


@dataclass(frozen=True)
class FileSum:
    """Attributes: bytes, a file's length; crc32, its CRC-32."""

    bytes: int
    crc32: int


class _SummedFile:
    """A file to write to, whose length and checksum are known without reading it.

    Args:
        send: takes the bytes on.
    """

    def __init__(self, send: Callable[[memoryview], object]) -> None:
        self._send = send
        self._bytes = self._crc32 = 0
        self._error: OSError | None = None

    def filled(self, save: "Save") -> FileSum:
        """What `save` has written.

        Raises:
            OSError: `send` raised it; torch.save would tell of a position that it did not expect.
        """
        try:
            save(cast(IO[bytes], self))
        except RuntimeError:
            if self._error is not None:
                raise self._error from None
            raise
        return FileSum(self._bytes, self._crc32)

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
        """What takes the bytes on is flushed when the writing ends."""


Save = Callable[[IO[bytes]], object]


class Store(Protocol):
    """Files below one folder, by names such as `step-000000010/manifest.json`.

    Attributes:
        far: it answers over a network and may keep one waiting.
    """

    far: bool

    def place(self, name: str = "") -> str:
        """Path or URL, for people."""
        ...

    def folders(self) -> list[str]:
        """Names of the folders directly in it, sorted; none where it is not there.

        Raises:
            OSError: it could not be read.
        """
        ...

    def files(self, folder: str) -> dict[str, int]:
        """Bytes of all files below a folder of it, by their names in that folder; raises alike."""
        ...

    def size(self, name: str) -> int | None:
        """Bytes of a file; None: it is not there; raises alike."""
        ...

    def read(self, name: str) -> bytes:
        """A whole file.

        Raises:
            FileNotFoundError: it is not there.
            OSError: it could not be read, however often it was tried.
        """
        ...

    def blocks(self, name: str, size: int) -> Iterator[bytes]:
        """The first `size` bytes of a file, a block at a time; raises as `read`."""
        ...

    def put(self, name: str, data: bytes) -> None:
        """Write a small file, which is there whole or not at all, even after a power cut.

        Raises:
            OSError: it could not be written.
        """
        ...

    def write(self, name: str, save: Save) -> FileSum:
        """Write a large file, durable when this returns.

        Args:
            save: writes the content; called again where a try failed.

        Returns:
            What was handed over, which a reader can compare with what is there.

        Raises:
            OSError, RuntimeError: it could not be written; a part of it may be there.
        """
        ...

    def remove_file(self, name: str) -> None:
        """Remove a file, durably; one that is not there is no error. Raises OSError."""
        ...

    def remove_folder(self, folder: str) -> None:
        """Remove all files below a folder; raises alike."""
        ...


def open_store(folder: str | Path) -> Store:
    """The store of a folder or URL.

    Raises:
        ValueError: no package is installed for this kind of URL.
    """
    try:
        opened = open_storage(folder, None)
    except ValueError as error:
        raise ValueError(f"checkpoint.folder: {error}") from error
    if isinstance(opened, LocalFolder):
        return LocalStore(opened.folder)
    assert isinstance(opened, RemoteFolder)
    return ObjectStore(opened.url)


def check_writable(store: Store) -> None:
    """Write a small file, read it and remove it, so that a wrong place is told at the start.

    Raises:
        ValueError: there is no such bucket, or no right to use it.
        OSError: the store does not answer, or the disk is full.
    """
    name = f"probe-{uuid.uuid4().hex}"
    try:
        store.put(name, b"probe")
        store.read(name)
        store.remove_file(name)
    except OSError as error:
        text = f"checkpoint.folder {store.place()} cannot be written, read and cleared: {error}"
        lasting = (FileNotFoundError, PermissionError)
        if isinstance(error, lasting) or isinstance(error.__cause__, lasting):
            raise ValueError(f"{text}; make the bucket or folder, and allow all three") from error
        raise OSError(text) from error


class LocalStore:
    """A folder that this machine mounts."""

    far = False

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def place(self, name: str = "") -> str:
        return str(self.folder / name)

    def folders(self) -> list[str]:
        if not self.folder.is_dir():
            return []
        return sorted(path.name for path in self.folder.iterdir() if path.is_dir())

    def files(self, folder: str) -> dict[str, int]:
        top = self.folder / folder
        return {
            path.relative_to(top).as_posix(): path.stat().st_size
            for path in top.rglob("*")
            if path.is_file()
        }

    def size(self, name: str) -> int | None:
        path = self.folder / name
        return path.stat().st_size if path.is_file() else None

    def read(self, name: str) -> bytes:
        return LocalFolder(self.folder).read(name)

    def blocks(self, name: str, size: int) -> Iterator[bytes]:
        with open(self.folder / name, "rb") as file:
            while size > 0 and (block := file.read(min(size, BLOCK_BYTES))):
                size -= len(block)
                yield block

    def put(self, name: str, data: bytes) -> None:
        partial = f"{name}.partial"
        try:
            self.write(partial, lambda file: file.write(data))
            os.replace(self.folder / partial, self.folder / name)
        except OSError:
            (self.folder / partial).unlink(missing_ok=True)
            raise
        self._sync_folders(name)

    def write(self, name: str, save: Save) -> FileSum:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            written = _SummedFile(file.write).filled(save)
            file.flush()
            os.fsync(file.fileno())
        self._sync_folders(name)
        return written

    def remove_file(self, name: str) -> None:
        path = self.folder / name
        if path.exists():
            path.unlink()
            self._sync_folders(name)

    def remove_folder(self, folder: str) -> None:
        if (self.folder / folder).exists():
            shutil.rmtree(self.folder / folder)

    def _sync_folders(self, name: str) -> None:
        """Make the entries that lead to a file durable."""
        for folder in (self.folder / name).parents:
            sync_folder(folder)
            if folder == self.folder:
                break


def sync_folder(folder: Path) -> None:
    """Make the entries of a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class ObjectStore:
    """A URL of an object store, through fsspec."""

    far = True

    def __init__(self, url: str) -> None:
        self._reading = RemoteFolder(url, None)
        self._files, self._path = open_url(self._reading.url)

    def place(self, name: str = "") -> str:
        return self._reading.location(name).rstrip("/")

    def folders(self) -> list[str]:
        found = self._asked(lambda: self._files.ls(self._path, detail=True), [])
        folders = [one["name"] for one in found if one["type"] == "directory"]
        return sorted(name.rstrip("/").rpartition("/")[2] for name in folders)

    def files(self, folder: str) -> dict[str, int]:
        top = f"{self._path}/{folder}"
        found = self._asked(lambda: self._files.find(top, detail=True), {})
        return {name.removeprefix(f"{top}/"): one["size"] for name, one in found.items()}

    def size(self, name: str) -> int | None:
        return self._asked(lambda: self._files.info(f"{self._path}/{name}")["size"], None)

    def read(self, name: str) -> bytes:
        return self._reading.read(name)

    def blocks(self, name: str, size: int) -> Iterator[bytes]:
        file = StoredFile(name, "", size)
        for start in range(0, size, BLOCK_BYTES):
            yield self._reading.read_range(file, start, BLOCK_BYTES)

    def put(self, name: str, data: bytes) -> None:
        def once() -> None:
            with as_os_errors():
                self._files.pipe_file(f"{self._path}/{name}", data)

        retried(once, self.place(name), STORE_TRIES, may_be_missing=True, done="written")

    def write(self, name: str, save: Save) -> FileSum:
        def once() -> FileSum:
            with as_os_errors():
                file = self._files.open(f"{self._path}/{name}", "wb", block_size=BLOCK_BYTES)
            try:
                written = _SummedFile(lambda block: self._send(file, block)).filled(save)
                with as_os_errors():
                    file.close()
            except BaseException:
                # Closed in the usual way, or by the garbage collector, it would send what it has.
                with suppress(Exception):
                    file.discard()
                file.closed = True
                raise
            return written

        return retried(once, self.place(name), STORE_TRIES, may_be_missing=True, done="written")

    def remove_file(self, name: str) -> None:
        with suppress(FileNotFoundError), as_os_errors():
            self._files.rm_file(f"{self._path}/{name}")

    def remove_folder(self, folder: str) -> None:
        with suppress(FileNotFoundError), as_os_errors():
            self._files.invalidate_cache()
            self._files.rm(f"{self._path}/{folder}", recursive=True)

    def _send(self, file: Any, block: memoryview) -> None:
        with as_os_errors():
            file.write(block)

    def _asked(self, question: Callable[[], Any], missing: Any) -> Any:
        """An answer of the store itself, not of fsspec's memory; `missing` where nothing is."""

        def once() -> Any:
            with as_os_errors():
                self._files.invalidate_cache()
                return question()

        try:
            return retried(once, self.place(), STORE_TRIES, may_be_missing=True)
        except FileNotFoundError:
            return missing
