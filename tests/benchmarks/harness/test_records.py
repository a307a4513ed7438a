"""Benchmark records carry what makes a number comparable."""

import json
import re
from pathlib import Path

import torch

from cavmae.benchmarks.harness.records import timing, write_record


def test_record_holds_configuration_hardware_versions_and_commit(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    path = write_record(
        tmp_path / "results",
        "step",
        cpu,
        {"batch": 8, "videos": str(tmp_path / "clips"), "work_dir": "runs/x"},
        {"x": 1.5},
    )
    record = json.loads(path.read_text())
    assert re.fullmatch(r"step-\d{8}T\d{6}-.+\.json", path.name)
    assert path.stem.endswith(record["commit"])
    assert re.fullmatch(r"unknown|[0-9a-f]{10}(-dirty)?", record["commit"])
    assert record["configuration"] == {"batch": 8, "videos": "clips", "work_dir": "runs/x"}
    assert record["results"] == {"x": 1.5}
    assert record["versions"]["torch"] == torch.__version__
    assert record["versions"]["flash-attn"] is None or isinstance(
        record["versions"]["flash-attn"], str
    )
    assert record["hardware"]["device"] == "cpu"
    assert record["hardware"]["cores"] >= 1


def test_timing_keeps_every_time_beside_median_and_spread() -> None:
    summary = timing([3.0, 1.0, 2.0])
    assert summary["median_seconds"] == 2.0
    assert (summary["minimum_seconds"], summary["maximum_seconds"]) == (1.0, 3.0)
    assert summary["all_seconds"] == [3.0, 1.0, 2.0]
    assert timing([4.0])["upper_quartile_seconds"] == 4.0
