"""The code that a run was trained with: its commit, and a copy of its files in the run folder."""

import gzip
import hashlib
import io
import os
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

from cavmae.atomic_write import write_bytes

COMMAND_VARIABLE = "CAVMAE_COMMAND"
"""Environment variable by which a launcher tells its ranks the command that it was started by."""
_PARTS = ("trainer", "kernels", "dataloaders", "cluster")


def save_code(run_dir: Path) -> str:
    """Save the running Python files as `code/HASH.tar.gz`, unless an earlier attempt ran the same
    code; returns the hash."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, path in sorted(code_files().items()):
            content = path.read_bytes()
            entry = tarfile.TarInfo(name)  # no times and owners: the same files, the same bytes
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    code = hashlib.sha256(packed.getvalue()).hexdigest()[:16]
    target = run_dir / "code" / f"{code}.tar.gz"
    if not target.exists():
        target.parent.mkdir(exist_ok=True)
        write_bytes(target, gzip.compress(packed.getvalue()))
    return code


def code_files() -> dict[str, Path]:
    """Return the running Python files by the names that they have in an installed package."""
    root = Path(__file__).resolve().parents[2]  # of a checkout, or the package of a wheel
    top = root / "cavmae" if (root / "cavmae").is_dir() else root
    files = {f"cavmae/{path.name}": path for path in top.glob("*.py")}
    for part in _PARTS:
        for path in (root / part).rglob("*.py"):
            files[f"cavmae/{path.relative_to(root)}"] = path
    return files


def started_by() -> str:
    """Return the command that started this process, or the launcher of its ranks."""
    if told := os.environ.get(COMMAND_VARIABLE):
        return told
    module = getattr(getattr(sys.modules["__main__"], "__spec__", None), "name", "").removesuffix(
        ".__main__"
    )
    program = ["python", "-m", module] if module else [Path(sys.argv[0]).name]
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank=")]
    return shlex.join([*program, *words])


def git_commit() -> str | None:
    """Return the commit of the running code, with `-dirty` where tracked files differ from it.

    A Ray `working_dir` has no repository: `cavmae submit` passes the commit on. None where the
    commit is unknown, as in an installed wheel.
    """
    if passed_on := os.environ.get("CAVMAE_COMMIT"):
        return passed_on
    file = Path(__file__).resolve()
    # An installed copy may be inside somebody else's checkout: only a tracked file counts.
    tracked = _git(file.parent, "ls-files", "--error-unmatch", file.name)
    if tracked is None:
        return None
    return _git(file.parent, "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        result = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True)
    except FileNotFoundError:
        return None  # git is not installed
    return result.stdout.strip() if result.returncode == 0 else None
