"""`cavmae doctor` finds what is wrong with a machine, and prints how to fix it."""

import importlib.util
import resource
import shutil
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from starts import place_store

from cavmae.cluster.local import checks, doctor
from cavmae.cluster.local.doctor import (
    DoctorConfig,
    examine,
    main,
    operators,
    packages,
    shard_access,
    tracking_store,
)
from cavmae.dataloaders.config import DataConfig
from cavmae.dataloaders.packing.pack import PackConfig, pack


def test_a_machine_that_runs_the_tests_can_train(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--quick", "--run-dir", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    for name in ("Python", "packages", "DALI", "GPU", "bf16", "open files", "C++ compiler"):
        assert name in said
    assert "problem: 0" in said
    if not torch.cuda.is_available():
        assert "warning  GPU" in said and "NVDEC" not in said


def test_a_problem_is_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--quick", "--run-dir", str(tmp_path), "--shards", str(tmp_path / "none")]) == 1
    assert "problem: 1" in capsys.readouterr().out


def test_an_absent_and_an_old_package_are_named_with_the_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    required = [Requirement("numpy>=2"), Requirement("ray>=99"), Requirement("no-such-package>=1")]
    monkeypatch.setattr(doctor, "_requirements", lambda: (">=3.11", required))
    fitting, old, absent = packages()
    assert fitting.found.startswith("numpy ")
    assert (old.name, old.state, old.advice) == ("ray", "problem", "pip install 'ray>=99'")
    assert (absent.found, absent.advice) == ("not installed", "pip install 'no-such-package>=1'")


def test_dali_of_either_cuda_is_dali(monkeypatch: pytest.MonkeyPatch) -> None:
    required = [Requirement("nvidia-dali-cuda999>=2")]
    monkeypatch.setattr(doctor, "_requirements", lambda: (">=3.11", required))
    if importlib.util.find_spec("nvidia.dali") is None:
        pytest.skip("DALI is not installed")
    assert len(packages()) == 1


def test_an_absent_library_is_named_with_its_fix() -> None:
    found = checks.library("libnvcuvid_of_another_world.so.1", "install it")
    assert (found.state, found.advice) == ("problem", "install it")
    assert "libnvcuvid_of_another_world" in found.found
    assert checks.library("libc.so.6", "install it") == checks.Finding("libc.so.6", "ok", "loads")


def test_few_open_files_are_a_warning() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
        found = checks.limits()[0]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (found.name, found.state, found.found) == ("open files", "warning", "at most 512")
    assert found.advice.startswith("ulimit -n ")


def test_disk_is_looked_at_where_a_folder_will_be(tmp_path: Path) -> None:
    later = tmp_path / "not" / "yet"
    assert checks.disk("runs", later, 1).state == "ok"
    full = checks.disk("runs", later, 1e18)
    assert full.state == "warning" and "1000000000 GB are needed" in full.advice
    (tmp_path / "file").touch()
    assert checks.disk("runs", tmp_path / "file" / "below", 1).state == "problem"
    assert not later.exists()


def test_the_store_of_a_file_answers_or_will_be_created(tmp_path: Path) -> None:
    later = tracking_store("", tmp_path / "runs")
    assert later.state == "ok" and "the first run will create" in later.found
    assert not (tmp_path / "runs").exists()
    place_store(tmp_path)
    assert "1 experiments" in tracking_store("", tmp_path).found


def test_a_tracking_server_that_is_gone_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    found = tracking_store("http://127.0.0.1:9", tmp_path)
    assert found.state == "problem" and "127.0.0.1" in found.found
    assert len(found.found.splitlines()) == 1


@pytest.mark.parametrize("tier", ["frames", "video"])
def test_the_first_clip_of_a_set_is_read_and_decoded(packed_synthetic: Path, tier: str) -> None:
    found = shard_access(str(packed_synthetic / tier), DataConfig())
    assert found.state == "ok" and "24 clips; the first one was read and decoded" in found.found


def test_a_set_of_sound_alone_is_read_and_decoded(packed_synthetic: Path, tmp_path: Path) -> None:
    videos = str(packed_synthetic.parent / "videos" / "clips.csv")
    pack(PackConfig(videos, str(tmp_path / "set"), "audio", workers=1))
    assert shard_access(str(tmp_path / "set" / "audio"), DataConfig()).state == "ok"


def test_a_damaged_clip_and_a_missing_set_are_problems(
    packed_synthetic: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(packed_synthetic / "frames", tmp_path / "frames")
    first = folder / "000000.tar"
    data = bytearray(first.read_bytes())
    data[512:6000] = bytes(5488)
    first.write_bytes(data)
    damaged = shard_access(str(folder), DataConfig())
    assert damaged.state == "problem" and f"cavmae verify {folder}" in damaged.advice
    absent = shard_access(str(tmp_path / "absent"), DataConfig())
    assert absent.state == "problem" and "absent" in absent.found


@pytest.mark.slow
def test_the_operator_compiles() -> None:
    found = operators()
    assert found.state == "ok", found


def test_quick_compiles_nothing(tmp_path: Path) -> None:
    names = [one.name for one in examine(DoctorConfig(run_dir=str(tmp_path), quick=True))]
    assert "DeepSpeed's operator" not in names
    assert "tracking store" in names and "shards" not in names
