"""`cavmae pack`: what it takes, what it writes, what it says, and what an interruption costs."""

import csv
import fcntl
import hashlib
import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from pytest import approx

import cavmae.dataloaders.packing.pack as pack_module
from cavmae import cli
from cavmae.command import exit_code
from cavmae.dataloaders.media.decode_frame import decode_frame
from cavmae.dataloaders.packing.clip_list import ClipList, list_clips
from cavmae.dataloaders.packing.pack import PackConfig, main, pack
from cavmae.dataloaders.shards.shard_set import ShardSet
from cavmae.dataloaders.tools.verify import VerifyConfig, verify

WriteVideo = Callable[..., Path]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory, write_video: WriteVideo) -> Path:
    """Five good videos in three folders, two bad ones, and files that are none."""
    folder = tmp_path_factory.mktemp("videos")
    for name in ("b", "a", "c.d-1.2", "クリップ éñ 🎵"):
        write_video(folder / f"{name}.mkv")
    (folder / "sub").mkdir()
    write_video(folder / "sub" / "no_extension", container="matroska")
    write_video(folder / "silent.mkv", sound=np.zeros(16000, np.int16))
    (folder / "empty.mp4").touch()
    (folder / ".hidden.mkv").write_bytes(b"x")
    (folder / "notes.txt").write_text("not a video")
    (folder / "labels.csv").write_text("path,labels\na.mkv,guitar;flute\nb.mkv,\n")
    return folder


