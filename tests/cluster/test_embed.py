"""`cavmae embed --workers`: the same values as in one process, also where a process dies."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from tiny_run import save_untrained

from cavmae import cli
from cavmae.benchmarks.harness.processes import Start, module_command
from cavmae.cluster.embed import RayEmbedConfig


@pytest.mark.slow
def test_ray_writes_the_same_values_also_where_a_process_dies(
    packed_synthetic: Path, tmp_path: Path
) -> None:
    save_untrained(packed_synthetic, tmp_path / "run")
    words = [str(tmp_path / "run"), str(packed_synthetic / "frames")]
    local, on_ray = tmp_path / "local", tmp_path / "ray"
    assert cli.main(["embed", *words, f"--out={local}", "--batch=5"]) == 0
    command = module_command(
        "cavmae", "embed", *words, f"--out={on_ray}", "--batch=5", "--workers=2"
    )
    start = Start([(command, {})], tmp_path / "log")
    try:
        start.wait_for(lambda: start.named("ray::Embedder"), "a process that embeds")[0].kill()
        start.finish()
    finally:
        start.kill()
    assert json.loads((on_ray / "embeddings.json").read_text())["rows"] == 24
    for file in sorted(local.glob("*.parquet")):
        one, other = (pq.read_table(folder / file.name) for folder in (local, on_ray))
        plain = [name for name in one.column_names if "embedding" not in name]
        assert other.select(plain).equals(one.select(plain))
        for name in ("audio_embedding", "video_embedding"):
            np.testing.assert_allclose(
                other[name].to_pylist(), one[name].to_pylist(), rtol=1e-6, atol=1e-6
            )


@pytest.mark.slow
def test_an_error_of_the_user_is_one_line_from_ray_too(
    packed_synthetic: Path, tmp_path: Path
) -> None:
    save_untrained(packed_synthetic, tmp_path / "run")
    words = (str(tmp_path / "run"), str(packed_synthetic / "frames"), f"--out={tmp_path}/out")
    copy = (tmp_path / "run" / "weights.pt").read_bytes()
    (tmp_path / "run" / "weights.pt").write_bytes(copy[:1000])
    start = Start(
        [(module_command("cavmae", "embed", *words, "--workers=1"), {})], tmp_path / "log"
    )
    try:
        start.wait_for(lambda: start.ended, "the end")
    finally:
        start.kill()
    assert start.processes[0].returncode == 1
    assert re.search("^error: .*weights.pt", start.text(), re.MULTILINE)
    assert "Traceback" not in start.text()


def test_fields_of_a_cluster_want_workers() -> None:
    with pytest.raises(ValueError, match="workers is 0, which embeds in this process, and addre"):
        RayEmbedConfig("run", ("s3://bucket/shards",), "out", address="auto")
    with pytest.raises(ValueError, match="gpus_per_worker is 2; a rank drives one GPU"):
        RayEmbedConfig("run", ("s3://bucket/shards",), "out", workers=2, gpus_per_worker=2)
