"""A run folder keeps the code that it was trained with, and knows its commit."""

import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from cavmae.trainer.tracking import code_snapshot
from cavmae.trainer.tracking.code_snapshot import (
    COMMAND_VARIABLE,
    git_commit,
    save_code,
    started_by,
)

ROOT = Path(__file__).parents[3]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_a_run_folder_keeps_each_version_of_the_code_once(tmp_path: Path) -> None:
    code = save_code(tmp_path)
    assert save_code(tmp_path) == code, "no times or owners in it"
    (kept,) = (tmp_path / "code").iterdir()
    with tarfile.open(kept) as archive:
        names = archive.getnames()
        file = archive.extractfile("cavmae/trainer/tracking/code_snapshot.py")
        assert file and file.read() == Path(code_snapshot.__file__).read_bytes()
    assert {"cavmae/cli.py", "cavmae/kernels/similarity/tiles.py"} <= set(names)
    assert not [name for name in names if "tests" in name or ".venv" in name]


def test_git_commit_is_that_of_the_checkout_of_the_code(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    head = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True).strip()
    commit = git_commit()
    assert commit is not None and commit.removesuffix("-dirty") == head


def test_git_commit_tells_clean_changed_and_untracked_copies_apart(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True)

    def commit_of_copy() -> str:
        code = "import code_snapshot; print(code_snapshot.git_commit())"
        return subprocess.check_output([sys.executable, "-c", code], cwd=tmp_path, text=True)

    copy = tmp_path / "code_snapshot.py"
    shutil.copy(ROOT / "trainer/tracking/code_snapshot.py", copy)
    git("init", "--quiet")
    git("commit", "--quiet", "--allow-empty", "-m", "empty")
    assert commit_of_copy() == "None\n"
    git("add", "code_snapshot.py")
    git("commit", "--quiet", "-m", "code")
    assert re.fullmatch(r"[0-9a-f]{40}\n", commit_of_copy())
    copy.write_text(copy.read_text() + "\n")
    assert re.fullmatch(r"[0-9a-f]{40}-dirty\n", commit_of_copy())


@pytest.mark.parametrize(
    ("module", "told", "expected"),
    [
        ("", "", "cavmae pretrain demo --run-dir 'a b'"),
        ("cavmae.__main__", "", "python -m cavmae pretrain demo --run-dir 'a b'"),
        ("", "cavmae train demo", "cavmae train demo"),  # by the driver of a rank on Ray
    ],
)
def test_the_command_is_that_of_the_person_who_started_the_run(
    module: str, told: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["/venv/bin/cavmae", "--local_rank=1", "pretrain", "demo", "--run-dir", "a b"]
    monkeypatch.setattr(sys, "argv", words)
    spec = SimpleNamespace(name=module) if module else None
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__spec__=spec))
    monkeypatch.setenv(COMMAND_VARIABLE, told)
    assert started_by() == expected
