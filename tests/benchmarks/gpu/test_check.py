"""`cavmae bench gpu-check` where little is installed, and what it makes of failures."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cavmae.benchmarks.gpu import check
from cavmae.benchmarks.step.training_step import SIZES

REPOSITORY = Path(__file__).parents[3]
EXCERPT = REPOSITORY / "tests" / "golden" / "data"

BLOCKED = [
    *("deepspeed", "ray", "nvidia", "mlflow", "tyro", "rich", "av", "webdataset", "matplotlib"),
    "psutil",
]
BLOCKING = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
from cavmae.benchmarks.gpu.check import main
sys.exit(main({arguments}))
"""


def results_in(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("gpu-check-*.json")
    return json.loads(path.read_text())["results"]


@pytest.fixture
def tiny_golden(tmp_path: Path) -> Path:
    shutil.copytree(EXCERPT / "tiny_train", tmp_path / "golden" / "tiny_train")
    return tmp_path / "golden"


@pytest.mark.slow
def test_runs_where_only_torch_triton_and_numpy_are_installed(
    tmp_path: Path, tiny_golden: Path
) -> None:
    arguments = ["--model", "tiny", "--device", "cpu", "--repeats", "2"]
    arguments += ["--golden", str(tiny_golden), "--out", str(tmp_path / "out")]
    result = subprocess.run(
        [sys.executable, "-c", BLOCKING.format(blocked=set(BLOCKED), arguments=arguments)],
        cwd=REPOSITORY,
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    results = results_in(tmp_path / "out")
    assert results["training"]["status"] == "passed"
    assert results["tiny_train"]["status"] == "passed"
    assert results["tiny_train"]["details"]["cases"]["seed0"]["compared"] > 100
    assert results["step"]["details"]["precisions"]["bf16"]["speedup"]["median"] > 0
    assert results["kernels"]["status"] == "passed"
    assert results["kernels"]["details"]["cases"]["gather_tokens"]["both"]["ours"]
    for part, reason in (
        ("kernels_agree", "on a CPU under TRITON_INTERPRET=1"),
        ("golden_forward", "has no pretrain_forward/index.json"),
        ("throughput", "is measured on a GPU; this is cpu"),
        ("train", "is measured on a GPU; this is cpu"),
        ("limits", "is measured on a GPU; this is cpu"),
    ):
        assert results[part]["status"] == "skipped"
        assert reason in results[part]["reason"]


@pytest.mark.slow
def test_an_altered_reference_and_a_part_that_breaks_fail_alone_and_the_run(
    tmp_path: Path,
    tiny_golden: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(check, "disagreements", lambda *_: ({}, []))  # test_kernels.py has them
    path = tiny_golden / "tiny_train" / "seed0.json"
    record = json.loads(path.read_text())
    record["history"][2][0] += 1e-3
    path.write_text(json.dumps(record))
    (tiny_golden / "pretrain_forward").mkdir()
    (tiny_golden / "pretrain_forward" / "index.json").write_text("no JSON")
    small = ["--model", "tiny", "--device", "cpu", "--repeats", "1"]
    code = check.main([*small, "--golden", str(tiny_golden), "--out", str(tmp_path / "out")])
    assert code == 1
    results = results_in(tmp_path / "out")
    assert results["tiny_train"]["status"] == results["golden_forward"]["status"] == "failed"
    assert "history step 2 loss" in results["tiny_train"]["reason"]
    assert "JSONDecodeError" in results["golden_forward"]["reason"]
    assert results["step"]["status"] == "passed"
    assert "Traceback" in capsys.readouterr().err


def test_parts_that_would_start_too_late_are_skipped_with_the_reason(tmp_path: Path) -> None:
    small = ["--model", "tiny", "--device", "cpu", "--seconds", "-1", "--out", str(tmp_path)]
    assert check.main(small) == 0
    for part in results_in(tmp_path).values():
        assert part["status"] == "skipped"
        assert "--seconds" in part["reason"]


def test_a_golden_folder_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--golden is .*absent, which is no folder"):
        check.main(["--golden", str(tmp_path / "absent")])


def test_the_training_loop_is_left_out_where_a_package_that_it_needs_is_absent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in BLOCKED:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "cavmae.benchmarks.harness.processes", raising=False)
    beginning = check.Check(
        device=torch.device("cuda"),
        golden=None,
        config=SIZES["tiny"],
        batches=[8],
        repeats=1,
        deadline=math.inf,
        model="tiny",
        best=(8, False),
    )
    with pytest.raises(check.Skip, match=r"needs .*psutil.*; install cavmae whole"):
        check.training_loop(beginning)
