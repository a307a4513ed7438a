"""Sets of sound alone and of pictures alone: what is listed, what is decoded, what is stored."""

import io
import json
import tarfile
import wave
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from cavmae.benchmarks.data.published_loader import write_published
from cavmae.command import exit_code
from cavmae.dataloaders.constants import Modalities
from cavmae.dataloaders.media import decode_clip
from cavmae.dataloaders.media.audio_codec import decode_audio, encode_audio
from cavmae.dataloaders.media.errors import DecodeSettings, Streams
from cavmae.dataloaders.packing.clip_list import list_clips
from cavmae.dataloaders.packing.pack import PackConfig, main, pack
from cavmae.dataloaders.packing.statistics import read_statistics
from cavmae.dataloaders.shards.format import parse_index
from cavmae.dataloaders.shards.shard_set import ShardSet
from cavmae.dataloaders.tools.inspect import draw, frame_pixels, survey
from cavmae.dataloaders.tools.verify import VerifyConfig, verify

WriteVideo = Callable[..., Path]


def packed(videos: Path, out: Path, **fields: object) -> Path:
    pack(PackConfig(str(videos), str(out), **{"workers": 1, **fields}), Console(quiet=True))  # pyright: ignore[reportArgumentType]
    assert all(not result.problems for result in verify(VerifyConfig(str(out), decode=True)))
    return out


def described(tier: Path) -> list[dict]:
    shards = ShardSet(tier)
    return [shards.description(*shards.at(position)) for position in range(shards.samples)]


def labels_by_source(tier: Path) -> dict[str, list[str]]:
    return {one["source"]["path"]: one["labels"] for one in described(tier)}


def write_sound(path: Path, seconds: float, hz: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(str(path)) + hz)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(hz)
        file.writeframes(rng.normal(0, 3000, round(seconds * hz)).astype("<i2").tobytes())


# ------------------------------------------------------------------- published sets of sounds


@pytest.fixture
def esc50(tmp_path: Path) -> Path:
    """Two clips of each fold, as ESC-50 lays them out; its list."""
    rows = ["filename,fold,target,category,esc10,src_file,take"]
    for fold in range(1, 6):
        for target, category in ((0, "dog"), (10, "rain")):
            name = f"{fold}-{17100 + fold}-A-{target}.wav"
            write_sound(tmp_path / "ESC-50-master" / "audio" / name, 5.0, 44100)
            rows.append(f"{name},{fold},{target},{category},True,{17100 + fold},A")
    meta = tmp_path / "ESC-50-master" / "meta" / "esc50.csv"
    meta.parent.mkdir()
    meta.write_text("\r\n".join(rows) + "\r\n")
    return meta


def test_esc50_packs_by_folds_with_its_categories_as_labels(esc50: Path, tmp_path: Path) -> None:
    train = packed(esc50, tmp_path / "train", modality="audio", split="1,2, 3,4")
    test = packed(esc50, tmp_path / "test", modality="audio", split="5")
    assert labels_by_source(test / "audio") == {
        "5-17105-A-0.wav": ["dog"],
        "5-17105-A-10.wav": ["rain"],
    }
    assert len(labels_by_source(train / "audio")) == 8
    assert {one["audio"]["samples"] for one in described(train / "audio")} == {5 * 16000}
    statistics = read_statistics(train / "audio")
    assert statistics is not None
    assert statistics["classes"] == {"dog": 4, "rain": 4} and statistics["seconds"] == 40
    assert statistics["log_mel"]["clips"] == 8 and statistics["source_codecs"] == {}
    assert {path.name for path in train.iterdir() if path.is_dir()} == {"audio", "finished"}


@pytest.fixture
def speech_commands(tmp_path: Path) -> Path:
    folder = tmp_path / "speech_commands"
    held_out = {"validation_list.txt": [], "testing_list.txt": []}
    for word in ("yes", "no"):
        for number, listed in enumerate(["", "", *held_out]):
            name = f"{word}/{number:08x}_nohash_0.wav"
            write_sound(folder / name, 1.0, 16000)
            if listed:
                held_out[listed].append(name)
    write_sound(folder / "_background_noise_" / "white_noise.wav", 3.0, 16000)
    (folder / "README.md").write_text("about")
    for name, lines in held_out.items():
        (folder / name).write_text("\n".join(lines) + "\n")
    return folder


