"""Lists that others have made: the published JSON, and tars of videos."""

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from cavmae.benchmarks.data.published_loader import write_published
from cavmae.dataloaders.config import ClipShape, DataConfig
from cavmae.dataloaders.loading.loader import ValidationLoader
from cavmae.dataloaders.media.audio_codec import encode_audio
from cavmae.dataloaders.packing.clip_list import clip_labels, list_clips
from cavmae.dataloaders.packing.pack import PackConfig, pack
from cavmae.dataloaders.shards.shard_set import ShardSet
from cavmae.dataloaders.tools.verify import VerifyConfig, verify

WriteVideo = Callable[..., Path]


def packed(videos: Path, out: Path, **fields: object) -> Path:
    options = {"workers": 1, **fields}
    pack(PackConfig(str(videos), str(out), **options), Console(quiet=True))  # pyright: ignore[reportArgumentType]
    assert all(not result.problems for result in verify(VerifyConfig(str(out))))
    return out


def samples(tier: Path) -> list[dict]:
    shards = ShardSet(tier)
    return [
        shards.description(shard, sample)
        for shard, size in enumerate(shards.sizes)
        for sample in range(size)
    ]


def skipped(out: Path) -> list[tuple[str, str]]:
    lines = (out / "report.jsonl").read_text().splitlines()
    return [(line["source"], line["reason"]) for line in map(json.loads, lines)]


# ------------------------------------------------------------------------- the published list


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """Clips as the published preparation leaves them: two whole ones, one without its last picture,
    one without any."""
    folder = tmp_path / "prepared"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in ("one", "two", "short", "bare"):
        sound = (rng.normal(0, 3000, 16000 * 12)).astype(np.int16)
        frames = [Image.fromarray(np.full((300, 400, 3), 20 * n, np.uint8)) for n in range(10)]
        write_published(folder, name, encode_audio(sound, "wav"), frames)
    (folder / "frame_9" / "short.jpg").unlink()
    for number in range(10):
        (folder / f"frame_{number}" / "bare.jpg").unlink()
    entries = [
        {"wav": f"{name}.wav", "video_id": name, "video_path": ".", "labels": "/m/09x0r,/m/05zppz"}
        for name in ("one", "two", "short", "bare")
    ]
    (folder / "list.json").write_text(json.dumps({"data": entries}))
    return folder / "list.json"


def test_the_published_list_packs_with_its_pictures_as_they_are(
    published: Path, tmp_path: Path
) -> None:
    out = packed(published, tmp_path / "set", tiers="frames")
    assert skipped(out) == [("bare", "missing_file")]
    first = samples(out / "frames")[0]
    assert first["labels"] == ["/m/09x0r", "/m/05zppz"] and first["source"]["path"] == "one"
    assert first["audio"]["samples"] == 160000, "the first ten seconds of twelve"
    assert first["video"]["width"] == first["video"]["height"] == 224
    shards = ShardSet(out / "frames")
    for number in range(10):
        assert (
            shards.member(0, 0, f"{number}.jpg")
            == (published.parent / f"frame_{number}" / "one.jpg").read_bytes()
        )
    assert json.loads((out / "statistics.json").read_bytes())["classes"] == {
        "/m/09x0r": 3,
        "/m/05zppz": 3,
    }
    assert shards.member(0, 2, "9.jpg") == shards.member(0, 2, "8.jpg"), "as the original loader"
    assert samples(out / "frames")[2]["timing"] == {"frames_repeated": 1}


def test_the_video_tier_of_pictures_is_refused(published: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tiers is 'frames,video', but .* use --tiers frames"):
        packed(published, tmp_path / "set")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "not a list in the published format"),
        ('{"data": 3}', "not a list in the published format"),
        ("{", "not a list in the published format"),
        (
            '{"data": [{"wav": "a", "video_id": "a", "video_path": "a"}]}',
            "entry 0: labels is missing",
        ),
        ('{"data": [{"wav": "a.wav"}]}', "entry 0: wav, video_id, video_path have to be"),
    ],
)
def test_a_json_of_another_kind_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        list_clips(tmp_path / "list.json", tmp_path / "out")


# ---------------------------------------------------------------------------- tars of videos


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


@pytest.fixture
def tars(tmp_path: Path, write_video: WriteVideo) -> Path:
    """Two tars; the second clip has a window, the third no description and a pickle beside it."""
    folder = tmp_path / "tars"
    folder.mkdir()
    videos = []
    for number in range(3):
        frames = [np.full((48, 64, 3), 30 + 60 * number + f, np.uint8) for f in range(20)]
        tone = (np.sin(np.arange(32000) * (0.05 + 0.02 * number)) * 9000).astype(np.int16)
        path = write_video(tmp_path / f"{number}.mkv", frames=frames, sound=tone)
        videos.append(path.read_bytes())
    with tarfile.open(folder / "a.tar", "w") as tar:
        add(tar, "x/0001.mkv", videos[0])
        add(tar, "x/0001.json", b'{"labels": ["dog", "cat"]}')
        add(tar, "x/0002.json", b'{"labels": "bird", "start": 0.5, "end": 1.5}')
        add(tar, "x/0002.mkv", videos[1])
    with tarfile.open(folder / "b.tar", "w") as tar:
        add(tar, "0003.pickle", b"cos\nsystem\n(S'false'\ntR.")
        add(tar, "0003.mkv", videos[2])
        add(tar, "0004.mp4", b"no video at all")
    return folder


