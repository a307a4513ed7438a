"""Contenders of `cavmae bench data` load the same things; its numbers count what they say."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from batches import given

from cavmae.benchmarks.data import loader
from cavmae.benchmarks.data.published_loader import PublishedDataset, fbank
from cavmae.dataloaders.media.log_mel import log_mel


def test_the_published_filter_banks_are_the_log_mel() -> None:
    waveform = torch.randn(160000, generator=torch.Generator().manual_seed(0)) * 0.1
    ours = log_mel([waveform], 128, 1024, torch.device("cpu"))[0, :998]
    theirs = fbank(waveform - waveform.mean())
    assert theirs.shape == ours.shape
    assert (ours - theirs).abs().max() < 2e-3 and (ours - theirs).abs().mean() < 2e-5


def test_cpu_time_of_children_is_counted_while_they_run() -> None:
    before = loader.cpu_seconds()
    child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        deadline = time.monotonic() + 60  # of a loaded machine
        while loader.cpu_seconds() - before <= 0.2:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert loader.memory_bytes() > 10_000_000
    finally:
        child.kill()
        child.wait()


@pytest.mark.long
@pytest.mark.slow
def test_a_short_run_fills_the_record(tmp_path: Path) -> None:
    words = ["--clips", "4", "--rounds", "1", "--batches", "1", "--workers", "1"]
    folders = ["--work-dir", str(tmp_path / "work"), "--out", str(tmp_path)]
    assert loader.main([*words, "--memory-samples", "640", *folders]) == 0
    (path,) = tmp_path.glob("data-*.json")
    results = json.loads(path.read_text())["results"]
    assert path.with_suffix(".png").exists()
    assert all(found["clips_per_second"] > 0 for found in results["contenders"].values())
    assert {"cavmae frames, 1 workers", "published, 1 workers", "PyAV, raw 720p, 1 workers"} <= set(
        results["contenders"]
    )
    assert len(results["memory"]["points"]) == 10
    # The same clip by the published way: the same spectrogram and picture as ours.
    work = tmp_path / "work" / "4-clips"
    published = PublishedDataset(work / "published", 4)
    ours = next(iter(loader._loader(work / "wav" / "frames")))
    number = int(ours.sample_ids[0].rpartition("/")[2])
    spectrogram, picture = published[number]
    assert (spectrogram - given(ours.log_mel)[0]).abs().max() < 1e-2
    assert picture.shape == given(ours.frames)[0, 0].shape


def test_counts_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="rounds is 0; use 1 or more"):
        loader.LoaderBenchConfig(rounds=0)