def packed_bytes(out: Path) -> dict[str, str]:
    """SHA-256 of every file that a run leaves."""
    files = sorted(path for path in out.rglob("*") if path.is_file())
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a failing command says."""
    assert exit_code(main, [str(argument) for argument in arguments]) == 1
    error = capsys.readouterr().err
    last = error.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert "Traceback" not in error
    return last


# ------------------------------------------------------------------------------------------- list


def test_a_folder_is_searched_in_the_order_of_names(videos: Path, tmp_path: Path) -> None:
    sources = [clip.source for clip in list_clips(videos, tmp_path / "out").clips]
    assert sources == [
        "a.mkv",
        "b.mkv",
        "c.d-1.2.mkv",
        "empty.mp4",
        "silent.mkv",
        "sub/no_extension",
        "クリップ éñ 🎵.mkv",
    ]


def test_shards_inside_the_folder_of_videos_are_not_taken_for_videos(
    tmp_path: Path, write_video: WriteVideo
) -> None:
    write_video(tmp_path / "a.mkv")
    out = tmp_path / "shards"
    config = PackConfig(str(tmp_path), str(out), workers=1)
    assert pack(config).clips == 1
    assert pack(config).clips == 1


def test_a_csv_gives_windows_and_labels(tmp_path: Path, write_video: WriteVideo) -> None:
    write_video(tmp_path / "a.mkv")
    listing = tmp_path / "clips.csv"
    listing.write_text(
        "path,start,end,labels\na.mkv,0.2,0.8,guitar; flute\na.mkv,,,\na.mkv,0.4,,dog\n"
    )
    pack(PackConfig(str(listing), str(tmp_path / "out"), workers=1))
    shards = ShardSet(tmp_path / "out" / "video")
    first, second, third = (shards.description(0, sample) for sample in range(3))
    assert first["labels"] == ["guitar", "flute"]
    assert first["source"] == {"path": "a.mkv", "start_seconds": 0.2, "end_seconds": 0.8}
    assert first["audio"]["samples"] == 9600
    assert first["video"]["times_seconds"] == pytest.approx([0.1 * i for i in range(6)], abs=1e-3)
    assert second["audio"]["samples"] == 16000
    assert third["audio"]["samples"] == 9600


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("path,start,end,labels\n", "no videos in"),
        ("file,start\na.mkv,0\n", "line 1: unknown column 'file'"),
        ("start,end\n0,1\n", "line 1: the column 'path' is missing"),
        ("path,path\na,b\n", "line 1: column 'path' is duplicated"),
        ("path,start\na.mkv,0\nb.mkv,x\n", "line 3, column start: 'x' is not a number"),
        ("path,start\na.mkv,-1\n", "line 2, column start: '-1' is not 0 or more"),
        ("path,start\na.mkv,nan\n", "line 2, column start: 'nan' is not 0 or more"),
        ("path,start,end\na.mkv,2,2\n", "line 2, column end: 2 must be after start 2"),
        ("path,start,end\na.mkv,0,1e9\n", "line 2, column end: 1e+09 must be after"),
        ("path,start\n,0\n", "line 2, column path: it is empty"),
        ("path,start\na.mkv\n", "line 2: 1 columns, the header has 2"),
    ],
)
def test_a_bad_csv_is_refused_by_line_and_column(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    listing = tmp_path / "clips.csv"
    listing.write_text(text)
    assert message in fails(capsys, listing, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------- results


@pytest.fixture(scope="module")
def packed(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "new" / "shards"
    assert main([str(videos), str(out), "--clips-per-shard", "3", "--workers", "2"]) == 0
    return out


def test_keys_are_places_in_the_list(packed: Path) -> None:
    shards = ShardSet(packed / "frames")
    assert shards.sizes == (3, 1, 1)  # places 3 and 4 are skipped
    sources = {
        shards.sample_id(shard, sample): shards.description(shard, sample)["source"]["path"]
        for shard, size in enumerate(shards.sizes)
        for sample in range(size)
    }
    assert sources == {
        "000000/000000000": "a.mkv",
        "000000/000000001": "b.mkv",
        "000000/000000002": "c.d-1.2.mkv",
        "000001/000000005": "sub/no_extension",
        "000002/000000006": "クリップ éñ 🎵.mkv",
    }


def test_skipped_clips_are_named_with_their_reason(packed: Path) -> None:
    lines = [json.loads(line) for line in (packed / "report.jsonl").read_text().splitlines()]
    assert [(line["source"], line["reason"]) for line in lines] == [
        ("empty.mp4", "empty_file"),
        ("silent.mkv", "silent_audio"),
    ]


def test_the_index_counts_what_is_there(packed: Path) -> None:
    index = json.loads((packed / "video" / "index.json").read_text())
    assert {name: index[name] for name in ("schema", "tier", "video_codec", "audio_hz")} == {
        "schema": 5,
        "tier": "video",
        "video_codec": "mjpeg",
        "audio_hz": 16000,
    }
    assert (index["samples"], index["skipped"]) == (5, 2)
    for entry in index["shards"]:
        data = (packed / "video" / entry["name"]).read_bytes()
        assert len(data) == entry["bytes"]
        assert hashlib.sha256(data).hexdigest() == entry["sha256"]


def test_a_sample_holds_what_its_description_says(packed: Path) -> None:
    video, frames = ShardSet(packed / "video"), ShardSet(packed / "frames")
    description = video.description(0, 0)
    assert set(description) == {*frames.description(0, 0), "fragments"}
    assert description["audio"] == {"hz": 16000, "samples": 16000}
    with av.open(io.BytesIO(video.member(0, 0, "mp4")), "r") as container:
        assert container.streams.video[0].codec_context.name == "mjpeg"
        shown = [frame.to_ndarray(format="gray").mean() for frame in container.decode(video=0)]
    assert len(shown) == description["video"]["frames"] == 10
    for place, one in enumerate(description["ten_frames"]):
        assert one["seconds"] == description["video"]["times_seconds"][one["index"]]
        with av.open(io.BytesIO(frames.member(0, 0, f"{place}.jpg")), "r") as picture:
            gray = next(picture.decode(video=0)).to_ndarray(format="gray").mean()
        assert gray == pytest.approx(shown[one["index"]], abs=3)


def test_packed_shards_pass_verification(packed: Path) -> None:
    results = verify(VerifyConfig(str(packed), decode=True))
    assert not [one.problems for one in results if one.problems]


@pytest.mark.parametrize(
    ("codec", "tiers"), [("h264", "video"), ("vp9", "video"), ("mjpeg", "frames")]
)
def test_other_codecs_and_single_tiers(
    tmp_path: Path, write_video: WriteVideo, codec: str, tiers: str
) -> None:
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "a.mkv")
    out = tmp_path / "out"
    options = ["--tiers", tiers, "--video-codec", codec, "--workers", "1"]
    assert main([str(tmp_path / "videos"), str(out), *options]) == 0
    assert {path.name for path in out.iterdir() if path.is_dir()} == {"finished", tiers}
    shards = ShardSet(out / tiers)
    assert shards.video_codec == (codec if tiers == "video" else None)
    assert shards.description(0, 0)["video"]["codec"] == shards.video_codec
    assert not [one for one in verify(VerifyConfig(str(out), decode=True)) if one.problems]


def test_the_video_tier_is_cropped_and_says_what_is_lost(
    tmp_path: Path, write_video: WriteVideo, capsys: pytest.CaptureFixture[str]
) -> None:
    """The middle of the picture that the `frames` tier keeps whole."""
    (tmp_path / "videos").mkdir()
    picture = np.random.default_rng(0).integers(60, 200, (17, 31, 3)).astype(np.uint8)
    picture = np.kron(picture, np.ones((16, 16, 1), np.uint8))[:256, :484]
    write_video(tmp_path / "videos" / "a.mkv", frames=[picture] * 3)
    write_video(tmp_path / "videos" / "b.mkv", frames=[picture[:, :384]] * 3)
    assert main([str(tmp_path / "videos"), str(tmp_path / "out"), "--workers", "1"]) == 0
    video, frames = ShardSet(tmp_path / "out" / "video"), ShardSet(tmp_path / "out" / "frames")
    stored, whole = video.description(0, 0)["video"], frames.description(0, 0)["video"]
    cut = {"width": 484, "height": 256, "left": 18, "top": 0, "lost": 0.0744}
    assert (stored["width"], stored["height"], stored["cropped_from"]) == (448, 256, cut)
    assert (whole["width"], whole["height"], "cropped_from" in whole) == (484, 256, False)
    assert "cropped_from" not in video.description(0, 1)["video"]
    shown = decode_frame(video.frame(0, 0, 0), 448, 256).astype(float)
    with Image.open(io.BytesIO(frames.member(0, 0, "0.jpg"))) as image:
        expected = np.asarray(image)[:, 18 : 18 + 448]
    assert np.abs(shown - expected).mean() < 6 < np.abs(shown[:, 2:] - expected[:, :-2]).mean()
    statistics = json.loads((tmp_path / "out" / "statistics.json").read_text())
    assert statistics["cropped"] == {"clips": 1, "mean": approx(0.0372), "max": 0.0744}
    assert "1 clips: 3.7% of the picture on average, 7.4% at most" in capsys.readouterr().out
    results = verify(VerifyConfig(str(tmp_path / "out"), decode=True))
    assert not [one.problems for one in results if one.problems]


def test_segment_cuts_a_long_file_into_consecutive_clips(
    tmp_path: Path, write_video: WriteVideo
) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()
    sound = np.random.default_rng(0).integers(-9000, 9000, 40000).astype(np.int16)
    pictures = [np.full((48, 64, 3), 20 + 8 * i, np.uint8) for i in range(25)]
    write_video(folder / "long.mkv", frames=pictures, sound=sound)
    (folder / "text.mp4").write_text("no video " * 200)
    config = PackConfig(str(folder), str(tmp_path / "out"), segment=True, clip_seconds=1, workers=1)
    summary = pack(config)
    assert (summary.clips, summary.skipped) == (3, {"open_failed": 1})
    shards = ShardSet(tmp_path / "out" / "video")
    parts = []
    for sample in range(3):
        with av.open(io.BytesIO(shards.member(0, sample, "flac")), "r") as container:
            parts += [frame.to_ndarray()[0] for frame in container.decode(audio=0)]
    np.testing.assert_array_equal(np.concatenate(parts), sound)
    assert [shards.description(0, sample)["video"]["frames"] for sample in range(3)] == [10, 10, 5]


def test_a_clip_over_the_time_limit_is_skipped_by_name(
    tmp_path: Path, write_video: WriteVideo, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "a.mkv")
    limit = ("--max-seconds-per-clip", "0.001", "--workers", "1")
    message = fails(capsys, tmp_path / "videos", tmp_path / "out", *limit)
    assert "none of the 1 clips can be packed: timeout 1" in message


def test_a_clip_over_the_cpu_limit_is_skipped_by_name(
    tmp_path: Path, write_video: WriteVideo, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "videos").mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (60, 480, 640, 3), np.uint8)
    write_video(tmp_path / "videos" / "a.mkv", frames=list(noise))
    options = ("--max-cpu-seconds-per-clip", "0.01", "--workers", "1")
    message = fails(capsys, tmp_path / "videos", tmp_path / "out", *options)
    assert "none of the 1 clips can be packed: cpu_limit 1" in message


def test_what_the_original_tier_keeps_can_be_packed_again(
    tmp_path: Path, write_video: WriteVideo
) -> None:
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "a.mkv")
    write_video(tmp_path / "videos" / "b.mkv", codec="libx264", pixel_format="yuv420p")
    (tmp_path / "videos.csv").write_text("path,labels\nvideos/a.mkv,dog\nvideos/b.mkv,cat;bird\n")
    listing, out, again = (str(tmp_path / name) for name in ("videos.csv", "out", "again"))
    pack(PackConfig(listing, out, tiers="frames,original", audio_codec="wav", workers=1))
    assert not [one for one in verify(VerifyConfig(out, decode=True)) if one.problems]
    pack(PackConfig(f"{out}/original", again, tiers="frames", audio_codec="wav", workers=1))
    first, second = ShardSet(f"{out}/frames"), ShardSet(f"{again}/frames")
    for sample in range(2):
        assert first.description(0, sample)["labels"] == second.description(0, sample)["labels"]
        for name in first.members[1:]:
            assert first.member(0, sample, name) == second.member(0, sample, name)


def test_parts_of_a_file_have_no_original(
    tmp_path: Path, write_video: WriteVideo, capsys: pytest.CaptureFixture[str]
) -> None:
    write_video(tmp_path / "a.mkv")
    (tmp_path / "list.csv").write_text("path,start,end\na.mkv,0.2,0.9\n")
    message = fails(capsys, tmp_path / "list.csv", tmp_path / "out", "--tiers", "original")
    assert "original, which keeps whole files, but a.mkv is listed from 0.2 s" in message
    with pytest.raises(ValueError, match="segment is set and tiers has original"):
        PackConfig("videos", "out", tiers="original", segment=True)


# ----------------------------------------------------------------------------------- interruption


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(
    videos: Path, tmp_path: Path, packed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "shards"
    arguments = [str(videos), str(out), "--clips-per-shard", "3", "--workers", "2"]
    command = [sys.executable, "-m", "cavmae", "pack", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    first = out / "finished" / "000000.json"
    while not first.exists():
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "video" / "index.json").exists()
    finished = (out / "video" / "000000.tar").stat()
    (out / "video" / "000001.tar.0123.partial").write_bytes(b"left over")
    (out / "video" / "000002.tar").write_bytes(b"finished, but its report was not")

    assert main(arguments) == 0
    assert "shards kept from an earlier run" in capsys.readouterr().out
    kept = (out / "video" / "000000.tar").stat()
    assert (kept.st_ino, kept.st_mtime_ns) == (finished.st_ino, finished.st_mtime_ns)
    assert packed_bytes(out) == packed_bytes(packed)


def test_a_finished_run_is_not_repeated(videos: Path, packed: Path) -> None:
    before = {path: path.stat().st_ino for path in packed.rglob("*.tar")}
    config = PackConfig(str(videos), str(packed), clips_per_shard=3)
    assert pack(config).resumed_shards == 3
    assert {path: path.stat().st_ino for path in packed.rglob("*.tar")} == before


def test_a_damaged_finished_shard_is_packed_again(tmp_path: Path, write_video: WriteVideo) -> None:
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "a.mkv")
    config = PackConfig(str(tmp_path / "videos"), str(tmp_path / "out"), workers=1)
    pack(config)
    before = packed_bytes(tmp_path / "out")
    (tmp_path / "out" / "video" / "000000.tar").write_bytes(b"cut")
    assert pack(config).resumed_shards == 0
    assert packed_bytes(tmp_path / "out") == before


def test_leftovers_of_a_shard_that_turns_out_empty_are_removed(
    tmp_path: Path, write_video: WriteVideo
) -> None:
    write_video(tmp_path / "a.mkv")
    (tmp_path / "clips.csv").write_text("path\na.mkv\nabsent.mkv\n")
    out = tmp_path / "out"
    config = PackConfig(str(tmp_path / "clips.csv"), str(out), clips_per_shard=1, workers=1)
    pack(config)
    before = packed_bytes(out)
    (out / "finished" / "000001.json").unlink()
    (out / "video" / "000001.tar").write_bytes(b"left over")
    assert pack(config).resumed_shards == 1
    assert packed_bytes(out) == before


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--short-side", "128"), "short_side is 128, but .* was started with 256"),
        (("--tiers", "video"), "tiers is 'video', but .* was started with 'frames,video'"),
        (("--clips-per-shard", "2"), "clips_per_shard is 2, but .* was started with 3"),
    ],
)
def test_a_restart_with_other_options_is_refused_by_name(
    videos: Path,
    packed: Path,
    capsys: pytest.CaptureFixture[str],
    option: tuple[str, str],
    message: str,
) -> None:
    before = packed_bytes(packed)
    arguments = [str(videos), str(packed), "--clips-per-shard", "3", *option]
    assert exit_code(main, arguments) == 1
    assert re.search(message, capsys.readouterr().err)
    assert packed_bytes(packed) == before


def test_a_restart_with_another_list_is_refused(
    tmp_path: Path, write_video: WriteVideo, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()
    write_video(folder / "a.mkv")
    pack(PackConfig(str(folder), str(tmp_path / "out"), workers=1))
    write_video(folder / "b.mkv")
    message = fails(capsys, folder, tmp_path / "out")
    assert "list of clips has changed" in message and "1 clips then, 2 now" in message


def test_a_folder_that_was_started_with_another_schema_is_refused(
    videos: Path, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    note = json.loads((packed / "pack.json").read_text())
    (tmp_path / "pack.json").write_text(json.dumps({**note, "schema": 2}))
    message = fails(capsys, videos, tmp_path, "--clips-per-shard", "3")
    assert "packed with schema 2" in message and "reads schema 5" in message
    assert f"remove {tmp_path} and pack it again" in message


def test_two_packers_cannot_share_a_folder(
    videos: Path, packed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open(packed / "pack.json") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        message = fails(capsys, videos, packed, "--clips-per-shard", "3")
    assert "another process is packing" in message


# ----------------------------------------------------------------------------------------- errors


def test_what_cannot_be_packed_at_all_is_one_line(
    tmp_path: Path, videos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "nothing").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    out = tmp_path / "out"
    assert "does not exist" in fails(capsys, tmp_path / "absent", out)
    assert "does not exist" in fails(capsys, tmp_path / "absent.csv", out)
    assert "no videos in" in fails(capsys, tmp_path / "nothing", out)
    assert "a.mkv is one video; give its folder" in fails(capsys, videos / "a.mkv", out)
    assert "file, line 1: unknown column 'x'" in fails(capsys, tmp_path / "file", out)
    assert "was not written by this command" in fails(capsys, videos, tmp_path / "other")
    assert "is a file" in fails(capsys, videos, tmp_path / "file")
    assert "Not a directory" in fails(capsys, videos, tmp_path / "file" / "out")
    assert not out.exists()
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["thesis.tex"]


def test_an_option_out_of_range_is_named(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for option, name in (("--tiers=sound", "tiers"), ("--short-side=7", "short_side")):
        with pytest.raises(SystemExit) as caught:
            main([str(videos), str(tmp_path / "out"), option])
        assert caught.value.code != 0
        assert name in capsys.readouterr().err


def test_when_every_clip_is_skipped_the_run_fails_and_leaves_no_set(
    tmp_path: Path, write_video: WriteVideo, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()
    write_video(folder / "a.mkv", sound=np.zeros(0, np.int16))
    (folder / "b.mp4").touch()
    message = fails(capsys, folder, tmp_path / "out")
    assert "none of the 2 clips can be packed: no_audio 1, empty_file 1" in message
    assert not list((tmp_path / "out").rglob("index.json"))
    assert not list((tmp_path / "out").rglob("*.tar*"))


def test_a_full_disk_is_an_error_and_the_run_can_go_on(
    tmp_path: Path, write_video: WriteVideo, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()
    for number in range(4):
        noise = np.random.default_rng(number).integers(-9000, 9000, 80000).astype(np.int16)
        write_video(folder / f"{number}.mkv", sound=noise)
    arguments = [str(folder), str(tmp_path / "out"), "--workers", "1"]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        message = fails(capsys, *arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert re.search(r"File too large: '.*/000000\.tar'", message)
    assert not list((tmp_path / "out").rglob("index.json"))
    assert not list((tmp_path / "out").rglob("*.tar*"))
    assert main(arguments) == 0
    assert ShardSet(tmp_path / "out" / "video").samples == 4


def test_clips_that_vanish_with_their_folder_stop_the_run(
    videos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A lost mount must not become a set of skipped clips."""
    listed = list_clips(videos, tmp_path / "out")
    monkeypatch.setattr(
        pack_module,
        "list_clips",
        lambda *_: ClipList(
            [replace(clip, path=str(tmp_path / clip.source)) for clip in listed.clips]
        ),
    )
    message = fails(capsys, tmp_path / "gone", tmp_path / "out", "--workers", "1")
    assert "gone has disappeared; restore it" in message


