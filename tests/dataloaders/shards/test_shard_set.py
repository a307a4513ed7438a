"""What a packed folder promises to its readers."""

import io
import json
import pickle
import shutil
import tarfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nvidia.dali import fn
from nvidia.dali.pipeline import Pipeline
from PIL import Image

from cavmae.dataloaders.shards import storage
from cavmae.dataloaders.shards.format import (
    ShardEntry,
    ShardError,
    member_names,
    parse_member_index,
)
from cavmae.dataloaders.shards.shard_set import ShardSet
from cavmae.dataloaders.shards.writer import ShardWriter, write_index

ENTRY = {"name": "000000.tar", "samples": 1, "bytes": 1, "sha256": ""}


def make_set(
    folder: Path, samples: int = 3, damage_crc: bool = False, fragments: object = None
) -> Path:
    """A hand-made video tier whose members are short texts."""
    writer = ShardWriter(folder, "000000")
    for number in range(samples):
        media = {"flac": b"sound %d" % number, "mp4": b"video %d" % number}
        crc32 = {name: zlib.crc32(data) + damage_crc for name, data in media.items()}
        description: dict[str, Any] = {"schema": 5, "key": f"{number:09d}", "crc32": crc32}
        description["fragments"] = fragments
        writer.add(f"{number:09d}", {"json": json.dumps(description).encode(), **media})
    entry = writer.finish()
    assert entry is not None
    _index(folder, [entry])
    return folder


def _index(folder: Path, entries: list[ShardEntry]) -> None:
    write_index(
        folder,
        tier="video",
        audio_codec="flac",
        video_codec="vp9",
        short_side=256,
        frame_choice="by_time",
        skipped=0,
        content=(f"{number:064x}" for number in range(sum(one.samples for one in entries))),
        shards=entries,
    )


def test_every_member_of_every_sample_can_be_read(packed_synthetic: Path) -> None:
    for tier in ("frames", "video"):
        shards = ShardSet(packed_synthetic / tier)
        assert (shards.tier, shards.sizes, shards.samples) == (tier, (8, 8, 8), 24)
        for shard, size in enumerate(shards.sizes):
            for sample in range(size):
                assert shards.description(shard, sample)["audio"]["hz"] == 16000
                assert shards.member(shard, sample, "flac")[:4] == b"fLaC"
                assert shards.member(shard, sample, shards.members[-1])


def test_sample_names_tell_shard_and_key(packed_synthetic: Path) -> None:
    shards = ShardSet(packed_synthetic / "video")
    assert shards.sample_id(2, 3) == "000002/000000019"
    assert shards.description(2, 3)["key"] == "000000019"


def test_the_tar_holds_the_members_in_order(packed_synthetic: Path) -> None:
    for tier in ("frames", "video"):
        with tarfile.open(packed_synthetic / tier / "000001.tar") as tar:
            names = tar.getnames()
        assert names == [
            f"{key:09d}.{one}" for key in range(8, 16) for one in member_names(tier, "flac")
        ]


def test_the_index_agrees_with_the_tar(packed_synthetic: Path) -> None:
    for tier in ("frames", "video"):
        index = parse_member_index((packed_synthetic / tier / "000000.idx").read_bytes(), "")
        with tarfile.open(packed_synthetic / tier / "000000.tar") as tar:
            members = tar.getmembers()
        assert index.offset.reshape(-1).tolist() == [member.offset_data for member in members]
        assert index.size.reshape(-1).tolist() == [member.size for member in members]


def test_dali_reads_the_shards_through_the_index(packed_synthetic: Path) -> None:
    folder = packed_synthetic / "frames"
    pipeline = Pipeline(batch_size=8, num_threads=1, device_id=None)
    with pipeline:
        members: Any = fn.readers.webdataset(
            paths=[str(folder / "000000.tar"), str(folder / "000001.tar")],
            index_paths=[str(folder / "000000.idx"), str(folder / "000001.idx")],
            ext=["flac", "7.jpg"],
            missing_component_behavior="error",
        )
        flac, jpeg = members
        decoded: Any = fn.decoders.audio(flac, downmix=True)
        pipeline.set_outputs(flac, decoded[0], fn.decoders.image(jpeg))
    pipeline.build()
    shards = ShardSet(folder)
    for shard in range(2):
        flac, sound, pictures = pipeline.run()
        for sample in range(8):
            stored = shards.member(shard, sample, "flac")
            assert np.asarray(flac[sample]).tobytes() == stored
            samples = shards.description(shard, sample)["audio"]["samples"]
            assert np.asarray(sound[sample]).shape == (samples,)
            jpeg = Image.open(io.BytesIO(shards.member(shard, sample, "7.jpg")))
            difference = np.asarray(pictures[sample]).astype(int) - np.asarray(jpeg)
            assert np.abs(difference).mean() < 2


