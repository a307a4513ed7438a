"""`cavmae inspect`: what it prints, and the sheet it writes."""

import base64
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cavmae.command import exit_code
from cavmae.dataloaders.shards.shard_set import ShardSet
from cavmae.dataloaders.tools import inspect


@pytest.mark.parametrize("tier", ["frames", "video"])
def test_it_prints_what_the_set_holds_and_writes_a_page(
    tier: str, packed_synthetic: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sheet.html"
    words = [str(packed_synthetic / tier), "--out", str(out), "--clips", "5"]
    assert inspect.main(words) == 0
    printed = capsys.readouterr().out
    shards = ShardSet(packed_synthetic / tier)
    assert "24 in 3 shards" in printed and tier in printed
    label = shards.description(0, 0)["labels"][0]
    assert label in printed
    page = out.read_text()
    ids = re.findall(r"<b>(\d+/\d+)</b>", page)
    assert len(ids) == len(set(ids)) == 5
    pictures = re.findall(r"base64,([^\"]+)\"", page)
    assert len(pictures) == 10
    frame = Image.open(io.BytesIO(base64.b64decode(pictures[0])))
    assert frame.size == (64, 64)
    # The frame is the one that the other tier has for the clip.
    shard, key = ids[0].split("/")
    sample = int(key) - sum(shards.sizes[: int(shard)])
    jpeg = ShardSet(packed_synthetic / "frames").member(int(shard), sample, "5.jpg")
    truth = np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"), dtype=np.float64)
    assert np.abs(np.asarray(frame, dtype=np.float64) - truth).mean() < 6


def test_what_the_set_holds_is_one_json_document(
    packed_synthetic: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = packed_synthetic / "frames"
    words = [str(shards), "--json", "--clips=1", f"--out={tmp_path / 'sheet.html'}"]
    assert inspect.main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["clips"], found["shards"], found["sampled"]) == (24, 3, 24)
    assert sum(found["labels"].values()) == sum(count for *_, count in found["lengths"]) == 24
    assert found["frame_sizes"] == {"64 x 64": 24}


def test_the_draw_depends_on_the_seed_alone(packed_synthetic: Path) -> None:
    shards = ShardSet(packed_synthetic / "frames")
    drawn = [[card.sample_id for card in inspect.draw(shards, 6, seed)] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_picture_is_written_too(packed_synthetic: Path, tmp_path: Path) -> None:
    out = tmp_path / "sheet.png"
    assert inspect.main([str(packed_synthetic / "frames"), "--out", str(out), "--clips", "3"]) == 0
    assert Image.open(out).size[0] > 500


def test_skipped_clips_are_counted(
    packed_synthetic: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(packed_synthetic / "frames", tmp_path / "set" / "frames")
    shutil.copy(packed_synthetic / "statistics.json", tmp_path / "set")
    (tmp_path / "set" / "report.jsonl").write_text('{"reason": "no_audio"}\n' * 3)
    (tmp_path / "link").symlink_to(tmp_path / "set" / "frames")
    for folder in (tmp_path / "set" / "frames", tmp_path / "link"):
        words = [str(folder), "--clips", "1", "--out", str(tmp_path / "x.html")]
        assert inspect.main(words) == 0
        printed = capsys.readouterr().out
        assert "not packed" in printed and re.search(r"no_audio\W+3", printed)


def test_a_set_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(inspect.main, ["nowhere"]) == 1
    errors = capsys.readouterr().err
    assert "nowhere/index.json does not exist" in errors and errors.count("\n") == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"clips": 0}, "clips is 0; use 1 or more"),
        ({"out": "x.pdf"}, r"a \.html or \.png file"),
    ],
)
def test_fields_out_of_range_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inspect.InspectConfig("shards", **fields)


def test_a_damaged_clip_is_named(packed_synthetic: Path, tmp_path: Path) -> None:
    copy = tmp_path / "frames"
    shutil.copytree(packed_synthetic / "frames", copy)
    data = bytearray((copy / "000000.tar").read_bytes())
    offset, size = ShardSet(copy)._range(0, 0, "flac")
    data[offset + size // 2] ^= 0xFF
    (copy / "000000.tar").write_bytes(data)
    with pytest.raises(ValueError, match="crc_mismatch: flac of sample 0 of"):
        inspect.draw(ShardSet(copy), 24, 0)