def test_a_clip_that_is_missing_is_skipped(tmp_path: Path, write_video: WriteVideo) -> None:
    write_video(tmp_path / "a.mkv")
    (tmp_path / "clips.csv").write_text("path\na.mkv\nabsent.mkv\n")
    summary = pack(PackConfig(str(tmp_path / "clips.csv"), str(tmp_path / "out"), workers=1))
    assert (summary.clips, summary.skipped) == (1, {"missing_file": 1})


# ----------------------------------------------------------------------------------------- reruns


@pytest.mark.field
def test_a_clip_that_was_missing_is_packed_by_the_same_command(
    tmp_path: Path, write_video: WriteVideo, capsys: pytest.CaptureFixture[str]
) -> None:
    write_video(tmp_path / "a.mkv")
    (tmp_path / "clips.csv").write_text("path\na.mkv\nlate.mkv\n")
    command = [str(tmp_path / "clips.csv"), str(tmp_path / "out"), "--workers", "1"]
    assert main(command) == 0
    before = packed_bytes(tmp_path / "out")
    capsys.readouterr()
    assert main(command) == 0
    said = capsys.readouterr().err
    assert "Trying 1 skipped clips again: missing_file 1\nThey end as before" in said
    assert packed_bytes(tmp_path / "out") == before

    sound = np.random.default_rng(0).integers(-9000, 9000, 16000).astype(np.int16)
    write_video(tmp_path / "late.mkv", sound=sound)
    assert main(command) == 0
    assert "1 of them end otherwise now" in capsys.readouterr().err
    assert not (tmp_path / "out" / "report.jsonl").read_text()
    assert main([command[0], str(tmp_path / "fresh"), "--workers", "1"]) == 0
    assert packed_bytes(tmp_path / "out") == packed_bytes(tmp_path / "fresh")


