"""The import contract of pyproject.toml holds for this tree and breaks when a tree violates it."""

import re
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


def copied_tree(folder: Path) -> Path:
    shutil.copy(ROOT / "pyproject.toml", folder)
    for name in FOLDERS:
        shutil.copytree(
            ROOT / name,
            folder / name,
            symlinks=True,
            ignore=shutil.ignore_patterns("__pycache__", "results"),
        )
    return folder


def test_contract_holds_for_this_tree(tmp_path: Path) -> None:
    result = check_imports(copied_tree(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    assert " 0 broken" in result.stdout


FORBIDDEN = [
    # file, statement, imported module, contract that it breaks
    (
        "dataloaders/bad.py",
        "import cavmae.kernels",
        "cavmae.kernels",
        "Dependencies point one way",
    ),
    (
        "kernels/bad.py",
        "from cavmae.trainer import config",
        "cavmae.trainer.config",
        "Dependencies point one way",
    ),
    (
        "cluster/bad.py",
        "from cavmae import benchmarks",
        "cavmae.benchmarks",
        "Dependencies point one way",
    ),
    (
        "dataloaders/packing/bad.py",
        "from cavmae.dataloaders.loading import reader",
        "cavmae.dataloaders.loading.reader",
        "Data loaders: loading and packing are independent",
    ),
    (
        "trainer/model/bad_library.py",
        "import numpy",
        "numpy",
        "Kernels and model run where only torch and triton are installed",
    ),
    (
        "trainer/model/bad.py",
        "from cavmae.trainer.config.configs import LossConfig",
        "cavmae.trainer.config.configs",
        "The model knows nothing of the rest of the trainer",
    ),
    (
        "trainer/bad_engine.py",
        "def late():\n    import deepspeed",
        "deepspeed",
        "DeepSpeed has one owner",
    ),
    (
        "benchmarks/bad.py",
        "import mlflow.tracking",
        "mlflow",
        "MLflow has one owner",
    ),
    (
        "dataloaders/bad_library.py",
        "from nvidia.dali import fn",
        "nvidia",
        "DALI has one owner",
    ),
    (
        "trainer/tasks/bad.py",
        "from cavmae.trainer import validator",
        "cavmae.trainer.validator",
        "The main path of the trainer points down",
    ),
    (
        "trainer/evaluation/bad.py",
        "from cavmae.trainer.run import run",
        "cavmae.trainer.run",
        "Evaluation, inference, embeddings and release never import the trainer",
    ),
    (
        "trainer/config/bad.py",
        "import torch",
        "torch",
        "Configurations import no torch",
    ),
    (
        "trainer/bad_ray.py",
        "import ray.train",
        "ray",
        "Ray stays in cluster",
    ),
]


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What is said of a tree with all forbidden imports: reading a tree takes seconds."""
    tree = copied_tree(tmp_path_factory.mktemp("broken"))
    for file, statement, *_ in FORBIDDEN:
        (tree / file).write_text(statement + "\n")
    result = check_imports(tree)
    assert result.returncode == 1, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize(("file", "statement", "imported", "contract"), FORBIDDEN)
def test_contract_breaks_on_a_forbidden_import(
    broken: str, file: str, statement: str, imported: str, contract: str
) -> None:
    assert f"{contract} BROKEN" in broken
    said = broken.split("Broken contracts")[1].split(f"\n{contract}\n---")[1]
    module = "cavmae." + file.removesuffix(".py").replace("/", ".")
    line = 1 + statement.count("\n")
    assert f"{module} -> {imported} (l.{line})" in re.split(r"\n-----*\n", said)[0]
