"""Files that appear whole: a reader, a crash or a power cut meets the old content or the new one.

Everything that the package writes as one file goes through here. The content goes to a temporary
file in the same folder, is flushed to the disk and renamed over the old one; the folder is flushed
after that, since a rename alone may be lost with the power. Temporary names are random: process
ids repeat in the containers that share a folder.
"""

import errno
import json
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cavmae.credentials import redacted

TEMPORARY_SUFFIX = ".partial"
_KEPT_NAME_BYTES = 200
"""Of a file's name in that of its temporary file; file systems allow 255 in all."""


@contextmanager
def atomic_write(path: str | Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path to write to, which replaces `path` at the end; an error removes it.

    Args:
        path: the file to write; its folder has to exist. If it is a link, the file that it leads
            to is written, as `open` would.
        durable: whether to flush to the disk. False suits files that are rewritten many times a
            second or carry a checksum, which a power cut may cost.

    Raises:
        OSError: the file could not be written, with its name even where the disk is full.
    """
    path = os.path.realpath(path)
    temporary = temporary_path(path)
    try:
        with named_errors(path):
            yield temporary
            commit(temporary, path, durable=durable)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def temporary_path(path: str | Path) -> Path:
    """A new name beside `path`, for writers that outlive a `with` block; end with `commit`."""
    path = Path(path)
    name = path.name.encode()[:_KEPT_NAME_BYTES].decode(errors="ignore")
    return path.with_name(f"{name}.{secrets.token_hex(8)}{TEMPORARY_SUFFIX}")


def commit(temporary: Path, path: str | Path, *, durable: bool = True) -> None:
    """Flush a closed temporary file to the disk and rename it to `path`."""
    if durable:
        sync(temporary)
    os.replace(temporary, path)
    if durable:
        sync(Path(path).parent)


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to the disk.

    Shared folders of virtual machines, FUSE and some network file systems have no fsync, for
    folders or at all; there is nothing to wait for on them.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


@contextmanager
def named_errors(path: str | Path) -> Iterator[None]:
    """Name the file in errors of calls that do not know it, such as a write to a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def remove_leftovers(folder: Path, older_than_seconds: float = 0) -> None:
    """Remove the temporary files that killed processes left in a folder.

    Args:
        folder: searched without its subfolders; it may be missing.
        older_than_seconds: spares files that were written to since; 0 where nobody else can be
            writing.
    """
    for path in folder.glob(f"*{TEMPORARY_SUFFIX}"):
        with suppress(FileNotFoundError):  # its writer has just renamed it
            if time.time() - path.stat().st_mtime >= older_than_seconds:
                path.unlink()


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file atomically."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


def write_new(path: str | Path, data: bytes) -> None:
    """Write a file atomically where there is none; of several processes, one succeeds.

    Raises:
        FileExistsError: there is one.
        OSError: it could not be written.
    """
    path = Path(path)
    temporary = temporary_path(path)
    try:
        with named_errors(path):
            temporary.write_bytes(data)
            sync(temporary)
            try:
                os.link(temporary, path)
            except FileExistsError:
                raise
            except OSError:  # SMB, FUSE and the like have no hard links
                path.touch(exist_ok=False)
                os.replace(temporary, path)
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    write_bytes(path, text.encode())


def write_json(path: str | Path, document: object) -> None:
    """Write a JSON file atomically, without the credentials of URLs: errors and command lines that
    are kept in files quote them.

    Raises:
        ValueError: a float that is not finite.
        OSError: the file could not be written.
    """
    write_text(path, redacted(json.dumps(document, indent=2, allow_nan=False)) + "\n")


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, or not an object.
    """
    try:
        document = json.loads(Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise ValueError(f"{path} holds a {type(document).__name__}; expected a JSON object")
    return document