@pytest.mark.field
def test_a_clip_over_a_limit_is_tried_again_with_another_limit(
    tmp_path: Path, write_video: WriteVideo, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "a.mkv")
    command = [str(tmp_path / "videos"), str(tmp_path / "out"), "--workers", "1"]
    assert "timeout 1" in fails(capsys, *command, "--max-seconds-per-clip", "0.001")
    assert main(command) == 0
    assert ShardSet(tmp_path / "out" / "video").samples == 1


@pytest.mark.field
def test_other_skipped_clips_are_tried_again_by_their_reason(
    tmp_path: Path, write_video: WriteVideo
) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()
    write_video(folder / "a.mkv")
    (folder / "b.mkv").write_text("no video " * 200)
    config = PackConfig(str(folder), str(tmp_path / "out"), workers=1)
    assert pack(config).skipped == {"open_failed": 1}
    write_video(folder / "b.mkv")
    assert pack(config).skipped == {"open_failed": 1}
    assert pack(replace(config, retry=("open_failed",))).skipped == {}


def test_of_equal_clips_the_first_is_kept_also_if_it_comes_late(
    tmp_path: Path, write_video: WriteVideo
) -> None:
    write_video(tmp_path / "b.mkv")
    (tmp_path / "clips.csv").write_text("path\na.mkv\nb.mkv\n")
    listing, out = str(tmp_path / "clips.csv"), str(tmp_path / "out")
    config = PackConfig(listing, out, deduplicate=True, clips_per_shard=1, workers=1)
    assert pack(config).skipped == {"missing_file": 1}
    write_video(tmp_path / "a.mkv")
    assert pack(config).skipped == {"duplicate": 1}
    assert ShardSet(f"{out}/video").description(0, 0)["source"]["path"] == "a.mkv"


