"""`cavmae verify` finds every kind of damage and names it."""

import copy
import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cavmae.command import exit_code
from cavmae.dataloaders.shards.format import description_bytes, member_names, parse_member_index
from cavmae.dataloaders.shards.shard_set import ShardSet
from cavmae.dataloaders.shards.writer import ShardWriter, write_index
from cavmae.dataloaders.tools.verify import VerifyConfig, description_problem, main, verify


@pytest.fixture
def folder(packed_synthetic: Path, tmp_path: Path) -> Path:
    """The video tier of the packed clips, to be damaged."""
    shutil.copytree(packed_synthetic / "video", tmp_path / "video")
    return tmp_path / "video"


def problems(folder: Path, decode: bool = False) -> list[str]:
    results = verify(VerifyConfig(str(folder), decode=decode))
    return [f"{one.name}: {problem}" for one in results for problem in one.problems]


def test_whole_shards_pass(packed_synthetic: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(packed_synthetic), "--decode"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert shown.out.count("none") == 6


def test_the_result_is_one_json_document(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "000000.idx").unlink()
    assert main([str(folder), "--json"]) == 1
    first, second, _ = json.loads(capsys.readouterr().out)
    assert "No such file" in first["problems"][0] and not second["problems"]
    assert (second["name"], second["samples"]) == ("000001.tar", 8)


def test_one_changed_byte_of_a_member_is_found_and_named(folder: Path) -> None:
    path = folder / "000001.tar"
    data = bytearray(path.read_bytes())
    data[int(parse_member_index((folder / "000001.idx").read_bytes(), "").offset[2, 1]) + 100] ^= 1
    path.write_bytes(data)
    assert problems(folder) == [
        "000001.tar: its SHA-256 is not that of index.json",
        "000001.tar: 000000010: flac is damaged (CRC-32)",
    ]


def test_a_cut_off_shard_is_found(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "000002.tar"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert main([str(folder)]) == 1
    error = capsys.readouterr().err
    assert "video/000002.tar" in error and "bytes, index.json says" in error
    assert "Traceback" not in error


def _remove_shard(folder: Path) -> None:
    (folder / "000000.tar").unlink()


def _remove_idx(folder: Path) -> None:
    (folder / "000000.idx").unlink()


def _shift_idx(folder: Path) -> None:
    path = folder / "000000.idx"
    offset = int(parse_member_index(path.read_bytes(), "").offset[3, 0])
    path.write_text(path.read_text().replace(f"json {offset} ", f"json {offset + 512} "))


def _swap_shards(folder: Path) -> None:
    shutil.copy(folder / "000001.tar", folder / "000000.tar")


def _miscount(folder: Path) -> None:
    path = folder / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "samples": 25}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            _remove_shard,
            "000000.tar: {folder}/000000.tar could not be read in 3 tries (FileNotFound",
        ),
        (_remove_idx, "000000.tar: [Errno 2] No such file"),
        (_shift_idx, "000000.tar: the tar has 000000003.json where the .idx has 000000003.json"),
        (_swap_shards, "000000.tar: the tar has 000000008.json where the .idx has 000000000.json"),
        (_miscount, "index.json: states 25 samples, its shards have 24"),
    ],
)
def test_what_does_not_fit_together_is_found(
    folder: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(folder)
    expected = message.replace("{folder}", str(folder))
    assert any(problem.startswith(expected) for problem in problems(folder))


def test_only_decoding_finds_what_was_packed_broken(tmp_path: Path, packed_synthetic: Path) -> None:
    source = ShardSet(packed_synthetic / "video")
    description = copy.deepcopy(source.description(0, 0))
    video = bytearray(source.member(0, 0, "mp4"))
    header = description["fragments"]["bytes"][0]
    codec = video.index(b"vp09", 0, header)
    video[codec : codec + 4] = b"none"
    description["fragments"]["crc32"][0] = zlib.crc32(video[:header])
    media = {"flac": source.member(0, 0, "flac")[:9000], "mp4": bytes(video)}
    del description["crc32"]
    crc32 = {name: zlib.crc32(data) for name, data in media.items()}
    writer = ShardWriter(tmp_path, "000000")
    writer.add("000000000", {"json": description_bytes(description, crc32), **media})
    entry = writer.finish()
    assert entry is not None
    write_index(
        tmp_path,
        tier="video",
        audio_codec="flac",
        video_codec="vp9",
        short_side=256,
        frame_choice="by_time",
        skipped=0,
        content=["0" * 64],
        shards=[entry],
    )
    assert problems(tmp_path) == []
    sound, video = problems(tmp_path, decode=True)
    assert "000000000: flac" in sound and "000000000: mp4 does not decode" in video


def test_fragments_that_are_not_those_of_the_video_are_found(
    tmp_path: Path, packed_synthetic: Path
) -> None:
    source = ShardSet(packed_synthetic / "video")
    media = {name: source.member(0, 0, name) for name in ("flac", "mp4")}
    crc32 = {name: zlib.crc32(data) for name, data in media.items()}
    writer = ShardWriter(tmp_path, "000000")
    for number, (field, change) in enumerate((("bytes", 1), ("crc32", 1), ("crc32", 0))):
        description: dict[str, Any] = copy.deepcopy(source.description(0, 0))
        description["key"] = f"{number:09d}"
        description["fragments"][field][1] += change
        del description["crc32"]
        writer.add(f"{number:09d}", {"json": description_bytes(description, crc32), **media})
    entry = writer.finish()
    assert entry is not None
    index = json.loads((packed_synthetic / "video" / "index.json").read_text())
    kept = ("tier", "audio_codec", "video_codec", "short_side", "frame_choice", "skipped")
    write_index(
        tmp_path, **{field: index[field] for field in kept}, content=["0" * 64] * 3, shards=[entry]
    )
    first, second = problems(tmp_path)
    assert "000000000" in first and "fragments differ from those of the mp4" in first
    assert "000000001" in second and "fragments differ from those of the mp4" in second


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"schema": 2}, "schema is 5"),
        ({"key": "000000099"}, "key is 000000000"),
        ({"labels": "dog"}, "labels are strings"),
        ({"audio": {"hz": 44100, "samples": 1}}, "audio.hz is 16000"),
        ({"ten_frames": []}, "there are 10 ten_frames"),
        ({"crc32": {"flac": 1}}, "every member has a crc32"),
        ({"source": {}}, "KeyError: 'path'"),
    ],
)
def test_a_description_that_breaks_the_schema_is_found(
    packed_synthetic: Path, change: dict, rule: str
) -> None:
    description = ShardSet(packed_synthetic / "video").description(0, 0)
    members = member_names("video", "flac")
    assert description_problem(description, "000000000", members) is None
    assert rule in str(description_problem({**description, **change}, "000000000", members))


def test_a_picture_outside_of_the_one_that_it_was_cut_from_is_found(
    packed_synthetic: Path,
) -> None:
    description = ShardSet(packed_synthetic / "video").description(0, 0)
    whole = {"width": 70, "height": 64, "left": 2, "top": 0}
    members = member_names("video", "flac")
    for change, problem in (({}, None), ({"left": 8}, "cropped_from holds the picture")):
        video = description["video"] | {"cropped_from": whole | change}
        found = description_problem({**description, "video": video}, "000000000", members)
        assert (problem is None and found is None) or str(problem) in str(found)


def test_a_folder_that_was_not_packed_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(main, [str(tmp_path)]) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "cavmae pack" in error
    assert "Traceback" not in error
