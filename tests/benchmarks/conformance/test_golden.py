"""`cavmae bench golden DIR` compares any folder of reference numbers, and says what differs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cavmae.benchmarks.conformance.golden import main
from cavmae.benchmarks.conformance.parts import PARTS

REPOSITORY = Path(__file__).parents[3]
EXCERPT = REPOSITORY / "tests" / "golden" / "data"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("contrastive.json", "classification_metrics.json", "patchify.npz"):
        shutil.copy(EXCERPT / name, tmp_path / name)
    (tmp_path / "published_curves").mkdir()
    (tmp_path / "notes.txt").touch()
    return tmp_path


def test_cases_pass_and_what_is_not_compared_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("patches/patchify") and "  pass  " in line for line in lines)
    assert "not compared: notes.txt (unknown to this version)" in lines
    assert any(line.startswith("not compared: published_curves (transcribed") for line in lines)


def test_a_value_beyond_its_limit_fails(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entries = json.loads((folder / "contrastive.json").read_text())
    entries[0]["nce_bidirect"] *= 1.0001
    (folder / "contrastive.json").write_text(json.dumps(entries))
    assert main([str(folder), "--cases", "contrastive"]) == 1
    printed = capsys.readouterr().out
    assert "beyond its limit: nce_bidirect: 1.00e-04 (limit 5e-06)" in printed
    assert "patches" not in printed


def test_cases_are_listed_without_comparing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(folder), "--cases", "patches", "--list"]) == 0
    assert capsys.readouterr().out == "patches/patchify\n"


def test_other_folders_and_names_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no folder .*absent"):
        main([str(folder / "absent")])
    with pytest.raises(ValueError, match="published_curves is no golden folder: it has none of"):
        main([str(folder / "published_curves")])
    with pytest.raises(ValueError, match="no case contains nonsense; --list shows their names"):
        main([str(folder), "--cases", "nonsense"])


def test_it_runs_outside_the_repository_without_tests(folder: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "cavmae", "bench", "golden", str(folder), "--list"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "patches/patchify" in result.stdout


def test_every_part_of_the_excerpt_has_cases() -> None:
    without = {name for name, part in PARTS.items() if not part.cases(EXCERPT)}
    assert without == {"gradients", "adapt_mae", "finetune_shapes", "finetune_gradients"}