def test_videos_are_packed_out_of_their_tars(tars: Path, tmp_path: Path) -> None:
    out = packed(tars, tmp_path / "set")
    first, second, third = samples(out / "video")
    assert [one["source"]["path"] for one in (first, second, third)] == [
        "a.tar/x/0001.mkv",
        "a.tar/x/0002.mkv",
        "b.tar/0003.mkv",
    ]
    assert [one["labels"] for one in (first, second, third)] == [["dog", "cat"], ["bird"], []]
    assert first["video"]["frames"] == 20 and second["video"]["frames"] == 10
    assert second["audio"]["samples"] == 16000
    assert skipped(out) == [("b.tar/0004.mp4", "open_failed")]


def test_a_video_in_a_tar_packs_to_the_same_as_alone(tars: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    for number in range(3):
        shutil.copy(tmp_path / f"{number}.mkv", alone)
    ours, theirs = packed(tars / "b.tar", tmp_path / "s1"), packed(alone, tmp_path / "s2")
    for tier, extensions in {"video": ["flac", "mp4"], "frames": ["flac", "3.jpg"]}.items():
        for extension in extensions:
            one = ShardSet(ours / tier).member(0, 0, extension)
            assert one == ShardSet(theirs / tier).member(0, 2, extension)


@pytest.mark.parametrize("name", ["../escape.mp4", "/etc/escape.mp4", "a/../../b.mp4"])
def test_names_that_lead_out_of_a_tar_are_refused(name: str, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        add(tar, name, b"x")
    with pytest.raises(ValueError, match="which leads out of it"):
        list_clips(tmp_path / "bad.tar", tmp_path / "out")


def test_links_and_devices_are_no_videos(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "odd.tar", "w") as tar:
        for name, kind in (("a.mp4", tarfile.SYMTYPE), ("b.mp4", tarfile.CHRTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
    with pytest.raises(FileNotFoundError, match="no videos in"):
        list_clips(tmp_path / "odd.tar", tmp_path / "out")


@pytest.mark.parametrize(
    ("description", "message"),
    [
        (b"[1]", "not a JSON object"),
        (b"{", "is not JSON"),
        (b" " * (1 << 21), "has more than"),
        (b'{"labels": [3]}', r"labels is \[3\]; use a text, a list"),
        (b'{"start": "soon"}', "key start: 'soon' is not a number of seconds"),
        (b'{"start": 5, "end": 2}', "key end: 2 must be after start 5"),
    ],
)
def test_a_damaged_description_is_named(description: bytes, message: str, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        add(tar, "clip.mp4", b"x")
        add(tar, "clip.json", description)
    with pytest.raises(ValueError, match=rf"clip\.(json|mp4) in .*bad\.tar.*{message}"):
        list_clips(tmp_path / "bad.tar", tmp_path / "out")


def test_what_is_no_tar_is_refused(tmp_path: Path) -> None:
    (tmp_path / "no.tar").write_bytes(b"something else" * 100)
    with pytest.raises(ValueError, match=r"no\.tar is not a tar of videos"):
        list_clips(tmp_path / "no.tar", tmp_path / "out")


# ------------------------------------------------------------------------------------ all of them


@pytest.mark.field
@pytest.mark.parametrize(
    ("value", "labels"),
    [
        (None, ()),
        ("", ()),
        ([], ()),
        ("race car, auto racing", ("race car, auto racing",)),
        (["race car, auto racing"], ("race car, auto racing",)),
        ("a; b;a", ("a", "b")),
        (["x", "x", " y "], ("x", "y")),
        ("/m/09x0r,/m/05zppz", ("/m/09x0r", "/m/05zppz")),
        ("/m/09x0r;/m/05zppz", ("/m/09x0r", "/m/05zppz")),
        ("caf\udce9", ("caf\\udce9",)),
    ],
)
def test_labels_have_one_meaning_wherever_they_are_listed(
    value: object, labels: tuple[str, ...]
) -> None:
    assert clip_labels(value, "here") == labels


@pytest.mark.field
def test_what_a_tar_has_beside_its_videos_is_used_or_named(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("0.mp4", "1.mp4", "2.MP4", "3.flv", "4.mp4"):
            add(tar, name, b"x")
        add(tar, "0.JSON", b'{"labels": "a;b"}')
        add(tar, "1.info.json", b'{"labels": ["c"]}')
        add(tar, "1.mp4.json", b'{"labels": ["c"]}')
        add(tar, "2.json", b'{"label": "d"}')
        add(tar, "3.json", b'{"labels": null}')
        add(tar, "4.cls", b"7")
        add(tar, "4.mp4", b"again")
    listed = list_clips(path, tmp_path / "out")
    assert [clip.labels for clip in listed.clips] == [("a", "b"), (), (), (), ()]
    assert [line.replace(f" in {path}", "") for line in listed.remarks()] == [
        "not used: 1 files in tars that are neither videos nor JSON, such as 4.cls",
        "not used: 1 videos in tars with a later one of the same name, such as 4.mp4",
        "not used: 2 JSON files in tars that belong to no video, as KEY.json does, such as "
        "1.info.json",
        "not used: 1 JSON files in tars without labels, such as 2.json",
    ]


@pytest.mark.field
@pytest.mark.parametrize(
    "data",
    [
        "path,labels\n-x.mp4,a;b\n".encode("utf-8-sig"),
        "path;labels\r\n-x.mp4;'a, b'\r\n;\r\n".encode("utf-16"),
        "# made by hand\n\npath\tlabels\n-x.mp4\té\n".encode(),
    ],
)
def test_lists_of_any_program_are_read(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "clips.csv").write_bytes(data)
    listed = list_clips(tmp_path / "clips.csv", tmp_path / "out")
    assert [clip.source for clip in listed.clips] == ["-x.mp4"] and listed.clips[0].labels
    assert ("empty rows" in listed.not_used) == (b";\0\r" in data)


@pytest.mark.field
@pytest.mark.parametrize(
    "text",
    [
        "# Segments csv created Sun Mar  5 10:54:31 2017\n"
        "# YTID, start_seconds, end_seconds, positive_labels\n"
        '--PJHxphWEs, 30.000, 40.000, "/m/09x0r,/t/dd00088"\n',
        '---g-f_I2yQ,1,"people marching, far away",test\n',
    ],
)
def test_audiosets_and_vggsounds_own_lists_name_no_files(text: str, tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text(text)
    line = text.count("\n")
    with pytest.raises(ValueError, match=rf"own\.csv, line {line}: .* which name no files; write"):
        list_clips(tmp_path / "own.csv", tmp_path / "out")


@pytest.mark.field
def test_jpegs_of_any_size_and_kind_pack_decode_and_verify(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    kinds = dict.fromkeys(["odd", "phone", "print", "gray", "mixed", "bomb"], "JPEG")
    kinds["phone"] = "MPO"
    for name, kind in kinds.items():
        frames = [
            Image.fromarray(np.full((93, 121 + (n if name == "mixed" else 0), 3), 9 * n, np.uint8))
            for n in range(10)
        ]
        sound = rng.normal(0, 3000, 16000).astype(np.int16)
        write_published(tmp_path, name, encode_audio(sound, "wav"), frames)
        for number, frame in enumerate(frames):
            more = {"save_all": True, "append_images": [frame]} if kind == "MPO" else {}
            mode = {"print": "CMYK", "gray": "L"}.get(name, "RGB")
            frame.convert(mode).save(tmp_path / f"frame_{number}/{name}.jpg", kind, **more)
    bomb = bytearray((tmp_path / "frame_9/bomb.jpg").read_bytes())
    size = bomb.index(b"\xff\xc0") + 5
    bomb[size : size + 4] = b"\x3e\x80" * 2  # 16,000 x 16,000 pixels
    (tmp_path / "frame_9/bomb.jpg").write_bytes(bomb)
    entries = [
        {"wav": f"{name}.wav", "video_id": name, "video_path": ".", "labels": None}
        for name in kinds
    ]
    (tmp_path / "list.json").write_text(json.dumps({"data": entries}))
    out = tmp_path / "set"
    pack(PackConfig(str(tmp_path / "list.json"), str(out), tiers="frames"), Console(quiet=True))
    assert skipped(out) == [("mixed", "frame_sizes"), ("bomb", "decode_error")]
    assert not [one for one in verify(VerifyConfig(str(out), decode=True)) if one.problems]
    tier, shape = str(out / "frames"), ClipShape(audio_frames=98, mel_bins=128, image_size=32)
    one_rank: dict[str, Any] = {"rank": 0, "world_size": 1, "device": torch.device("cpu")}
    loader = ValidationLoader(DataConfig(), shape, folder=tier, batch=4, limit=0, **one_rank)
    assert [len(batch.sample_ids) for batch in loader] == [4] and not loader.quarantine


@pytest.mark.field
def test_rows_that_give_a_clip_other_labels_are_one_clip(tmp_path: Path) -> None:
    """Lists of events, as DCASE's, have a row for each label of a clip."""
    rows = ["a.mp4,0,1,x", "b.mp4,0,1,x", "a.mp4,0,1,y;x", "b.mp4,0,1,x", "a.mp4,1,2,z"]
    (tmp_path / "list.csv").write_text("\n".join(["path,start,end,labels", *rows]))
    listed = list_clips(tmp_path / "list.csv", tmp_path / "out")
    assert [(clip.source, clip.start_seconds, clip.labels) for clip in listed.clips] == [
        ("a.mp4", 0, ("x", "y")),
        ("b.mp4", 0, ("x",)),
        ("b.mp4", 0, ("x",)),
        ("a.mp4", 1, ("z",)),
    ]
    assert listed.remarks() == [
        "not used: 1 rows of a clip listed before, whose labels were joined, such as a.mp4"
    ]
