"""`cavmae bench gpu-check`: where little is installed, and what it makes of failures and hangs."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from launch import ROOT

from cavmae.benchmarks.gpu import check
from cavmae.benchmarks.gpu.setting import Check

EXCERPT = ROOT / "tests" / "golden" / "data"
BARE = str(ROOT / "tests" / "support" / "bare")
ON_CPU = Check("cpu", True, str(EXCERPT), float("inf"), "")


def results_in(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("gpu-check-*.json")
    return json.loads(path.read_text())["results"]


@pytest.fixture
def tiny_golden(tmp_path: Path) -> Path:
    shutil.copytree(EXCERPT / "tiny_train", tmp_path / "golden" / "tiny_train")
    return tmp_path / "golden"


@pytest.mark.slow
def test_a_bare_checkout_runs_where_only_torch_triton_and_numpy_are_installed(
    tmp_path: Path, tiny_golden: Path
) -> None:
    path = tiny_golden / "tiny_train" / "seed0.json"
    record = json.loads(path.read_text())
    record["history"][2][0] += 1e-3
    path.write_text(json.dumps(record))
    words = ["--device", "cpu", "--stages", "kernels,eager,golden,loop,baseline"]
    words += ["--golden", str(tiny_golden), "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-m", "cavmae", "bench", "gpu-check", *words],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": BARE, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    results = results_in(tmp_path / "out")
    outcomes = {name: one["status"] for name, one in results.items()}
    assert outcomes == {
        "kernels": "passed", "eager": "passed", "golden": "failed", "loop": "skipped",
        "baseline": "passed",
    }  # fmt: skip
    assert "history step 2 loss" in results["golden"]["reason"]
    assert results["golden"]["details"]["cases"]["ten steps in both precisions"]["beyond"] == []
    assert "the training loop needs deepspeed" in results["loop"]["reason"]
    assert [row["batch"] for row in results["eager"]["details"]["rows"]] == [16, 8, 4]
    assert all(row["samples_per_second"] > 0 for row in results["eager"]["details"]["rows"])
    assert set(check.STAGES) >= set(results)
    for name, one in results.items():
        (line,) = (line for line in done.stdout.splitlines() if line.startswith(f"{name} "))
        assert line.split()[1] == one["status"]


def run_body(tmp_path: Path, body: str, within_seconds: float = 60) -> dict[str, Any]:
    """Run a stage that a test has written."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, types\n"
        "module = types.ModuleType('cavmae.benchmarks.gpu.made_up')\n"
        f"sys.modules[module.__name__] = module\n"
        f"exec({body!r}, vars(module))\n"
    )
    words = "made_up:made_up", json.dumps(vars(ON_CPU))
    return check.run_stage(words, within_seconds, {"PYTHONPATH": str(tmp_path)})


HANGS = """
def made_up(check):
    from cavmae.benchmarks.gpu.setting import Found
    import subprocess
    child = subprocess.Popen(["sleep", "100"])
    yield Found("half", {"half": 1, "child": child.pid})
    child.wait()
"""


def test_a_stage_that_hangs_is_ended_with_what_it_started_and_keeps_what_it_had_found(
    tmp_path: Path,
) -> None:
    began = time.monotonic()
    found = run_body(tmp_path, HANGS, within_seconds=30)
    assert time.monotonic() - began < 60
    assert (found["status"], found["key"], found["details"]["half"]) == ("ended", "half", 1)
    assert "ended after 30 s" in found["reason"]
    child = Path(f"/proc/{found['details']['child']}/stat")
    assert not child.exists() or child.read_text().split()[2] == "Z"


DIES = """
def made_up(check):
    from cavmae.benchmarks.gpu.setting import Found
    import os
    yield Found("half", {"half": 1})
    os.abort()
"""


def test_a_stage_whose_process_dies_says_how_and_keeps_what_it_had_found(tmp_path: Path) -> None:
    found = run_body(tmp_path, DIES)
    assert (found["status"], found["details"]) == ("ended", {"half": 1})
    assert found["reason"] == "ended with exit code -6"


def test_a_stage_that_no_longer_fits_into_the_budget_is_skipped_with_the_time_that_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check.main(["--device", "cpu", "--budget", "9s", "--out", str(tmp_path)]) == 0
    results = results_in(tmp_path)
    assert list(results) == list(check.STAGES)
    for name, one in results.items():
        assert one["status"] == "skipped"
        assert one["reason"] == f"takes about {check.STAGES[name].seconds:.0f} s: 9 s are left"
    assert "compiled" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--golden", "absent"], r"--golden is absent, which is no folder"),
        (["--stages", "kernels,speeed"], r"--stages names speeed; use some of kernels, attention"),
        (["--budget", "8"], r"budget is 8; use a time such as 90s, 10m or 2h"),
    ],
)
def test_bad_options_are_named(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check.main(words)
