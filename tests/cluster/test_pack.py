"""Packing on a Ray cluster: the same bytes and the same report as without."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from launch import ROOT
from rich.console import Console

from cavmae.cluster import pack as cluster_pack
from cavmae.command import exit_code
from cavmae.dataloaders.packing import pack as local_pack
from cavmae.dataloaders.packing.pack import PackConfig
from cavmae.dataloaders.tools.synthetic import generate


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.slow
def test_ray_packs_the_same_bytes_and_goes_on_where_another_stopped(tmp_path: Path) -> None:
    listing = generate(tmp_path / "videos", 40, seed=1, size=32, seconds=1.0)
    (tmp_path / "videos" / "000007.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    options = {"clips_per_shard": 16, "workers": 2, "deduplicate": True}
    local, on_ray = tmp_path / "local", tmp_path / "ray"
    local_pack.pack(PackConfig(str(listing), str(local), **options), Console(quiet=True))  # pyright: ignore[reportArgumentType]
    words = [str(listing), str(on_ray), "--clips-per-shard", "16", "--deduplicate"]
    # In a process of its own: Ray reads its environment when it is imported.
    command = [sys.executable, "-m", "cavmae", "pack", *words, "--workers", "2", "--ray"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert files(on_ray) == files(local)
    assert json.loads((on_ray / "report.jsonl").read_text())["source"] == "000007.mp4"
    # A shard is lost; a start without Ray goes on, and ends with the same bytes.
    (on_ray / "finished" / "000001.json").unlink()
    assert cluster_pack.main([*words, "--workers", "1"]) == 0
    assert files(on_ray) == files(local)


def test_the_module_alone_knows_no_cluster(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(tmp_path), str(tmp_path / "out"), "--ray"]
    assert exit_code(local_pack.main, words) == 1
    assert "ray is set, which only `cavmae pack` supports" in (capsys.readouterr().err)
