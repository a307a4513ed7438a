"""Storage of shards: a folder, or any URL that fsspec opens (s3://, gs://, https://, ...).

Both read whole files and ranges, and both retry reads that fail. Remote bytes are cached in chunks
on a disk of the node, so that an epoch transfers the set once.
"""

import logging
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

from cavmae.dataloaders.config import CacheSettings
from cavmae.dataloaders.shards.cache import ChunkCache

OPEN_FILES = 384
"""Files that a local folder keeps open; 64 lanes with a window of 4,096 samples have about 320
shards in use at once, and processes may commonly hold 1,024 files."""
LOCAL_TRIES = 3
REMOTE_TRIES = 6
FIRST_WAIT_SECONDS = 0.5
"""Wait before the second try; doubles with each further one, with up to 50% of jitter."""

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class StoredFile:
    """A file of known content.

    Attributes:
        name: in its folder.
        version: changes when the bytes do; names the file's chunks in the cache.
        bytes: its length.
    """

    name: str
    version: str
    bytes: int


def open_storage(folder: str | Path, cache: CacheSettings | None) -> "Storage":
    """Open the storage of a folder or URL.

    Raises:
        ValueError: no package is installed for this kind of URL, or it is `pipe:`.
    """
    text = str(folder)
    protocol, colon, _ = text.partition(":")
    if colon and protocol.lower() == "pipe":
        raise ValueError(f"{text} would run a command; give a folder or a URL of an object store")
    if protocol == "file" or "://" not in text:
        return LocalFolder(Path(text.removeprefix("file://")))
    return RemoteFolder(text, cache)


def real_place(folder: str) -> str:
    """A folder's absolute path without links, which is its own wherever it is asked for; a URL as
    it is."""
    return folder if "://" in folder else os.path.realpath(folder)


