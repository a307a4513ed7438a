"""`cavmae bench tiers` compares what it says: the same clips, by size, cost and picture."""

import json
from pathlib import Path

import pytest

from cavmae.benchmarks.data import tiers
from cavmae.dataloaders.tools.synthetic import generate


@pytest.mark.slow
def test_a_short_run_fills_the_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    videos = generate(tmp_path / "videos", 6, seed=1, size=128, workers=1).parent
    words = ["--videos", str(videos), "--rounds", "1", "--work-dir", str(tmp_path / "work")]
    assert tiers.main([*words, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("tiers-*.json")
    results = json.loads(path.read_text())["results"]
    assert results["clips"] == 6
    pictures = results["pictures"]
    assert list(pictures) == ["frames", "video, vp9", "video, h264", "video, mjpeg", "original"]
    for name, found in pictures.items():
        assert found["decode_cpu_seconds"] > 0 and found["decode_clips_per_second"] > 0
        assert (found["psnr_db"] == tiers.LOSSLESS_DB) == (name == "original")
        assert found["psnr_db"] > 30
        assert found["gpu_clips_per_second"] is None
    sizes = [path.stat().st_size for path in videos.glob("*.mp4")]
    assert pictures["original"]["bytes"] == pytest.approx(sum(sizes) / len(sizes))
    assert pictures["original"]["pack_cpu_seconds"] == 0 < pictures["frames"]["pack_cpu_seconds"]
    assert results["sound"]["wav"]["bytes"] > results["sound"]["flac"]["bytes"]
    assert "Not measured on a GPU." in capsys.readouterr().out


def test_counts_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="rounds is 0; use 1 or more"):
        tiers.TiersConfig(rounds=0)
