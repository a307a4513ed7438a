"""The import contract of pyproject.toml holds for this tree and breaks when a tree violates it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("cavmae", "benchmarks", "cluster", "dataloaders", "kernels", "trainer")


def check_imports(tree: Path) -> subprocess.CompletedProcess[str]:
    command = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    return subprocess.run(
        [sys.executable, "-c", command, "--no-cache", "--no-logo"],
        cwd=tree,
        env={"PYTHONPATH": str(tree)},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for folder in FOLDERS:
        shutil.copytree(
            ROOT / folder,
            tmp_path / folder,
            symlinks=True,
            ignore=shutil.ignore_patterns("__pycache__", "results"),
        )
    return tmp_path


def test_contract_holds_for_this_tree(tree: Path) -> None:
    result = check_imports(tree)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " 0 broken" in result.stdout


@pytest.mark.parametrize(
    ("file", "statement", "broken_contract"),
    [
        (
            "dataloaders/bad.py",
            "import cavmae.kernels",
            "Dependencies point one way",
        ),
        (
            "dataloaders/packing/bad.py",
            "from cavmae.dataloaders.loading import reader",
            "Data loaders: loading and packing are independent",
        ),
        (
            "kernels/bad.py",
            "from cavmae.trainer import config",
            "Dependencies point one way",
        ),
        (
            "cluster/bad.py",
            "from cavmae import benchmarks",
            "Dependencies point one way",
        ),
        (
            "trainer/model/bad.py",
            "import numpy",
            "Kernels and model run where only torch and triton are installed",
        ),
        (
            "trainer/model/bad.py",
            "from cavmae.trainer.config.configs import LossConfig",
            "The model knows nothing of the rest of the trainer",
        ),
        (
            "trainer/bad.py",
            "def late():\n    import deepspeed",
            "DeepSpeed has one owner",
        ),
        (
            "benchmarks/bad.py",
            "import mlflow.tracking",
            "MLflow has one owner",
        ),
        (
            "dataloaders/bad.py",
            "from nvidia.dali import fn",
            "DALI has one owner",
        ),
        (
            "trainer/tasks/bad.py",
            "from cavmae.trainer import validator",
            "The main path of the trainer points down",
        ),
        (
            "trainer/evaluation/bad.py",
            "from cavmae.trainer.run import run",
            "Evaluation, embeddings and release never import the trainer",
        ),
        (
            "trainer/config/bad.py",
            "import torch",
            "Configurations import no torch",
        ),
        (
            "trainer/bad.py",
            "import ray.train",
            "Ray stays in cluster",
        ),
    ],
)
def test_contract_breaks_on_a_forbidden_import(
    tree: Path, file: str, statement: str, broken_contract: str
) -> None:
    (tree / file).write_text(statement + "\n")
    result = check_imports(tree)
    assert result.returncode == 1, result.stdout + result.stderr
    assert f"{broken_contract} BROKEN" in result.stdout
    assert "bad" in result.stdout.split("Broken contracts")[1]