def test_dali_decodes_single_frames_of_the_video_tier(packed_synthetic: Path) -> None:
    """Any frame alone, in any order; the same picture as the JPEG of the frames tier."""
    video, frames = ShardSet(packed_synthetic / "video"), ShardSet(packed_synthetic / "frames")
    ten = video.description(0, 0)["ten_frames"]
    wanted = [9, 2, 5]
    content = np.frombuffer(video.member(0, 0, "mp4"), np.uint8)
    pipeline = Pipeline(batch_size=1, num_threads=1, device_id=None)
    with pipeline:
        encoded = fn.external_source(source=lambda: [content], batch=True)
        indexes = [ten[place]["index"] for place in wanted]
        pipeline.set_outputs(
            fn.decoders.video(encoded, device="cpu", frames=indexes, pad_mode="none")
        )
    pipeline.build()
    (decoded,) = pipeline.run()
    for picture, place in zip(np.asarray(decoded[0]), wanted, strict=True):
        jpeg = Image.open(io.BytesIO(frames.member(0, 0, f"{place}.jpg")))
        assert np.abs(picture.astype(int) - np.asarray(jpeg)).mean() < 6


def test_reading_costs_the_bytes_of_the_member(
    packed_synthetic: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    pread = storage.os.pread

    def counted(descriptor: int, size: int, offset: int) -> bytes:
        data = pread(descriptor, size, offset)
        read.append(len(data))
        return data

    monkeypatch.setattr(storage.os, "pread", counted)
    shards = ShardSet(packed_synthetic / "frames")
    jpeg = shards.member(1, 5, "3.jpg")
    description = sum(read) - len(jpeg)
    assert len(shards.member(1, 5, "json")) == description


def test_a_copy_in_another_process_can_read(packed_synthetic: Path) -> None:
    shards = ShardSet(packed_synthetic / "video")
    data = shards.member(0, 0, "mp4")
    assert pickle.loads(pickle.dumps(shards)).member(0, 0, "mp4") == data


def test_threads_can_share_a_set(packed_synthetic: Path) -> None:
    shards = ShardSet(packed_synthetic / "frames")
    places = [(number % 3, number % 8) for number in range(240)]
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda place: shards.member(place[0], place[1], "0.jpg"), places))
    assert read[:24] == [shards.member(*place, "0.jpg") for place in places[:24]]


def test_few_files_are_open_at_once(
    packed_synthetic: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "OPEN_FILES", 1)
    before = len(list(Path("/proc/self/fd").iterdir()))
    shards = ShardSet(packed_synthetic / "video")
    for number in range(30):
        shards.member(number % 3, 0, "flac")
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 1


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        make_set(tmp_path / name)
    for name in ("000000.tar", "000000.idx", "index.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_shard_has_no_name_before_it_is_finished(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "000000")
    writer.add("000000000", {"json": b"{}"})
    assert not list(tmp_path.glob("*.tar")) and len(list(tmp_path.iterdir())) == 1
    writer.abandon()
    assert not list(tmp_path.iterdir())


def test_a_shard_without_samples_leaves_no_files(tmp_path: Path) -> None:
    assert ShardWriter(tmp_path, "000000").finish() is None
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------- damage


def test_a_folder_without_an_index_is_refused_with_advice(
    tmp_path: Path, packed_synthetic: Path
) -> None:
    with pytest.raises(FileNotFoundError, match="cavmae pack"):
        ShardSet(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"several tiers; use .*frames"):
        ShardSet(packed_synthetic)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"schema": 4},
            r"packed with schema 4, .* reads schema 5\); pack .* new folder: `cavmae pack "
            r"VIDEOS OUT --tiers video --audio-codec flac --video-codec vp9 --short-side 256 "
            r"--frame-choice by_time`$",
        ),
        ({"tier": "sound"}, "tier is 'sound'"),
        (
            {"shards": [{**ENTRY, "name": "../x.tar"}]},
            "not the name",
        ),
        ({"shards": [{"name": "000000.tar"}]}, "cannot be used"),
        ({"shards": 3}, "cannot be used"),
    ],
)
def test_a_damaged_index_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    path = make_set(tmp_path) / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        ShardSet(tmp_path)


def test_damaged_bytes_are_found_by_their_checksum(tmp_path: Path) -> None:
    shards = ShardSet(make_set(tmp_path, damage_crc=True))
    with pytest.raises(ShardError, match=r"flac of sample 1 of .*000000\.tar") as caught:
        shards.member(0, 1, "flac")
    assert caught.value.reason == "crc_mismatch"


def test_a_damaged_description_is_a_fault_of_the_sample(tmp_path: Path) -> None:
    path = make_set(tmp_path) / "000000.tar"
    data = path.read_bytes()
    begin = b'{"schema": 5, "key": "000000001"'
    path.write_bytes(data.replace(begin, b"[" + begin[1:]))
    shards = ShardSet(tmp_path)
    with pytest.raises(ShardError) as caught:
        shards.member(0, 1, "mp4")
    assert caught.value.reason == "bad_json"
    assert shards.sample_id(0, 1) == "000000/000000001"
    assert shards.member(0, 2, "mp4") == b"video 2"