# -------------------------------------------------------------------------------- names and labels


@pytest.mark.field
def test_a_name_that_is_no_utf_8_is_packed_with_its_bytes_escaped(
    tmp_path: Path, write_video: WriteVideo
) -> None:
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "a.mkv")
    os.rename(tmp_path / "videos" / "a.mkv", os.fsencode(tmp_path) + b"/videos/caf\xe9.mkv")
    out = tmp_path / os.fsdecode(b"set \xe9")
    arguments = [str(tmp_path / "videos"), str(out), "--tiers", "frames", "--workers", "1"]
    assert cli.main(["pack", *arguments]) == 0
    assert ShardSet(out / "frames").description(0, 0)["source"]["path"] == "caf\\udce9.mkv"
    for sheet in ("sheet.html", "sheet.png"):
        assert cli.main(["inspect", str(out / "frames"), "--out", str(tmp_path / sheet)]) == 0
    assert "caf\\udce9.mkv" in (tmp_path / "sheet.html").read_text()


@pytest.mark.field
def test_what_is_found_and_not_used_is_named_with_a_count(
    tmp_path: Path, write_video: WriteVideo
) -> None:
    folder = tmp_path / "videos"
    (folder / ".cache").mkdir(parents=True)
    write_video(folder / "a.mkv")
    (folder / "linked").symlink_to(tmp_path)
    for name in ("a.info.json", "a.JSON", "a.srt", ".DS_Store"):
        (folder / name).touch()
    os.mkfifo(folder / "pipe")
    listed = list_clips(folder, tmp_path / "out")
    assert [clip.source for clip in listed.clips] == ["a.mkv"]
    assert [line.replace(f"{folder}/", "") for line in listed.remarks()] == [
        "not used: 2 hidden files and folders, such as .cache",
        "not used: 1 links to folders, which are not followed, such as linked",
        "not used: 2 JSON files (labels of a folder come from a CSV file), such as a.JSON",
        "not used: 1 files of text, subtitles or pictures, such as a.srt",
        "not used: 1 pipes, sockets and devices, such as pipe",
    ]


