"""`cavmae bench video-check` says what is absent and how to have it."""

import json
from pathlib import Path

import pytest
import torch

from cavmae.benchmarks.video_check import dali, library, main


def test_absent_library_is_named_with_its_fix() -> None:
    probe = library("libnvcuvid_of_another_world.so.1", "install it")
    assert not probe.present
    assert "libnvcuvid_of_another_world" in probe.detail
    assert probe.fix == "install it"


def test_present_library_needs_no_fix() -> None:
    assert library("libc.so.6", "install it").fix == ""


def test_dali_is_probed_in_its_own_process() -> None:
    pytest.importorskip("nvidia.dali")
    assert dali().detail.startswith("version ")


def test_record_and_exit_code_say_whether_video_decodes_here(tmp_path: Path) -> None:
    code = main(["--out", str(tmp_path)])
    (path,) = tmp_path.glob("video-check-*.json")
    results = json.loads(path.read_text())["results"]
    assert code == (0 if results["ready"] else 1)
    assert [probe["name"] for probe in results["probes"]] == [
        "GPU",
        "libcuda.so.1",
        "libnvcuvid.so.1",
        "DALI",
    ]
    assert results["probes"][0]["present"] == torch.cuda.is_available()
