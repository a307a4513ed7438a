"""`cavmae bench video-check` decodes, sees what is wrong, and says what a GPU lacks."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cavmae.benchmarks.gpu import video
from cavmae.dataloaders.media.video_size import SMALLEST


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "SHAPES", {"16:9": (454, 256)})
    monkeypatch.setattr(video, "BATCH", 12)
    monkeypatch.setattr(video, "PICTURES", 1)
    monkeypatch.setattr(video, "TIMED_SECONDS", 0.0)
    monkeypatch.setattr(video, "TIMED_BATCHES", 1)


@pytest.mark.usefixtures("quick")
def test_every_codec_decodes_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--device", "cpu", "--threads", "2", "--out", str(tmp_path)]
    assert video.main(words) == 0
    (path,) = tmp_path.glob("video-check-*.json")
    rows = json.loads(path.read_text())["results"]["rows"]
    sizes = {(row["codec"], row["size"]) for row in rows}
    assert sizes == {
        *((codec, size) for codec in (*SMALLEST, "jpeg") for size in (video.MIXED, "16:9")),
        *((codec, "smallest") for codec in SMALLEST),
    }
    for row in rows:
        if row["codec"] == "h264":
            assert "the readers decode it" in row["skipped"]
        else:
            assert row["frames_per_second"] > 0 and row["psnr_db"] > 35
    assert "all pictures are those of the CPU" in capsys.readouterr().out


@pytest.mark.usefixtures("quick")
def test_a_picture_of_another_size_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a decoder is shared by two sizes: here every row is 16 pixels late."""
    frames = video._frames

    def sheared(codec: str, width: int, height: int) -> video.Frames:
        found = frames(codec, width, height)
        for pixels in found.pixels:
            pixels[:] = np.roll(pixels.reshape(-1, 3), 16, 0).reshape(pixels.shape)
        return found

    monkeypatch.setattr(video, "_frames", sheared)
    rows = video.check_video(torch.device("cpu"), 60, (1,))
    measured = [row for row in rows if "skipped" not in row and row["size"] != "smallest"]
    assert measured and all("below 30 dB" in row["failed"] for row in measured)


@pytest.mark.usefixtures("quick")
def test_no_row_begins_after_its_time() -> None:
    rows = video.check_video(torch.device("cpu"), 0.0, (1,))
    assert all("skipped" in row for row in rows)
    assert video.mixed_over_single(rows) == {}


def test_mixed_sizes_are_compared_with_single_ones() -> None:
    rates = {video.MIXED: 50.0, "16:9": 80.0, "4:3": 120.0, "smallest": 1000.0}
    rows = [
        {"codec": "vp9", "size": size, "threads": threads, "frames_per_second": threads * rate}
        for threads in (1, 7)
        for size, rate in rates.items()
    ]
    assert video.mixed_over_single(rows) == {"vp9": 0.5}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_is_absent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=r"without GPU, .*; mend that, or .* --device cpu"):
        video.main(["--out", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "libnvcuvid.so.1" in shown and "DALI" in shown
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
def test_every_codec_decodes_on_the_gpu() -> None:
    if absent := [one.name for one in video.findings() if one.state != "ok"]:
        pytest.skip(f"without {', '.join(absent)}")
    rows = video.check_video(torch.device("cuda"), 60.0)
    assert [row for row in rows if "failed" in row] == []
    assert min(video.mixed_over_single(rows).values()) > 0.5