# ------------------------------------------------------------------------------------- real clips


def test_a_set_of_damaged_videos_packs_what_it_can(shared_clips: Path, tmp_path: Path) -> None:
    folder = shared_clips / "clips_bad"
    with open(folder / "manifest.csv", newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if not row["file"].endswith(".tar")]
    listing = tmp_path / "clips.csv"
    with open(listing, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["path"], *([str(folder / row["file"])] for row in rows)])
    out = tmp_path / "out"
    pack(PackConfig(str(listing), str(out), short_side=64, video_fps=2, workers=2))
    skipped = [json.loads(line) for line in (out / "report.jsonl").read_text().splitlines()]
    assert {Path(line["source"]).name: line["reason"] for line in skipped} == {
        row["file"]: row["reason"] for row in rows if row["expect"] == "skip"
    }
    assert not [one for one in verify(VerifyConfig(str(out), decode=True)) if one.problems]


@pytest.mark.slow
def test_every_real_clip_packs(shared_clips: Path, tmp_path: Path) -> None:
    videos, out = shared_clips / "clips", tmp_path / "out"
    config = PackConfig(str(videos), str(out), short_side=64, video_fps=2, workers=2)
    summary = pack(config)
    assert (summary.clips, summary.skipped) == (28, {})
    assert not [one for one in verify(VerifyConfig(str(out), decode=True)) if one.problems]