def test_another_schema_is_a_fault_of_the_sample(tmp_path: Path) -> None:
    path = make_set(tmp_path) / "000000.tar"
    path.write_bytes(path.read_bytes().replace(b'"schema": 5', b'"schema": 7'))
    with pytest.raises(ShardError) as caught:
        ShardSet(tmp_path).member(0, 0, "mp4")
    assert caught.value.reason == "bad_schema"


def test_a_cut_off_tar_is_a_fault_of_the_samples_behind_the_cut(tmp_path: Path) -> None:
    path = make_set(tmp_path) / "000000.tar"
    offset = int(parse_member_index((tmp_path / "000000.idx").read_bytes(), "").offset[1, 2])
    path.write_bytes(path.read_bytes()[: offset + 3])
    shards = ShardSet(tmp_path)
    assert shards.member(0, 0, "mp4") == b"video 0"
    with pytest.raises(ShardError) as caught:
        shards.member(0, 1, "mp4")
    assert caught.value.reason == "short_read"


def test_an_absent_shard_is_no_fault_of_a_sample(packed_synthetic: Path, tmp_path: Path) -> None:
    """It may come back: only damage puts a sample in quarantine."""
    folder = tmp_path / "video"
    shutil.copytree(packed_synthetic / "video", folder)
    shards = ShardSet(folder)
    (folder / "000001.tar").unlink()
    with pytest.raises(OSError, match=r"000001\.tar could not be read in 3 tries \(FileNotFound"):
        shards.member(1, 0, "flac")


def test_a_member_that_the_tier_does_not_have_is_named(packed_synthetic: Path) -> None:
    with pytest.raises(ValueError, match=r"video tier has no '0\.jpg'; it has json, flac, mp4"):
        ShardSet(packed_synthetic / "video").member(0, 0, "0.jpg")


def test_a_frame_is_the_header_and_its_own_fragment(packed_synthetic: Path) -> None:
    shards = ShardSet(packed_synthetic / "video")
    video = shards.member(1, 2, "mp4")
    header, *sizes = shards.description(1, 2)["fragments"]["bytes"]
    assert len(sizes) == shards.description(1, 2)["video"]["frames"]
    start = header
    for index, size in enumerate(sizes):
        assert shards.frame(1, 2, index) == video[:header] + video[start : start + size]
        start += size
    assert start == len(video)
    with pytest.raises(ShardError, match="frame 16 of 16") as caught:
        shards.frame(1, 2, len(sizes))
    assert caught.value.reason == "bad_schema"
    with pytest.raises(ValueError, match="frames tier has no 'mp4'"):
        ShardSet(packed_synthetic / "frames").frame(0, 0, 0)


FRAGMENTS: list[Any] = [
    None,
    {"bytes": [4, 3]},
    {"bytes": [4, 4], "crc32": [0, 0]},
    {"bytes": [7, 0], "crc32": [0, 0]},
    {"bytes": [4, 3.0], "crc32": [0, 0]},
    {"bytes": [4, 3], "crc32": [None, None]},
    {"bytes": "ab", "crc32": "ab"},
    [],
]


@pytest.mark.parametrize("fragments", FRAGMENTS, ids=str)
def test_damaged_fragments_are_a_fault_of_the_sample(tmp_path: Path, fragments: object) -> None:
    shards = ShardSet(make_set(tmp_path, fragments=fragments))
    with pytest.raises(ShardError) as caught:
        shards.frame(0, 0, 0)
    assert caught.value.reason == "bad_schema"


def test_a_damaged_frame_is_found_by_its_own_checksum(tmp_path: Path) -> None:
    sums = [zlib.crc32(b"vide"), zlib.crc32(b"o"), zlib.crc32(b" 0")]
    make_set(tmp_path, fragments={"bytes": [4, 1, 2], "crc32": sums})
    assert ShardSet(tmp_path).frame(0, 0, 1) == b"vide 0"
    path = tmp_path / "000000.tar"
    path.write_bytes(path.read_bytes().replace(b"video 0", b"vide? 0"))
    assert ShardSet(tmp_path).frame(0, 0, 1) == b"vide 0"
    with pytest.raises(ShardError, match="frame 0 in mp4 of sample 0 of") as caught:
        ShardSet(tmp_path).frame(0, 0, 0)
    assert caught.value.reason == "crc_mismatch"


def test_an_index_of_other_lengths_is_refused(tmp_path: Path) -> None:
    path = make_set(tmp_path) / "000000.idx"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(["v1.2 2", *lines[1:3]]) + "\n")
    with pytest.raises(ValueError, match="lists 2 samples"):
        ShardSet(tmp_path).member(0, 0, "flac")
    path.write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(ValueError, match="damaged"):
        ShardSet(tmp_path).member(0, 0, "flac")