def open_url(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the URL's path in it.

    Raises:
        ValueError: no package is installed for this kind of URL.
    """
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ValueError(
            f"{url} cannot be opened ({error}); s3:// needs `pip install 'cavmae[s3]'`, "
            f"gs:// `pip install gcsfs`"
        ) from error


def retried(
    call: Callable[[], T],
    place: str,
    tries: int,
    *,
    may_be_missing: bool,
    again: Callable[[], None] = lambda: None,
    done: str = "read",
) -> T:
    """Call up to `tries` times with exponential backoff, until `OSError` is not raised.

    Args:
        call: raises `OSError` for errors that may be transient.
        place: path or URL, for the error.
        tries: calls in all.
        may_be_missing: `FileNotFoundError` is an answer; otherwise a mount may be lost.
        again: called before each further try.
        done: participle of what is tried, for the error.

    Raises:
        FileNotFoundError: on the first try, where the file may be missing.
        OSError: the last try failed as well.
    """
    wait_seconds = FIRST_WAIT_SECONDS
    for number in range(1, tries + 1):
        try:
            return call()
        except OSError as error:
            if may_be_missing and isinstance(error, FileNotFoundError):
                raise
            if number == tries:
                raise OSError(
                    f"{place} could not be {done} in {tries} tries "
                    f"({type(error).__name__}: {error})"
                ) from error
            log.warning("%s: try %d of %d failed: %s", place, number, tries, error)
            time.sleep(wait_seconds * random.uniform(1.0, 1.5))
            wait_seconds *= 2
            again()
    raise AssertionError("unreachable")


class LocalFolder:
    """Reads the files of a folder on a mounted file system. Pickled copies open their own."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder}

    @cached_property
    def _opened(self) -> Any:
        return lru_cache(OPEN_FILES)(partial(_OpenFile, self.folder))

    def location(self, name: str) -> str:
        """The file's path, for messages."""
        return str(self.folder / name)

    def read(self, name: str, *, may_be_missing: bool = True) -> bytes:
        """The current content of a file.

        Raises:
            FileNotFoundError: the file does not exist.
            OSError: every try to read it failed.
        """
        path = self.folder / name
        return retried(path.read_bytes, str(path), LOCAL_TRIES, may_be_missing=may_be_missing)

    def read_sidecar(self, name: str, file: StoredFile) -> bytes:
        """A whole file that changes only when `file` does; raises like `read`."""
        return self.read(name, may_be_missing=False)

    def read_range(self, file: StoredFile, offset: int, size: int) -> bytes:
        """Bytes `offset` to `offset + size`; fewer if the file is shorter than it should be.

        Raises:
            OSError: every try to read them failed.
        """
        return retried(
            lambda: self._read_range(file.name, offset, size),
            self.location(file.name),
            LOCAL_TRIES,
            may_be_missing=False,
            # After an outage, a network file system needs its files reopened.
            again=self._opened.cache_clear,
        )

    def forget(self, file: StoredFile, offset: int, size: int) -> bool:
        """Drop a range with wrong bytes from the cache; False if there is no cache."""
        return False

    def _read_range(self, name: str, offset: int, size: int) -> bytes:
        file = self._opened(name)
        parts = []
        while size > 0:
            part = os.pread(file.descriptor, size, offset)
            if not part:
                break
            parts.append(part)
            offset += len(part)
            size -= len(part)
        return b"".join(parts)


class _OpenFile:
    """Closes its descriptor when the last thread that reads it drops it."""

    def __init__(self, folder: Path, name: str):
        self.descriptor = os.open(folder / name, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class RemoteFolder:
    """Fetches the files of a URL by range and caches them in chunks; its methods are those of
    `LocalFolder`.

    Credentials and endpoints are fsspec's: the store's own environment variables (such as
    `AWS_ACCESS_KEY_ID`), or `FSSPEC_S3_ENDPOINT_URL` and the like.

    Args:
        url: such as `s3://bucket/shards/video`.
        cache: where chunks are cached; None: nowhere.

    Raises:
        ValueError: no package is installed for this kind of URL.
    """

    def __init__(self, url: str, cache: CacheSettings | None):
        self.url = url.rstrip("/")
        self._files, self._folder = open_url(self.url)
        self._cache = None
        if cache and cache.limit_bytes:
            self._cache = ChunkCache(Path(cache.folder), cache.limit_bytes)
            self._chunk_bytes = cache.chunk_bytes

    def location(self, name: str) -> str:
        return f"{self.url}/{name}"

    def read(self, name: str) -> bytes:
        try:
            data = self._fetched(name, may_be_missing=True)
        except FileNotFoundError:
            raise
        except OSError as error:
            cached = None if self._cache is None else self._cache.get(self.location(name))
            if cached is None:
                raise
            log.warning("%s; using the cached copy", error)
            return cached
        if self._cache is not None:
            self._cache.put(self.location(name), data)
        return data

    def read_sidecar(self, name: str, file: StoredFile) -> bytes:
        if self._cache is None:
            return self._fetched(name)
        return self._cache.get_or_fetch(f"{file.version} {name}", partial(self._fetched, name))

    def read_range(self, file: StoredFile, offset: int, size: int) -> bytes:
        stop = min(offset + size, file.bytes)
        if offset >= stop:
            return b""
        if self._cache is None:
            return self._fetched(file.name, (offset, stop))
        parts = [
            self._cache.range_or_fetch(
                chunk,
                end - first,
                max(offset, first) - first,
                min(stop, end) - first,
                partial(self._fetched, file.name, (first, end)),
            )
            for chunk, first, end in self._chunks(file, offset, stop)
        ]
        return b"".join(parts)

    def forget(self, file: StoredFile, offset: int, size: int) -> bool:
        if self._cache is None:
            return False
        for chunk, _, _ in self._chunks(file, offset, offset + size):
            self._cache.drop(chunk)
        return True

    def _chunks(self, file: StoredFile, offset: int, stop: int) -> Iterator[tuple[str, int, int]]:
        """Name, first byte and end of the chunks that a range touches."""
        length = self._chunk_bytes
        for first in range(offset // length * length, stop, length):
            end = min(first + length, file.bytes)
            yield f"{file.version} {first} {end}", first, end

    def _fetched(
        self, name: str, ends: tuple[int, int] | None = None, *, may_be_missing: bool = False
    ) -> bytes:
        start, stop = ends or (None, None)

        def fetch() -> bytes:
            with as_os_errors():
                data = self._files.cat_file(f"{self._folder}/{name}", start=start, end=stop)
            if ends and len(data) != ends[1] - ends[0]:
                raise OSError(f"received {len(data)} bytes instead of {ends[1] - ends[0]}")
            return data

        return retried(fetch, self.location(name), REMOTE_TRIES, may_be_missing=may_be_missing)


Storage = LocalFolder | RemoteFolder


@contextmanager
def as_os_errors() -> Iterator[None]:
    """Turn the exceptions of object-store libraries, most of them transient, into `OSError`."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error
