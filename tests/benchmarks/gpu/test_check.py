"""`cavmae bench gpu-check`: where little is installed, and what it makes of failures and hangs."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from launch import ROOT

from cavmae.benchmarks.gpu import check, stage
from cavmae.benchmarks.gpu.setting import Check, Found, Skip

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


@pytest.mark.long
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


@pytest.fixture
def run_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Run a program in the place of a stage: as quick to start as Python itself."""

    def run(program: str, within_seconds: float) -> dict[str, Any]:
        (tmp_path / "made_up.py").write_text(program)
        monkeypatch.setattr(check, "stage", SimpleNamespace(__name__="made_up"))
        return check.run_stage(("word",), within_seconds, {"PYTHONPATH": str(tmp_path)})

    return run


BEGINS = """
import json, os, subprocess, sys
child = subprocess.Popen(["sleep", "100"])
details = {"word": sys.argv[1], "child": child.pid}
found = {"status": "ended", "reason": "", "key": "half", "details": details}
json.dump(found, open(sys.argv[2], "w"))
"""


def has_ended(process_id: int) -> bool:
    """Whether a process is gone, or only its exit code is left for its parent."""
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        ("child.wait()", "ended after 6 s, with what it had found by then"),
        ("os.abort()", "ended with exit code -6"),
        ("sys.exit(0)", "ended with exit code 0"),
    ],
)
def test_a_stage_that_hangs_or_dies_is_ended_with_what_it_started_and_keeps_what_it_had_found(
    run_program: Callable[..., dict[str, Any]], end: str, reason: str
) -> None:
    found = run_program(BEGINS + end, within_seconds=6)
    assert (found["status"], found["key"], found["reason"]) == ("ended", "half", reason)
    assert found["details"]["word"] == "word"
    assert found["seconds"] < 30
    until = time.monotonic() + 20
    while not has_ended(found["details"]["child"]) and time.monotonic() < until:
        time.sleep(0.01)
    assert has_ended(found["details"]["child"])


def test_a_stage_that_dies_before_it_finds_anything_says_so(
    run_program: Callable[..., dict[str, Any]],
) -> None:
    found = run_program("raise SystemExit(3)", within_seconds=20)
    assert (found["status"], found["reason"]) == ("ended", "ended with exit code 3")
    assert found["details"] == {}


def skips(_: Check) -> Iterator[Found]:
    yield Found("half", {"half": 1})
    raise Skip("there is no GPU")


def breaks(_: Check) -> Iterator[Found]:
    yield Found("half", {"half": 1})
    raise KeyError("absent")


def differs(_: Check) -> Iterator[Found]:
    yield Found("", {})
    yield Found("whole", {"number": float("nan")}, ["a is beyond", "b is beyond"])


def agrees(_: Check) -> Iterator[Found]:
    yield Found("whole", {})


@pytest.mark.parametrize(
    ("function", "status", "reason", "key"),
    [
        (skips, "skipped", "there is no GPU", "half"),
        (breaks, "failed", "KeyError: 'absent'", "half"),
        (differs, "failed", "a is beyond; b is beyond", "whole"),
        (agrees, "passed", "", "whole"),
    ],
)
def test_a_stage_writes_how_it_ended_beside_what_it_had_found(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    function: Any,
    status: str,
    reason: str,
    key: str,
) -> None:
    made_up = SimpleNamespace(function=function)
    monkeypatch.setitem(sys.modules, "cavmae.benchmarks.gpu.made_up", made_up)
    path = tmp_path / "found.json"
    stage.main(["made_up:function", json.dumps(vars(ON_CPU)), str(path)])
    found = json.loads(path.read_text())
    assert (found["status"], found["reason"], found["key"]) == (status, reason, key)
    assert ("beyond" in found["details"]) == (function is differs)


def test_a_stage_that_no_longer_fits_into_the_budget_is_skipped_with_the_time_that_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check.main(["--device", "cpu", "--budget", "9s", "--out", str(tmp_path)]) == 0
    results = results_in(tmp_path)
    assert list(results) == list(check.STAGES)
    for name, one in results.items():
        assert one["status"] == "skipped"
        expected = rf"takes about {check.STAGES[name].seconds:.0f} s: \d s are left"
        assert re.fullmatch(expected, one["reason"])
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
