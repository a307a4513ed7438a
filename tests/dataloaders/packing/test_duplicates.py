"""Duplicates, leakage between sets, statistics and sampling weights of a packed set."""

import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from cavmae import cli
from cavmae.dataloaders.media.log_mel import log_mel
from cavmae.dataloaders.packing.duplicates import LeakageError, source_id, youtube_id
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


def test_a_clip_of_another_set_is_refused_by_content_whatever_its_name(
    listing: Path, once: Path, tmp_path: Path
) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    shutil.copy(listing.with_name("c.mkv"), videos / "renamed.mkv")
    with pytest.raises(LeakageError, match=r"renamed\.mkv has the audio and frames of .*000002"):
        packed(videos, tmp_path / "set", not_in=(str(once),))
    out = packed(videos, tmp_path / "set", not_in=(str(once),), allow_leakage=True)
    assert statistics(out)["clips_in_not_in"] == 1


@pytest.fixture(scope="module")
def grey(tmp_path_factory: pytest.TempPathFactory, write_video: WriteVideo) -> Callable[..., Path]:
    """Write a clip of its own pictures and sound."""

    def write(path: Path, number: int) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        tone = np.sin(np.arange(16000) * (0.05 + 0.02 * number)) * 9000
        frames = [np.full((48, 64, 3), 10 + 20 * number + f, np.uint8) for f in range(10)]
        return write_video(path, frames=frames, sound=tone.astype(np.int16))

    return write