def test_speech_commands_packs_by_its_lists_with_its_folders_as_labels(
    speech_commands: Path, tmp_path: Path
) -> None:
    found = {
        split: labels_by_source(
            packed(speech_commands, tmp_path / split, modality="audio", split=split) / "audio"
        )
        for split in ("training", "validation", "testing")
    }
    assert found["validation"] == {f"{one}/00000002_nohash_0.wav": [one] for one in ("yes", "no")}
    assert found["testing"] == {f"{one}/00000003_nohash_0.wav": [one] for one in ("yes", "no")}
    assert found["training"] == {
        f"{one}/0000000{number}_nohash_0.wav": [one] for one in ("yes", "no") for number in (0, 1)
    }


def test_a_listed_sound_that_is_not_there_is_skipped_by_name(
    speech_commands: Path, tmp_path: Path
) -> None:
    (speech_commands / "no" / "00000003_nohash_0.wav").unlink()
    out = packed(speech_commands, tmp_path / "out", modality="audio", split="testing")
    assert list(labels_by_source(out / "audio")) == ["yes/00000003_nohash_0.wav"]
    (line,) = map(json.loads, (out / "report.jsonl").read_text().splitlines())
    assert (line["source"], line["reason"]) == ("no/00000003_nohash_0.wav", "missing_file")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--modality=audio", "--split=train"), "it has testing, training, validation"),
        (("--split=testing",), "lists sounds; pack them with --modality audio"),
    ],
)
def test_what_does_not_fit_the_sounds_is_refused_in_one_line(
    speech_commands: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    message: str,
) -> None:
    assert exit_code(main, [str(speech_commands), str(tmp_path / "out"), *words]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("modality", "tiers", "use"),
    [
        ("audio", "frames", "audio"),
        ("video", "original", "frames, video"),
        ("both", "audio", "frames, video, original"),
    ],
)
def test_tiers_that_a_modality_does_not_have_are_refused(
    modality: Modalities, tiers: str, use: str
) -> None:
    message = f"tiers is '{tiers}' and modality {modality}; use some of {use}$"
    with pytest.raises(ValueError, match=message):
        PackConfig("videos", "out", modality, tiers=tiers)


def test_a_split_of_a_list_without_parts_is_refused(tmp_path: Path) -> None:
    write_sound(tmp_path / "sounds" / "a.wav", 1.0, 16000)
    config = PackConfig(str(tmp_path / "sounds"), str(tmp_path / "out"), "audio", "1")
    with pytest.raises(ValueError, match=r"split is '1', and .*sounds has no parts"):
        pack(config, Console(quiet=True))


# ------------------------------------------------------------------------ videos of one modality


@pytest.mark.parametrize("modality", ["audio", "video"])
def test_videos_give_the_members_of_one_modality_as_packing_both_does(
    write_video: WriteVideo, tmp_path: Path, modality: Modalities
) -> None:
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "clip.mkv")
    both = packed(tmp_path / "videos", tmp_path / "both", clip_seconds=0.7)
    alone = packed(tmp_path / "videos", tmp_path / "alone", clip_seconds=0.7, modality=modality)
    tiers = {"audio": "frames", "frames": "frames", "video": "video"}
    names = [path.name for path in alone.iterdir() if path.is_dir() and path.name != "finished"]
    assert sorted(names) == (["audio"] if modality == "audio" else ["frames", "video"])
    for name in names:
        one, other = ShardSet(alone / name), ShardSet(both / tiers[name])
        assert one.modality == modality and other.modality == "both"
        assert set(one.members) < set(other.members)
        for member in one.members[1:]:
            assert one.member(0, 0, member) == other.member(0, 0, member)
        known = one.description(0, 0)
        assert known.keys() < other.description(0, 0).keys()
        shared = known.keys() - {"crc32", "video"}
        assert all(known[key] == other.description(0, 0)[key] for key in shared)
        assert len(draw(one, 1, 0)) == 1 and survey(one, 0)


