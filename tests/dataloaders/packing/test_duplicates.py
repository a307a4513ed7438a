"""Duplicates, leakage between sets, statistics and sampling weights of a packed set."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from cavmae.dataloaders.media.log_mel import log_mel
from cavmae.dataloaders.packing.duplicates import LeakageError
from cavmae.dataloaders.packing.pack import PackConfig, pack
from cavmae.dataloaders.shards.shard_set import ShardSet
from cavmae.dataloaders.tools.verify import VerifyConfig, verify

WriteVideo = Callable[..., Path]
LABELS = {"a": "dog", "b": "dog;cat", "c": "cat", "d": "dog", "e": "bird"}


@pytest.fixture(scope="module")
def listing(tmp_path_factory: pytest.TempPathFactory, write_video: WriteVideo) -> Path:
    """Five clips; d.mkv has the content of a.mkv under another name."""
    folder = tmp_path_factory.mktemp("videos")
    for number, name in enumerate("abce"):
        tone = np.sin(np.arange(16000) * (0.05 + 0.03 * number)) * 9000
        frames = [np.full((48, 64, 3), 20 + 40 * number + f, np.uint8) for f in range(10)]
        write_video(folder / f"{name}.mkv", frames=frames, sound=tone.astype(np.int16))
    shutil.copy(folder / "a.mkv", folder / "d.mkv")
    lines = [f"{name}.mkv,,,{LABELS[name]}\n" for name in "abcde"]
    (folder / "clips.csv").write_text("path,start,end,labels\n" + "".join(lines))
    return folder / "clips.csv"


def packed(listing: Path, out: Path, **fields: object) -> Path:
    options = {"clips_per_shard": 2, "workers": 1, **fields}
    pack(PackConfig(str(listing), str(out), **options), Console(quiet=True))  # pyright: ignore[reportArgumentType]
    return out


@pytest.fixture(scope="module")
def once(listing: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed(listing, tmp_path_factory.mktemp("once") / "set")


def statistics(out: Path) -> dict:
    return json.loads((out / "statistics.json").read_bytes())


def skipped(out: Path) -> list[tuple[str, str]]:
    lines = (out / "report.jsonl").read_text().splitlines()
    return [(line["key"], line["reason"]) for line in map(json.loads, lines)]


def test_duplicates_are_reported_and_kept(once: Path) -> None:
    lines = (once / "duplicates.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"key": "000000003", "first": "000000000"}]
    assert ShardSet(once / "video").samples == 5 and statistics(once)["duplicates"] == 1
    assert all(not result.problems for result in verify(VerifyConfig(str(once))))


@pytest.mark.parametrize("workers", [1, 2])
def test_duplicates_are_dropped_on_request_whatever_the_workers(
    listing: Path, tmp_path: Path, workers: int
) -> None:
    out = packed(listing, tmp_path / "set", deduplicate=True, workers=workers)
    assert skipped(out) == [("000000003", "duplicate")]
    assert ShardSet(out / "frames").samples == 4 and statistics(out)["duplicates"] == 0


def test_a_restart_knows_the_content_of_finished_shards(listing: Path, tmp_path: Path) -> None:
    out = packed(listing, tmp_path / "set", deduplicate=True)
    whole = {path.name: path.read_bytes() for path in (out / "video").iterdir()}
    for shard in ("000000", "000001"):  # The first has the original, the second its double.
        (out / "finished" / f"{shard}.json").unlink()
        packed(listing, out, deduplicate=True)
        assert {path.name: path.read_bytes() for path in (out / "video").iterdir()} == whole
        assert skipped(out) == [("000000003", "duplicate")]


def test_statistics_count_classes_codecs_and_sound(once: Path) -> None:
    found = statistics(once)
    assert found["classes"] == {"dog": 3, "cat": 2, "bird": 1}
    assert found["source_codecs"] == {"ffv1": 5} and found["clips"] == 5
    assert found["seconds"] == pytest.approx(5, abs=0.1)


def test_log_mel_statistics_are_means_over_clips(once: Path) -> None:
    import io

    import av

    shards = ShardSet(once / "frames")
    values = []
    for shard, size in enumerate(shards.sizes):
        for sample in range(size):
            with av.open(io.BytesIO(shards.member(shard, sample, "flac")), "r") as container:
                parts = [frame.to_ndarray().reshape(-1) for frame in container.decode(audio=0)]
            waveform = torch.from_numpy(np.concatenate(parts).astype(np.int16))
            frames = 1 + (len(waveform) - 400) // 160
            values.append(log_mel([waveform], 128, frames, torch.device("cpu")))
    found = statistics(once)["log_mel"]
    assert found["clips"] == 5
    assert found["mean"] == pytest.approx(np.mean([float(v.mean()) for v in values]), abs=1e-4)
    assert found["std"] == pytest.approx(np.mean([float(v.std()) for v in values]), abs=1e-4)


def test_weights_are_the_published_ones(once: Path) -> None:
    dog, cat, bird = (1000 / (count + 0.01) for count in (3, 2, 1))
    for tier in ("frames", "video"):
        weights = ShardSet(once / tier).weights(0)
        assert weights.dtype == np.float32
        np.testing.assert_allclose(weights, [dog, dog + cat, cat, dog, bird], rtol=1e-6)


def test_a_clip_without_a_label_leaves_no_weights(listing: Path, tmp_path: Path) -> None:
    text = listing.read_text().replace("bird", "")
    other = listing.with_name("partly.csv")
    other.write_text(text)
    out = packed(other, tmp_path / "set")
    assert statistics(out)["clips_without_label"] == 1 and statistics(out)["weights"] is None
    assert not (out / "video" / "weights.npy").exists()


def test_a_clip_of_another_set_is_refused_by_name_and_by_content(
    listing: Path, once: Path, tmp_path: Path
) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    shutil.copy(listing.with_name("c.mkv"), videos / "c.mkv")
    with pytest.raises(LeakageError, match=r"1 clips of the list .* such as c\.mkv \("):
        packed(videos, tmp_path / "set", not_in=(str(once),))
    assert not (tmp_path / "set").exists(), "before anything was packed"
    (videos / "c.mkv").rename(videos / "renamed.mkv")
    with pytest.raises(LeakageError, match=r"renamed\.mkv has the audio and frames of .*000002"):
        packed(videos, tmp_path / "set", not_in=(str(once),))
    out = packed(videos, tmp_path / "set", not_in=(str(once),), allow_leakage=True)
    assert statistics(out)["clips_in_not_in"] == 1


def test_sets_that_share_nothing_pass(once: Path, tmp_path: Path, write_video: WriteVideo) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    write_video(videos / "new.mkv")
    out = packed(videos, tmp_path / "set", not_in=(str(once),))
    assert statistics(out)["clips_in_not_in"] == 0


def test_a_set_of_not_in_that_is_not_there_is_named(listing: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere has no finished shards; --not-in"):
        packed(listing, tmp_path / "set", not_in=(str(tmp_path / "nowhere"),))