@pytest.mark.field
def test_equal_names_of_different_clips_only_warn(
    grey: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, name in enumerate(("train/dog/0001", "test/dog/0001", "test/cat/0001")):
        grey(tmp_path / f"{name}.mkv", number)
    for name in ("train", "test"):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            tar.add(tmp_path / name / "dog/0001.mkv", f"{0:09d}.mkv")
    words = ["--tiers=frames", "--workers=1"]
    for name in ("{}", "{}.tar"):
        train, test = (str(tmp_path / name.format(one)) for one in ("train", "test"))
        sets = [f"{one}-set" for one in (train, test)]
        assert cli.main(["pack", train, sets[0], *words]) == 0
        assert cli.main(["pack", test, sets[1], *words, "--not-in", sets[0]]) == 0
        assert statistics(Path(sets[1]))["clips_in_not_in"] == 0
    warned = capsys.readouterr().err
    assert warned.count("warning: 1 clips of the list have the names of clips of --not-in") == 1
    assert "dog/0001.mkv (" in warned and "cat/0001.mkv" not in warned


@pytest.mark.field
@pytest.mark.parametrize(
    ("listed", "file", "same"),
    [
        ("abcdefghijk_40.000", "abcdefghijk_40.000.mp4", True),
        ("---g-f_I2yQ_000001", "some/where/---g-f_I2yQ_000001.MKV", True),
        ("abcdefghijk_30.000_40.000", "abcdefghijk_30.000_40.000.webm", True),
        ("xyzxyzxyzxy_30.000", "xyzxyzxyzxy_30.500.mp4", False),
        ("xyzxyzxyzxy_30.000", "xyzxyzxyzxy_30.mp4", False),
        ("camera_left_0001.mp4", "camera_left_0001.mp4", False),
        ("v1.2.mp4", "v1.2.mp4", False),
    ],
)
def test_a_youtube_id_with_its_start_is_the_same_clip_in_any_list(
    listed: str, file: str, same: bool
) -> None:
    found = youtube_id(listed), youtube_id(file)
    assert (found[0] is not None and found[0] == found[1]) == same


@pytest.mark.field
def test_a_dot_of_a_name_is_no_extension() -> None:
    assert source_id("abcdefghijk_40.000") == source_id("abcdefghijk_40.000.mp4")
    assert source_id("xyz_30.000") != source_id("xyz_30.500")
    assert source_id("clip.v2") == source_id("clip.v2.mov") != source_id("clip.mov")
    assert source_id("dog/0001.mp4") != source_id("cat/0001.mp4")


@pytest.mark.field
def test_ids_and_content_are_waived_apart(grey: Callable[..., Path], tmp_path: Path) -> None:
    name = "abcdefghijk_40.000.mkv"
    grey(tmp_path / "train" / name, 0)
    grey(tmp_path / "same-id" / name, 1)
    shutil.copytree(tmp_path / "train", tmp_path / "same-content")
    (tmp_path / "same-content" / name).rename(tmp_path / "same-content/other.mkv")
    others = (str(packed(tmp_path / "train", tmp_path / "set", tiers="frames")),)
    for kind, message, waiver, other in (
        ("same-id", "have the YouTube id and start", "allow_same_ids", "allow_leakage"),
        ("same-content", "has the audio and frames", "allow_leakage", "allow_same_ids"),
    ):
        videos, out = tmp_path / kind, tmp_path / f"{kind}-set"
        with pytest.raises(LeakageError, match=message):
            packed(videos, out, tiers="frames", not_in=others, **{other: True})
        packed(videos, out, tiers="frames", not_in=others, **{waiver: True})
        assert statistics(out)["clips_in_not_in"] == 1


@pytest.mark.field
def test_a_clip_packed_in_any_way_has_one_content(
    grey: Callable[..., Path], tmp_path: Path
) -> None:
    """All tiers and codecs, other sizes, rates and choices."""
    grey(tmp_path / "videos/a.mkv", 3)
    ways: dict[str, dict[str, Any]] = {
        "frames": {"audio_codec": "wav"},
        "original": {"audio_channel": "first"},
        "video": {"video_codec": "mjpeg"},
        "frames,video": {"short_side": 16},
        "video,frames": {"video_fps": 5.0, "frame_choice": "published"},
    }
    found = set()
    for number, (tiers, options) in enumerate(ways.items()):
        out = packed(tmp_path / "videos", tmp_path / f"{number}", tiers=tiers, **options)
        found |= {content_of(out / tier) for tier in tiers.split(",")}
    assert len(found) == 1 and len(next(iter(found))) == 1


@pytest.mark.field
def test_a_segment_has_the_content_of_its_window(write_video: WriteVideo, tmp_path: Path) -> None:
    frames = [np.full((48, 64, 3), 5 * number, np.uint8) for number in range(30)]
    tone = (np.sin(np.arange(48000) ** 1.3 * 0.01) * 9000).astype(np.int16)
    video = write_video(tmp_path / "a.mkv", frames=frames, sound=tone)
    (tmp_path / "list.csv").write_text(f"path,start,end\n{video},1,2\n")
    window = packed(tmp_path / "list.csv", tmp_path / "window", tiers="video")
    segments = packed(video.parent, tmp_path / "cut", tiers="frames", segment=True, clip_seconds=1)
    whole = packed(video.parent, tmp_path / "whole", tiers="video,frames")
    assert content_of(whole / "frames") == content_of(whole / "video")
    assert len({*content_of(segments / "frames"), *content_of(whole / "frames")}) == 4
    assert content_of(window / "video") == content_of(segments / "frames")[1:2]
    with pytest.raises(LeakageError, match="has the audio and frames of"):
        packed(tmp_path / "list.csv", tmp_path / "again", tiers="frames", not_in=(str(segments),))


def content_of(tier: Path) -> tuple[int, ...]:
    content = ShardSet(tier).content()
    assert content is not None and content.dtype == np.uint64
    return tuple(content.tolist())


def test_content_hashes_of_another_set_are_refused(once: Path, tmp_path: Path) -> None:
    shutil.copytree(once / "frames", tmp_path / "frames")
    assert content_of(tmp_path / "frames") == content_of(once / "video")
    np.save(tmp_path / "frames/content.npy", np.zeros(5, np.uint64))
    with pytest.raises(ValueError, match="is not the one that was packed with its set"):
        content_of(tmp_path / "frames")
    (result,) = (one for one in verify(VerifyConfig(str(tmp_path / "frames"))) if one.problems)
    assert result.name == "content.npy"
    (tmp_path / "frames/content.npy").unlink()
    assert ShardSet(tmp_path / "frames").content() is None, "unknown"


def test_a_set_of_not_in_that_another_version_packed_is_refused(
    listing: Path, once: Path, tmp_path: Path
) -> None:
    shutil.copytree(once, tmp_path / "old")
    note = json.loads((once / "pack.json").read_text())
    (tmp_path / "old/pack.json").write_text(json.dumps(note | {"schema": 3}))
    with pytest.raises(ValueError, match=r"--not-in .*old: it was packed with schema 3"):
        packed(listing, tmp_path / "set", not_in=(str(tmp_path / "old"),))


def test_sets_that_share_nothing_pass(once: Path, tmp_path: Path, write_video: WriteVideo) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    write_video(videos / "new.mkv")
    out = packed(videos, tmp_path / "set", not_in=(str(once),))
    assert statistics(out)["clips_in_not_in"] == 0


def test_a_set_of_not_in_that_is_not_there_is_named(listing: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere has no finished shards; --not-in"):
        packed(listing, tmp_path / "set", not_in=(str(tmp_path / "nowhere"),))
