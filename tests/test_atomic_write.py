"""Files that the package writes are seen whole: the old content or the new one, never a part."""

import errno
import multiprocessing
import os
import re
import stat
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cavmae.atomic_write import (
    TEMPORARY_SUFFIX,
    atomic_write,
    commit,
    read_json,
    remove_leftovers,
    temporary_path,
    write_json,
    write_text,
)

CONTENT = st.binary(max_size=2000)
ROOT = Path(__file__).parents[1]
RENAMES_A_FOLDER = {"benchmarks/data/clips.py", "benchmarks/faults/soak_faults.py"}


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is flushed to the disk, in order: "file" or "folder"."""
    kinds: list[str] = []
    flush = os.fsync

    def fsync(descriptor: int) -> None:
        kinds.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        flush(descriptor)

    monkeypatch.setattr("os.fsync", fsync)
    return kinds


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@settings(deadline=None, max_examples=50)
@given(old=st.none() | CONTENT, pieces=st.lists(CONTENT, max_size=4), fails=st.booleans())
def test_a_reader_sees_the_old_content_or_the_new_one(
    old: bytes | None, pieces: list[bytes], fails: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result"
        if old is not None:
            path.write_bytes(old)

        def seen() -> bytes | None:
            return path.read_bytes() if path.exists() else None

        try:
            with atomic_write(path, durable=fails) as temporary, temporary.open("wb") as file:
                for piece in pieces:
                    file.write(piece)
                    file.flush()
                    assert seen() == old
                if fails:
                    raise RuntimeError("on purpose")
        except RuntimeError:
            assert seen() == old
        else:
            assert seen() == b"".join(pieces)
        assert names(Path(folder)) == ([] if seen() is None else ["result"])


def _rewrite(path: Path, content: bytes, times: int) -> None:
    for _ in range(times):
        with atomic_write(path, durable=False) as temporary:
            temporary.write_bytes(content)


def test_readers_and_writers_in_several_processes_meet_whole_files(tmp_path: Path) -> None:
    path = tmp_path / "result"
    contents = [bytes([number]) * 100_000 for number in range(2)]
    path.write_bytes(contents[0])
    spawn = multiprocessing.get_context("fork")
    writers = [spawn.Process(target=_rewrite, args=(path, one, 200)) for one in contents]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert path.read_bytes() in contents
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert names(tmp_path) == ["result"]


def test_processes_with_one_id_write_to_different_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Process 1 of two containers, in a folder that both mount."""
    monkeypatch.setattr("os.getpid", lambda: 1)
    path = tmp_path / "result"
    with atomic_write(path) as first, atomic_write(path) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first", "the one that ends last"
    assert names(tmp_path) == ["result"]


def test_the_file_is_on_the_disk_before_its_name_and_the_name_after(
    tmp_path: Path, synced: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.replace

    def replace(*paths: str | Path) -> None:
        synced.append("rename")
        rename(*paths)

    monkeypatch.setattr("os.replace", replace)
    with atomic_write(tmp_path / "result") as temporary:
        temporary.write_text("content")
    assert synced == ["file", "rename", "folder"]
    with atomic_write(tmp_path / "cache", durable=False) as temporary:
        temporary.write_text("content")
    assert synced[3:] == ["rename"]


@pytest.mark.parametrize("call", ["os.fsync", "os.replace"])
def test_a_failure_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "result"
    path.write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(call, fail)
        with pytest.raises(OSError, match=r"No space left on device: '.*/result'"):
            write_json(path, {"new": 1})
    assert path.read_text() == "old" and names(tmp_path) == ["result"]


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit, ValueError])
def test_an_interrupt_leaves_nothing(tmp_path: Path, interrupt: type[BaseException]) -> None:
    with pytest.raises(interrupt), atomic_write(tmp_path / "result") as temporary:
        temporary.write_text("half of it")
        raise interrupt
    assert names(tmp_path) == []


def test_a_full_disk_is_told_with_the_name_of_the_file(tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match=r"No space left on device: '.*/result'"),
        atomic_write(tmp_path / "result") as temporary,
    ):
        temporary.symlink_to("/dev/full")
        temporary.write_text("content")
    assert names(tmp_path) == []


def test_a_written_file_has_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    write_json(tmp_path / "result", {})
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_a_killed_writer_leaves_a_name_that_is_no_result(tmp_path: Path) -> None:
    left = temporary_path(tmp_path / "result.json")
    left.write_text("half of it")
    assert not list(tmp_path.glob("*.json")) and left.suffix == TEMPORARY_SUFFIX
    write_json(tmp_path / "result.json", {})
    remove_leftovers(tmp_path, older_than_seconds=3600)
    assert left.exists(), "somebody may be writing it"
    os.utime(left, (0, time.time() - 7200))
    remove_leftovers(tmp_path, older_than_seconds=3600)
    assert names(tmp_path) == ["result.json"]
    remove_leftovers(tmp_path / "missing")


def test_a_writer_that_outlives_a_block_commits(tmp_path: Path, synced: list[str]) -> None:
    temporary = temporary_path(tmp_path / "result")
    temporary.write_text("content")
    commit(temporary, tmp_path / "result")
    assert names(tmp_path) == ["result"] and synced == ["file", "folder"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_without_fsync_is_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """VirtualBox folders, SMB and FUSE refuse it (python-atomicwrites 27, borg 1290, rez 991)."""

    def refuse(_descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    write_text(tmp_path / "file", "written")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_disk_that_fails_to_flush_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_descriptor: int) -> None:
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="file"):
        write_text(tmp_path / "file", "written")


def test_a_link_is_followed_and_stays(tmp_path: Path) -> None:
    """As `open` does: a result may be linked to another disk (PortOS 1893)."""
    (tmp_path / "disk").mkdir()
    link = tmp_path / "result.json"
    link.symlink_to(tmp_path / "disk/result.json")
    write_text(link, "written")
    assert link.is_symlink() and (tmp_path / "disk/result.json").read_text() == "written"


def test_the_longest_name_of_a_file_system_can_be_written(tmp_path: Path) -> None:
    for name in ("n" * 255, "ä" * 127):
        write_text(tmp_path / name, name)
        assert (tmp_path / name).read_text() == name


def test_no_other_code_renames_files() -> None:
    """`Path.replace` has one argument; other things called `replace` have more."""
    rename = re.compile(r"\.rename\(|\bos\.replace\(|\.replace\([^,\n()]+\)")
    found = {
        path.relative_to(ROOT).as_posix()
        for folder in ("trainer", "dataloaders", "cluster", "benchmarks", "kernels")
        for path in (ROOT / folder).rglob("*.py")
        if rename.search(path.read_text())
    }
    assert found == RENAMES_A_FOLDER


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is not JSON"), ("[1]", "holds a list; expected a JSON object")],
)
def test_a_damaged_json_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(ValueError, match=f"result.json {message}"):
        read_json(tmp_path / "result.json")


def test_json_comes_back_and_refuses_what_it_can_not_hold(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_json(path, {"loss": 1.0})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"loss": float("nan")})
    assert read_json(path) == {"loss": 1.0} and names(tmp_path) == ["result.json"]