@pytest.mark.field
def test_a_video_without_a_stream_is_no_clip_of_both_but_one_of_the_other(
    write_video: WriteVideo, tmp_path: Path
) -> None:
    """Silent films, and sounds without pictures."""
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "film.mkv", sound=np.zeros(0, np.int16))
    write_video(tmp_path / "videos" / "song.mka", frames=[], container="matroska")
    for modality, source in (("audio", "song.mka"), ("video", "film.mkv")):
        out = packed(tmp_path / "videos", tmp_path / modality, modality=modality, tiers="")
        tier = out / ("audio" if modality == "audio" else "frames")
        assert list(labels_by_source(tier)) == [source]
    with pytest.raises(ValueError, match="none of the 2 clips can be packed"):
        pack(
            PackConfig(str(tmp_path / "videos"), str(tmp_path / "both"), workers=1),
            Console(quiet=True),
        )


@pytest.mark.field
def test_a_folder_of_pictures_is_a_set_of_pictures_alone(tmp_path: Path) -> None:
    """Of any mode and name; a truncated one is skipped: libavcodec would pack a green area."""
    colours = np.random.default_rng(0).integers(0, 255, (3, 4, 3))
    picture = Image.fromarray(np.kron(colours, np.ones((20, 20, 1))).astype(np.uint8))
    folder = tmp_path / "pictures"
    (folder / "a").mkdir(parents=True)
    turned = Image.Exif()
    turned[0x0112] = 6
    picture.save(folder / "a" / "turned.jpg", quality=95, exif=turned)
    picture.save(folder / "misnamed.jpg", "PNG")
    picture.save(folder / "series_%02d.jpg", quality=95)
    picture.convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    whole = (folder / "series_%02d.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    out = packed(folder, tmp_path / "out", modality="video", tiers="frames,video")
    (line,) = map(json.loads, (out / "report.jsonl").read_text().splitlines())
    assert (line["source"], line["reason"]) == ("cut.jpg", "decode_error")
    for tier in ("frames", "video"):
        shards = ShardSet(out / tier)
        for position, one in enumerate(described(out / tier)):
            assert one["video"]["times_seconds"] == [0.0]
            shown = frame_pixels(shards, *shards.at(position), 0)
            expected = np.asarray(picture)
            if one["source"]["path"] == "a/turned.jpg":
                expected = np.rot90(expected, -1)
            top, left = (
                (a - b) // 2 for a, b in zip(expected.shape[:2], shown.shape, strict=False)
            )
            expected = expected[top : top + shown.shape[0], left : left + shown.shape[1]]
            assert np.abs(shown.astype(float) - expected).mean() < 12, one["source"]


def test_pictures_beside_videos_are_no_clips(write_video: WriteVideo, tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "clip.mkv")
    Image.new("RGB", (64, 48)).save(tmp_path / "videos" / "clip.jpg")
    found = list_clips(tmp_path / "videos", tmp_path / "out", "video")
    assert [clip.source for clip in found.clips] == ["clip.mkv"]
    assert found.remarks() == ["not used: 1 files of text, subtitles or pictures, such as clip.jpg"]


def test_packing_one_modality_decodes_nothing_of_the_other(
    write_video: WriteVideo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("decoded")

    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "clip.mkv")

    def in_this_process(job: Callable, tasks: object, **_: object) -> object:
        yield from map(job, tasks)  # pyright: ignore[reportArgumentType]

    for modality, track in (("audio", "VideoTrack"), ("video", "AudioTrack")):
        config = PackConfig(str(tmp_path / "videos"), str(tmp_path / modality), modality)  # pyright: ignore[reportArgumentType]
        with monkeypatch.context() as patch:
            patch.setattr(decode_clip, track, refuse)
            assert pack(config, Console(quiet=True), in_this_process).clips == 1  # pyright: ignore[reportArgumentType]


def test_segments_are_as_long_as_the_modality_that_is_packed(
    write_video: WriteVideo, tmp_path: Path
) -> None:
    """A second of pictures, and three of sound."""
    (tmp_path / "videos").mkdir()
    sound = np.random.default_rng(0).normal(0, 3000, 48000).astype(np.int16)
    write_video(tmp_path / "videos" / "clip.mkv", sound=sound)
    counts = {
        modality: len(
            described(
                packed(
                    tmp_path / "videos",
                    tmp_path / modality,
                    modality=modality,
                    segment=True,
                    clip_seconds=1.0,
                    min_seconds=0.2,
                )
                / tier
            )
        )
        for modality, tier in (("audio", "audio"), ("video", "frames"))
    }
    assert counts == {"audio": 3, "video": 1}


def test_sets_of_other_modalities_can_not_be_compared(tmp_path: Path) -> None:
    write_sound(tmp_path / "sounds" / "a.wav", 1.0, 16000)
    train = packed(tmp_path / "sounds", tmp_path / "train", modality="audio")
    for modality, message in (("audio", "has the audio and frames of"), ("video", "too$")):
        config = PackConfig(
            str(tmp_path / "sounds"),
            str(tmp_path / modality),
            modality,  # pyright: ignore[reportArgumentType]
            not_in=(str(train),),
            workers=1,
        )
        with pytest.raises(ValueError, match=message):
            pack(config, Console(quiet=True))


# --------------------------------------------------------------------------- lists of other packers


def test_the_published_list_gives_its_sound_or_its_pictures(tmp_path: Path) -> None:
    sound = np.random.default_rng(0).normal(0, 3000, 32000).astype(np.int16)
    pictures = [Image.fromarray(np.full((30, 40, 3), 20 * n, np.uint8)) for n in range(10)]
    write_published(tmp_path, "one", encode_audio(sound, "wav"), pictures)
    entry = {"wav": "one.wav", "video_id": "one", "video_path": ".", "labels": "/m/09x0r"}
    (tmp_path / "list.json").write_text(json.dumps({"data": [entry]}))
    heard = ShardSet(packed(tmp_path / "list.json", tmp_path / "a", modality="audio") / "audio")
    assert np.array_equal(decode_audio(heard.member(0, 0, "flac")), sound)
    assert heard.description(0, 0)["source"]["path"] == "one"
    (tmp_path / "one.wav").unlink()  # pictures alone do not need it
    options = {"modality": "video", "tiers": "frames", "clip_seconds": 5.0}
    seen = ShardSet(packed(tmp_path / "list.json", tmp_path / "v", **options) / "frames")
    jpeg = (tmp_path / "frame_3" / "one.jpg").read_bytes()
    assert seen.member(0, 0, "3.jpg") == jpeg
    assert seen.description(0, 0)["video"]["seconds"] == 5.0


def test_tars_of_sounds_are_listed_where_sound_alone_is_packed(tmp_path: Path) -> None:
    sound = np.random.default_rng(0).normal(0, 3000, 16000).astype(np.int16)
    files = {"a.flac": encode_audio(sound, "flac"), "a.json": b'{"labels": ["dog"]}'}
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    out = packed(tmp_path / "set.tar", tmp_path / "out", modality="audio")
    assert labels_by_source(out / "audio") == {"set.tar/a.flac": ["dog"]}


# ------------------------------------------------------------------------------------- the index


def test_an_index_whose_tier_and_modality_disagree_is_refused(tmp_path: Path) -> None:
    write_sound(tmp_path / "sounds" / "a.wav", 1.0, 16000)
    out = packed(tmp_path / "sounds", tmp_path / "out", modality="audio")
    index = json.loads((out / "audio" / "index.json").read_bytes())
    for wrong in ({"modality": "video"}, {"modality": "sound"}, {"tier": "frames"}):
        with pytest.raises(ValueError, match=r"its tier is .* and its modality"):
            parse_index(json.dumps(index | wrong).encode(), "index.json")


@pytest.mark.parametrize("streams", ["both", "video", "any"])
def test_a_video_is_told_by_its_content_whatever_its_name(
    write_video: WriteVideo, tmp_path: Path, streams: Streams
) -> None:
    path = write_video(tmp_path / "video.mp4").rename(tmp_path / "video.jpg")
    clip = decode_clip.decode_clip(str(path), 0.0, 10.0, DecodeSettings(streams=streams))
    assert len(clip.frames) > 1
