"""Clips that cannot be decoded are left out by name and reason; nothing else of the run changes."""

import dataclasses
import importlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import given, take

from cavmae.dataloaders.batch import AudioVideoBatch
from cavmae.dataloaders.config import Augmentation, ClipShape, DataConfig
from cavmae.dataloaders.loading import pipeline, quarantine, reader
from cavmae.dataloaders.loading.dali import ClipDecoder
from cavmae.dataloaders.loading.loader import TrainLoader, ValidationLoader
from cavmae.dataloaders.loading.quarantine import (
    DataFaultError,
    DecoderFaultError,
    Journal,
    Quarantine,
    find_culprits,
    journal_folder,
)
from cavmae.dataloaders.loading.reader import ReaderSettings, ReadTask
from cavmae.dataloaders.media.encode_video import describe_fragments
from cavmae.dataloaders.packing.pack import PackConfig, pack
from cavmae.dataloaders.sampling.sample_plan import SamplePlan, any_sample
from cavmae.dataloaders.sampling.step_shares import StepShares
from cavmae.dataloaders.shards.shard_set import ShardSet
from cavmae.dataloaders.shards.writer import ShardWriter, write_index
from cavmae.dataloaders.tools.synthetic import generate

SHAPE = ClipShape(audio_frames=64, mel_bins=32, image_size=32)
CONFIG = DataConfig(reader_workers=1, decode_threads=1, shuffle_window=4)
SEED, BATCH, LANES = 5, 4, 2

HEADER_BYTES = {"flac": 42, ".jpg": 200}
"""Up to the end of STREAMINFO, and beyond the frame header."""

Damage = Callable[[dict[str, bytes]], None]


def bits_flipped(extension: str) -> Damage:
    """Bytes that are not those that were packed, in all of a member's frames: the checksum
    tells."""

    def damage(members: dict[str, bytes]) -> None:
        data = bytearray(members[extension])
        for place in range(0, len(data), 64):
            data[place] ^= 0xFF
        members[extension] = bytes(data)

    return damage


def packed_as(extension: str, data: bytes | None = None) -> Damage:
    """Bytes that were packed as they are, with the right checksum: in place of a video, or of a
    sound or a JPEG behind its header, where only a decoder can tell. Without `data`, a video whose
    frames hold no picture behind their headers."""

    def damage(members: dict[str, bytes]) -> None:
        description = json.loads(members["json"])
        damaged = _without_pictures(members[extension]) if data is None else data
        if extension != "mp4":
            damaged = members[extension][: HEADER_BYTES[extension[-4:]]] + damaged
        members[extension] = damaged
        if extension == "mp4":
            frames = description["video"]["frames"]
            piece = len(damaged) // (frames + 1)
            sizes = [len(damaged) - frames * piece, *[piece] * frames]
            if data is None:
                sizes = describe_fragments(damaged)["bytes"]
            ends = list(itertools.accumulate(sizes))
            parts = [damaged[end - size : end] for size, end in zip(sizes, ends, strict=True)]
            sums = [zlib.crc32(part) for part in parts]
            description["fragments"] = {"bytes": sizes, "crc32": sums}
        description["crc32"][extension] = zlib.crc32(damaged)
        members["json"] = json.dumps(description).encode()

    return damage


def _without_pictures(video: bytes) -> bytes:
    damaged = bytearray(video)
    start = video.find(b"mdat")
    while start >= 0:
        end = start - 4 + int.from_bytes(video[start - 4 : start], "big")
        damaged[start + 13 : end] = b"\xff" * (end - start - 13)
        start = video.find(b"mdat", end)
    return bytes(damaged)


def described_as(**fields: object) -> Damage:
    def damage(members: dict[str, bytes]) -> None:
        members["json"] = json.dumps({**json.loads(members["json"]), **fields}).encode()

    return damage


def damaged_copy(tier: Path, out: Path, damages: dict[tuple[int, int], Damage]) -> str:
    """A copy of a tier in which some samples, by (shard, sample), are damaged."""
    whole = ShardSet(tier)
    out.mkdir()
    entries = []
    for shard in range(len(whole.sizes)):
        writer = ShardWriter(out, whole.shard_id(shard))
        for sample in range(whole.sizes[shard]):
            members = {
                extension: whole.member(shard, sample, extension) for extension in whole.members
            }
            damages.get((shard, sample), lambda members: None)(members)
            writer.add(whole.sample_id(shard, sample).split("/")[1], members)
        entries.append(writer.finish())
    index = json.loads((tier / "index.json").read_text())
    kept = ("tier", "audio_codec", "video_codec", "short_side", "frame_choice", "skipped")
    content = ["0" * 64] * sum(entry.samples for entry in entries if entry)
    write_index(out, **{field: index[field] for field in kept}, content=content, shards=entries)
    return str(out)


@pytest.fixture
def start(train_loader: Callable[..., TrainLoader]) -> Callable[..., TrainLoader]:
    """Start a loader that ends with the test."""

    def loader(folder: str | Path, **fields: Any) -> TrainLoader:
        config = dataclasses.replace(CONFIG, train=str(folder), **fields.pop("config", {}))
        plan = {"seed": SEED, "global_batch": BATCH, "micro_batch": BATCH, "lanes": LANES}
        return train_loader(config, SHAPE, **(plan | fields))

    return loader


def plan_of(shards: ShardSet) -> SamplePlan:
    return SamplePlan(shards.sizes, SEED, LANES, CONFIG.shuffle_window)


def by_position(
    batches: list[AudioVideoBatch],
) -> dict[int, tuple[str, torch.Tensor, torch.Tensor]]:
    return {
        position: (batch.sample_ids[row], given(batch.log_mel)[row], given(batch.frames)[row])
        for batch in batches
        for row, position in enumerate(batch.positions.tolist())
    }


@pytest.fixture(scope="module")
def sound(packed_synthetic: Path) -> dict[int, tuple[str, torch.Tensor, torch.Tensor]]:
    """Five batches of the set before it is damaged."""
    config = dataclasses.replace(CONFIG, train=str(packed_synthetic / "video"))
    loader = TrainLoader(
        config,
        SHAPE,
        seed=SEED,
        shares=StepShares(BATCH, LANES, world_size=1, micro_batch=BATCH),
        rank=0,
        device=torch.device("cpu"),
    )
    batches = take(loader, 5)
    loader.close()
    return by_position(batches)


DAMAGES = {
    "flac_bits": (bits_flipped("flac"), "crc_mismatch"),
    "mp4_bits": (bits_flipped("mp4"), "crc_mismatch"),
    "flac_garbage": (packed_as("flac", b"not a flac file" * 100), "audio_undecodable"),
    "mp4_garbage": (packed_as("mp4", b"not a video" * 100), "wrong_header"),
    "mp4_without_pictures": (packed_as("mp4"), "video_undecodable"),
    "no_sound": (described_as(audio={"hz": 16000, "samples": 3}), "audio_too_short"),
    "no_video_fields": (described_as(video=None), "bad_schema"),
}


def _stating(extension: str, at: int, stated: bytes) -> Damage:
    """A member, whole and with the right checksum, whose header states something else."""

    def damage(members: dict[str, bytes]) -> None:
        data, description = bytearray(members[extension]), json.loads(members["json"])
        start = data.index(b"\xff\xc0") + at if extension.endswith("jpg") else at
        data[start : start + len(stated)] = stated
        description["crc32"][extension] = zlib.crc32(data)
        members |= {extension: bytes(data), "json": json.dumps(description).encode()}

    return damage


@pytest.mark.parametrize(
    ("tier", "damage", "reason", "detail"),
    [
        ("frames", _stating("5.jpg", 5, b"\x3e\x80\x3e\x80"), "wrong_header", "16000 x 16000"),
        ("video", _stating("flac", 21, b"\xf0\x14\x99\x70\0"), "wrong_header", "its flac is not"),
        ("video", described_as(audio={"samples": 1 << 40}), "bad_schema", "1099511627776 samples"),
        (
            "frames",
            described_as(video={"width": 16000, "height": 16000, "seconds": 3}),
            "bad_schema",
            "a video of 16000 x 16000 pixels",
        ),
    ],
)
def test_a_reader_hands_no_bomb_to_a_decoder(
    tier: str, damage: Damage, reason: str, detail: str, packed_synthetic: Path, tmp_path: Path
) -> None:
    copy = damaged_copy(packed_synthetic / tier, tmp_path / "copy", {(0, 0): damage})
    settings = ReaderSettings(ShardSet(copy), CONFIG, SHAPE, SEED, training=False, gpu=None)
    read = reader.ClipReader(settings)
    found, intact = read(ReadTask(0, 0, 0, 0)), read(ReadTask(1, 0, 0, 1))
    assert isinstance(found, reader.BadSample) and isinstance(intact, reader.EncodedClip)
    assert found.reason == reason and detail in found.detail


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_clip_is_named_replaced_as_planned_and_changes_nothing_else(
    damage: str,
    sound: dict[int, tuple[str, torch.Tensor, torch.Tensor]],
    packed_synthetic: Path,
    tmp_path: Path,
    start: Callable[..., TrainLoader],
) -> None:
    tier = packed_synthetic / "video"
    whole = ShardSet(tier)
    plan = plan_of(whole)
    bad = plan.samples(6, 1)[0]
    break_it, reason = DAMAGES[damage]
    copy = damaged_copy(tier, tmp_path / "copy", {(bad.shard, bad.sample): break_it})

    loader = start(copy)
    batches = take(loader, 5)

    bad_id = whole.sample_id(bad.shard, bad.sample)
    found = loader.quarantine
    assert [(one.sample_id, one.reason, one.position) for one in found] == [(bad_id, reason, 6)]
    substitute = plan.substitute(6, 0)
    ours = by_position(batches)
    assert ours[6][0] == whole.sample_id(substitute.shard, substitute.sample)
    for position in set(sound) - {6}:
        assert ours[position][0] == sound[position][0]
        assert torch.equal(ours[position][1], sound[position][1])
        assert torch.equal(ours[position][2], sound[position][2])


@pytest.mark.parametrize("damage", ["flac_bits", "flac_garbage"])
def test_a_damaged_partner_is_replaced_and_the_first_clip_stays(
    damage: str,
    packed_synthetic: Path,
    tmp_path: Path,
    start: Callable[..., TrainLoader],
) -> None:
    """Found by its checksum in a reader, or refused by DALI."""
    tier = packed_synthetic / "video"
    whole = ShardSet(tier)
    plan = plan_of(whole)
    own = [tuple(one[:2]) for one in plan.samples(0, 12)]
    partners = [any_sample(plan.ends, SEED, "mix_source", position, 0) for position in range(12)]
    place = next(p for p in range(4, 12) if partners[p] not in own[: p + 1] + partners[:p])
    break_it, reason = DAMAGES[damage]
    copy = damaged_copy(tier, tmp_path / "copy", {partners[place]: break_it})
    mixing = {"augmentation": Augmentation(mixup_prob=1.0)}

    loader = start(copy, config=mixing)
    batches = take(loader, 3)
    bad_id = whole.sample_id(*partners[place])
    found = loader.quarantine
    assert [(one.sample_id, one.reason, one.position) for one in found] == [(bad_id, reason, place)]
    ours, sound = by_position(batches), by_position(take(start(tier, config=mixing), 3))
    assert ours[place][0] == sound[place][0] == whole.sample_id(*own[place])
    assert not torch.equal(ours[place][2], sound[place][2])
    knowing = by_position(take(start(copy, config=mixing, quarantine=[bad_id]), 3))
    for position, (sample_id, log_mel, frames) in knowing.items():
        assert ours[position][0] == sample_id
        assert torch.equal(ours[position][1], log_mel)
        assert torch.equal(ours[position][2], frames)


def test_a_restart_that_knows_the_bad_clips_goes_on_bit_for_bit(
    packed_synthetic: Path, tmp_path: Path, start: Callable[..., TrainLoader]
) -> None:
    plan = plan_of(ShardSet(packed_synthetic / "video"))
    bad = {(one.shard, one.sample): packed_as("flac", b"x" * 99) for one in plan.samples(5, 3)}
    copy = damaged_copy(packed_synthetic / "video", tmp_path / "copy", bad)
    loader = start(copy)
    take(loader, 3)
    known = [(one.sample_id, one.reason) for one in loader.quarantine]
    rest = by_position(take(loader, 5))
    again = start(copy, start_position=12, quarantine=known)
    resumed = by_position(take(again, 5))
    assert [item[0] for item in known] != []
    assert [(one.sample_id, one.reason) for one in again.quarantine][: len(known)] == known
    assert list(resumed) == list(rest)
    for position, (sample_id, log_mel, frames) in rest.items():
        assert resumed[position][0] == sample_id
        assert torch.equal(resumed[position][1], log_mel)
        assert torch.equal(resumed[position][2], frames)


def test_bad_clips_read_ahead_are_not_reported_before_their_batch(
    packed_synthetic: Path, tmp_path: Path, start: Callable[..., TrainLoader]
) -> None:
    """A checkpoint made now must not know what only a later position has shown."""
    plan = plan_of(ShardSet(packed_synthetic / "video"))
    bad = plan.samples(9, 1)[0]
    copy = damaged_copy(
        packed_synthetic / "video",
        tmp_path / "copy",
        {(bad.shard, bad.sample): bits_flipped("flac")},
    )
    loader = start(copy, config={"prefetch_batches": 4})
    counts = []
    for batch in itertools.islice(loader, 4):
        counts.append((int(batch.positions[-1]), len(loader.quarantine)))
    assert counts == [(3, 0), (7, 0), (11, 1), (15, 1)]


def test_more_bad_clips_than_allowed_stop_the_run_with_a_table(
    packed_synthetic: Path, tmp_path: Path, start: Callable[..., TrainLoader]
) -> None:
    places = [(shard, sample) for shard in range(3) for sample in range(8)]
    damages = {place: bits_flipped("flac") for place in places[:7]}
    damages |= {place: bits_flipped("mp4") for place in places[7:10]}
    damages[places[10]] = packed_as("mp4", b"no video" * 100)
    copy = damaged_copy(packed_synthetic / "video", tmp_path / "copy", damages)
    with pytest.raises(DataFaultError) as stopped:
        take(start(copy), 100)
    assert "11 clips of" in str(stopped.value)
    assert "data.max_bad_fraction = 0.01" in str(stopped.value)
    assert "crc_mismatch" in str(stopped.value)
    assert "wrong_header" in str(stopped.value)
    tolerant = start(copy, config={"max_bad_fraction": 1.0})
    take(tolerant, 6)
    assert len(tolerant.quarantine) == 11


def test_a_clip_found_again_at_an_earlier_place_is_listed_once(packed_synthetic: Path) -> None:
    """Readers are ahead: a substitute may be found damaged before the batch that they have read."""
    quarantine = Quarantine(ShardSet(packed_synthetic / "video"), (), 0.0)
    for position, reason in ((20, "first"), (5, "second"), (30, "third")):
        task = ReadTask(position, 0, 1, 2)
        quarantine.add(reader.BadSample(task, "000001/000000010", reason, ""))
    assert [(one.position, one.reason) for one in quarantine.samples] == [(5, "second")]
    assert quarantine.excludes(ReadTask(5, 0, 1, 2))
    assert not quarantine.excludes(ReadTask(4, 0, 1, 2))


def test_ten_bad_clips_never_stop_a_run(
    packed_synthetic: Path, tmp_path: Path, start: Callable[..., TrainLoader]
) -> None:
    damages = {(0, sample): bits_flipped("flac") for sample in range(8)}
    damages |= {(1, sample): bits_flipped("flac") for sample in range(2)}
    copy = damaged_copy(packed_synthetic / "video", tmp_path / "copy", damages)
    loader = start(copy)
    ids = {sample_id for batch in take(loader, 12) for sample_id in batch.sample_ids}
    assert len(loader.quarantine) == 10
    assert len(ids) == 14


def test_validation_leaves_bad_clips_out_and_names_them(
    packed_synthetic: Path, tmp_path: Path, validation_loader: Callable[..., ValidationLoader]
) -> None:
    damages = {(0, 1): packed_as("flac", b"x"), (2, 0): bits_flipped("mp4")}
    copy = damaged_copy(packed_synthetic / "video", tmp_path / "copy", damages)
    whole = ShardSet(copy)
    loader = validation_loader(CONFIG, SHAPE, folder=copy)
    positions = [position for batch in loader for position in batch.positions.tolist()]
    assert positions == [position for position in range(24) if position not in (1, 16)]
    assert {one.sample_id for one in loader.quarantine} == {
        whole.sample_id(0, 1),
        whole.sample_id(2, 0),
    }


def test_a_damaged_clip_ends_one_of_several_pipelines(
    packed_synthetic: Path, tmp_path: Path, start: Callable[..., TrainLoader]
) -> None:
    """Sound by its checksum and refused by DALI: found, replaced, in the same order."""
    damages = {(0, 1): packed_as("flac", b"x"), (2, 3): packed_as("flac", b"y")}
    copy = damaged_copy(packed_synthetic / "video", tmp_path / "copy", damages)
    found = []
    for count in (1, 3):
        loader = start(copy, config={"video_pipelines": count})
        batches = take(loader, 8)
        names = {one.sample_id: one.reason for one in loader.quarantine}
        assert set(names.values()) == {"audio_undecodable"} and len(names) == 2
        found.append([(batch.sample_ids, batch.log_mel, batch.frames) for batch in batches])
    for (ids, log_mel, frames), (ids_3, log_mel_3, frames_3) in zip(*found, strict=True):
        assert ids == ids_3
        assert torch.equal(log_mel, log_mel_3) and torch.equal(frames, frames_3)


def test_what_is_under_way_when_a_clip_is_found_leaves_it_out_as_well(
    packed_synthetic: Path, tmp_path: Path, start: Callable[..., TrainLoader]
) -> None:
    """One picture of a clip is damaged. From there on the clip must not come, whole pictures of it
    included, however many batches were being decoded."""
    places = [(shard, sample) for shard in range(3) for sample in range(0, 8, 2)]
    damages = {place: packed_as("4.jpg", b"no picture") for place in places}
    copy = damaged_copy(packed_synthetic / "frames", tmp_path / "copy", damages)
    found = []
    for count in (1, 4):
        loader = start(copy, config={"video_pipelines": count, "max_bad_fraction": 1.0})
        batches = take(loader, 12)
        left_out = {one.sample_id: one.position for one in loader.quarantine}
        assert len(left_out) >= 2
        for batch in batches:
            for position, sample_id in zip(batch.positions.tolist(), batch.sample_ids, strict=True):
                assert position < left_out.get(sample_id, 10**9)
        found.append([batch.sample_ids for batch in batches])
    assert found[0] == found[1]


def test_a_quarantine_of_another_set_is_refused(
    packed_synthetic: Path, start: Callable[..., TrainLoader]
) -> None:
    with pytest.raises(ValueError, match="quarantine names 000009/000000001, which is not in"):
        start(packed_synthetic / "video", quarantine=["000009/000000001"])


def test_a_shard_that_cannot_be_read_stops_the_run_by_name(
    packed_synthetic: Path, tmp_path: Path, start: Callable[..., TrainLoader]
) -> None:
    """A failed read says nothing about the clips, so none is put in quarantine."""
    copy = damaged_copy(packed_synthetic / "video", tmp_path / "copy", {})
    (Path(copy) / "000001.tar").unlink()
    loader = start(copy)
    with pytest.raises(OSError, match=r"000001\.tar could not be read in 3 tries"):
        take(loader, 6)
    assert loader.quarantine == []


ABORTED_RUN = """
import itertools, os, sys
from pathlib import Path
import torch
from cavmae.dataloaders.loading import reader
from cavmae.dataloaders.config import ClipShape, DataConfig
from cavmae.dataloaders.media.encode_video import describe_fragments
from cavmae.dataloaders.loading.loader import TrainLoader
from cavmae.dataloaders.loading.quarantine import Journal
from cavmae.dataloaders.sampling.step_shares import StepShares
config = DataConfig(train=sys.argv[1], reader_workers=1, decode_threads=1, shuffle_window=4)
loader = TrainLoader(
    config, ClipShape(64, 32, 32), seed=5, rank=0,
    shares=StepShares(4, 2, world_size=1, micro_batch=4),
    device=torch.device("cpu"), journal=Journal(Path(sys.argv[2])),
)
for batch in itertools.islice(loader, 3):
    pass
os.abort()
"""


def test_a_crash_leaves_the_names_of_what_was_being_decoded(
    packed_synthetic: Path, tmp_path: Path
) -> None:
    whole = ShardSet(packed_synthetic / "video")
    plan = plan_of(whole)
    folder = tmp_path / "journal"
    command = [sys.executable, "-c", ABORTED_RUN, str(packed_synthetic / "video"), str(folder)]
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGABRT
    (journal,) = folder.iterdir()
    lines = [line.split() for line in journal.read_text().splitlines()]
    assert len(lines) == BATCH
    for position, epoch, shard, sample, sample_id in lines:
        planned = plan.samples(int(position), 1)[0]
        assert (int(epoch), int(shard), int(sample)) == (
            planned.epoch,
            planned.shard,
            planned.sample,
        )
        assert sample_id == whole.sample_id(int(shard), int(sample))


def test_torn_lines_of_a_journal_are_left_out(
    packed_synthetic: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shards = ShardSet([str(packed_synthetic / "video")])
    whole = f"8 0 1 2 {shards.sample_id(1, 2)}\n".encode()
    (tmp_path / "torn.txt").write_bytes(b"\0\0\0\0\n" + whole + b"12 0 1\n\xff\xfe 0 0 0 x\n16 0 0")
    (tmp_path / "folder.txt").mkdir()
    (task,) = Journal(tmp_path).unfinished(shards, 0, 1)
    assert (task.shard, task.sample) == (1, 2)
    assert caplog.text.count("has a torn line") == 4
    assert "the journal of a crashed rank could not be read" in caplog.text


def test_a_journal_that_cannot_be_written_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "taken").touch()
    journal = Journal(tmp_path / "taken")
    for _ in range(2):
        journal.write([])
    assert caplog.text.count("the journal could not be written") == 1


def test_a_proper_end_leaves_no_journal(
    packed_synthetic: Path, tmp_path: Path, start: Callable[..., TrainLoader]
) -> None:
    folder = tmp_path / "journal"
    loaders = [start(packed_synthetic / "video", journal=Journal(folder)) for _ in range(2)]
    for loader in loaders:
        take(loader, 1)
    assert len(list(folder.glob("*.txt"))) == 2, "each rank has a file of its own"
    loaders[0].close()
    assert len(list(folder.glob("*.txt"))) == 1
    loaders[1].close()
    assert not folder.exists()


def test_the_ranks_of_a_node_share_out_what_crashed_ones_left(
    packed_synthetic: Path, tmp_path: Path
) -> None:
    """Each file is read once, and removed once its clips were tried; not what the others write."""
    shards = ShardSet(packed_synthetic / "video")
    tasks = [ReadTask(position, 0, 1, 2) for position in range(5)]
    for task in tasks:
        Journal(tmp_path).keep(bad_sample(shards, task))
    ranks = [Journal(tmp_path) for _ in range(3)]
    shares = [rank.unfinished(shards, number, 3) for number, rank in enumerate(ranks)]
    assert sorted(map(len, shares)) == [1, 2, 2]
    assert sorted(task.position for share in shares for task in share) == [0, 1, 2, 3, 4]
    ranks[0].keep(bad_sample(shards, tasks[0]))
    for rank in ranks:
        rank.remove_left()
    assert len(list(tmp_path.iterdir())) == 1
    assert Journal(tmp_path).unfinished(shards, 0, 1) == tasks[:1]


def test_runs_share_no_journals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a run has the same folder by any path, and another one for each user."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "of-the-node"))
    (tmp_path / "link").symlink_to(tmp_path / "one")
    one, link, two = (journal_folder(tmp_path / name) for name in ("one", "link", "two"))
    assert one == link != two and one.parent == tmp_path / "of-the-node"
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert journal_folder(tmp_path / "one") != one


def bad_sample(shards: ShardSet, task: ReadTask, reason: str = "") -> reader.BadSample:
    return reader.BadSample(task, shards.sample_id(task.shard, task.sample), reason, "")


def test_clips_of_crashed_ranks_are_tried_out_before_the_start(
    packed_synthetic: Path, tmp_path: Path, start: Callable[..., TrainLoader]
) -> None:
    """Only positions still to come, and only those of the rank's own lanes. What is found stays in
    the rank's journal: if it crashes before it has saved, no clip crashes it again."""
    tier = packed_synthetic / "video"
    whole = ShardSet(tier)
    plan = plan_of(whole)
    planned = {position: plan.samples(position, 1)[0] for position in (2, 5, 7, 8, 9)}
    damages = {
        (one.shard, one.sample): packed_as("flac", b"x")
        for position, one in planned.items()
        if position != 7
    }
    suspects = [
        ReadTask(position, one.epoch, one.shard, one.sample) for position, one in planned.items()
    ]
    copy = damaged_copy(tier, tmp_path / "copy", damages)
    journal = Journal(tmp_path / "journal")
    loader = start(
        copy,
        start_position=4,
        rank=1,
        world_size=2,
        micro_batch=2,
        journal=journal,
        suspects=suspects * 2,  # of two nodes that share a temporary folder
    )
    tried = {one.position for one in loader._quarantine.samples}
    assert tried == {5, 9}  # 2 is past, 7 is intact, 8 is of the other rank's lane
    assert loader.quarantine == []
    ids = [sample_id for batch in take(loader, 3) for sample_id in batch.sample_ids]
    assert not {whole.sample_id(*place) for place in damages} & set(ids)
    left = Journal(tmp_path / "journal").unfinished(whole, 0, 1)
    assert {5, 9} < {task.position for task in left}


# ------------------------------------------------------------------------------- the culprits

TASKS = [ReadTask(sample, 0, 0, sample) for sample in range(11)]
REASONS = ("decoder_crash", "decoder_hang", "audio_undecodable")


class Decoder:
    """Says what is wrong with a batch: the reason of its first bad clip, or one of those that fail
    only together."""

    def __init__(self, bad: dict[int, str], together: tuple[int, int] = (-1, -1)) -> None:
        self.bad, self.together = bad, together
        self.batches: list[list[int]] = []

    def __call__(self, tasks: Sequence[ReadTask]) -> reader.BadSample | None:
        samples = [task.sample for task in tasks]
        self.batches.append(samples)
        reasons = [self.bad[sample] for sample in samples if sample in self.bad]
        if not reasons and set(self.together) <= set(samples):
            reasons = ["decoder_crash"]
        return reader.BadSample(tasks[0], "", reasons[0], "") if reasons else None


@pytest.mark.parametrize("count", [1, 2, 7, 8, 11])
def test_halving_finds_what_trying_one_by_one_does(count: int) -> None:
    rng = random.Random(count)
    sets = [set(), {0}, {count - 1}, set(range(count))]
    sets += [set(rng.sample(range(count), rng.randint(0, count))) for _ in range(50)]
    for chosen in sets:
        bad = {sample: rng.choice(REASONS) for sample in chosen}
        together = (rng.randrange(count), rng.randrange(count))
        decoder = Decoder(bad, together if together[0] != together[1] else (-1, -1))
        one_by_one = [found for task in TASKS[:count] if (found := decoder([task]))]
        assert list(quarantine._culprits(decoder, TASKS[:count])) == one_by_one


@pytest.mark.parametrize("sample", range(8))
def test_one_culprit_takes_as_many_batches_as_the_clips_can_be_halved(sample: int) -> None:
    for reason in REASONS:
        decoder = Decoder({sample: reason})
        assert len(list(quarantine._culprits(decoder, TASKS[:8]))) == 1
        limit = 9 if reason == "decoder_hang" else 7
        assert len(decoder.batches) <= limit, decoder.batches
        # Each batch with a clip that hangs takes the whole time limit.
        hung = [batch for batch in decoder.batches if sample in batch]
        assert reason != "decoder_hang" or len(hung) == 2
    decoder = Decoder({})
    assert list(quarantine._culprits(decoder, TASKS[:8])) == []
    assert len(decoder.batches) == 1


TRIALS = """
import os, time
from pathlib import Path
from cavmae.dataloaders.loading.quarantine import Trial
from cavmae.dataloaders.process_pool import time_limit
FAULTS = {1: lambda: os.abort(), 3: lambda: time.sleep(600)}
class WatchedTrial(Trial):
    def __call__(self, tasks):
        with open(os.environ["TRIALS"], "a") as file:
            file.write(" ".join(str(task.sample) for task in tasks) + "\\n")
        with time_limit(2.0):
            for task in tasks:
                FAULTS.get(task.sample, int)()
        return super().__call__(tasks)
"""


@pytest.fixture
def tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with the samples of each batch that is tried; an intact clip's line is empty. Sample 1
    crashes the decoder, and sample 3 hangs it."""
    (tmp_path / "watched_trial.py").write_text(TRIALS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("TRIALS", str(tmp_path / "trials"))
    trials = importlib.import_module("watched_trial")
    monkeypatch.setattr(quarantine, "Trial", trials.WatchedTrial)
    return tmp_path / "trials"


def settings_of(folder: Path | str) -> ReaderSettings:
    return ReaderSettings(ShardSet(folder), CONFIG, SHAPE, SEED, True, None)


def test_decoders_that_refuse_crash_or_hang_are_found_out_apart_from_the_rank(
    packed_synthetic: Path, tmp_path: Path, tried: Path
) -> None:
    damages = {(0, 6): packed_as("flac", b"x")}
    copy = damaged_copy(packed_synthetic / "video", tmp_path / "copy", damages)
    settings = settings_of(copy)
    culprits = find_culprits(settings, [ReadTask(10 + sample, 0, 0, sample) for sample in range(8)])
    assert [(one.task.sample, one.reason) for one in culprits] == [
        (1, "decoder_crash"),
        (3, "decoder_hang"),
        (6, "audio_undecodable"),
    ]
    assert [one.sample_id for one in culprits] == [
        settings.shards.sample_id(0, sample) for sample in (1, 3, 6)
    ]


def test_batches_are_decoded_whole_and_then_in_halves(
    packed_synthetic: Path, tmp_path: Path, tried: Path
) -> None:
    damages = {(2, 6): packed_as("flac", b"x")}
    copy = damaged_copy(packed_synthetic / "video", tmp_path / "copy", damages)
    tasks = [ReadTask(position, 0, 2, sample) for position, sample in enumerate((0, 2, 4, 5, 6, 7))]
    assert len(find_culprits(settings_of(copy), tasks)) == 1
    assert tried.read_text().splitlines() == [
        "0 2 4 5 6 7",
        "",
        "0 2 4",
        "5 6",
        "",
        "5",
        "6",
        "",
        "7",
    ]
    tried.unlink()
    assert find_culprits(settings_of(packed_synthetic / "video"), tasks) == []
    assert tried.read_text().splitlines() == ["0 2 4 5 6 7"]


FAULTY_DECODER = """
import os
from cavmae.dataloaders.loading.dali import ClipDecoder, DecodeError
from cavmae.dataloaders.loading.quarantine import Trial
class FaultyTrial(Trial):
    pass
def refuse(decoder):
    if os.environ["DECODER"] == "crashes" and os.environ["RANK_PROCESS"] != str(os.getpid()):
        os.abort()
    raise DecodeError("Error in decoders.video: CUDA_ERROR_ILLEGAL_ADDRESS")
ClipDecoder.collect = refuse
"""


@pytest.mark.parametrize(("tier", "decoder"), [("video", "refuses"), ("frames", "crashes")])
def test_a_decoder_that_refuses_everything_blames_no_clip(
    packed_synthetic: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    start: Callable[..., TrainLoader],
    tier: str,
    decoder: str,
) -> None:
    (tmp_path / "faulty_decoder.py").write_text(FAULTY_DECODER)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("DECODER", decoder)
    monkeypatch.setenv("RANK_PROCESS", str(os.getpid()))
    monkeypatch.setattr(ClipDecoder, "collect", ClipDecoder.collect)  # so that it is undone
    faulty_decoder = importlib.import_module("faulty_decoder")
    monkeypatch.setattr(ClipDecoder, "collect", faulty_decoder.refuse)
    monkeypatch.setattr(quarantine, "Trial", faulty_decoder.FaultyTrial)
    loader = start(packed_synthetic / tier)
    with pytest.raises(DecoderFaultError, match=r"fails on the CPU with a clip that is intact: .*"):
        take(loader, 1)
    assert loader._quarantine.samples == []


@pytest.mark.parametrize("audio_codec", ["flac", "wav"])
@pytest.mark.parametrize(
    ("tier", "codec"),
    [("frames", None), ("video", "vp9"), ("video", "h264"), ("video", "mjpeg"), ("original", None)],
)
def test_the_clip_that_tries_a_decoder_is_intact(
    packed_synthetic: Path, tier: str, codec: str | None, audio_codec: str
) -> None:
    shards = ShardSet(packed_synthetic / "frames")
    shards.tier, shards.video_codec, shards.audio_codec = tier, codec, audio_codec
    config = DataConfig(frames_per_clip=2)
    settings = ReaderSettings(shards, config, ClipShape(64, 32, 32), 0, True, None)
    assert quarantine.Trial(settings, 1, 60.0, 60.0)(()) is None


SLOW_READER = """
import os, time
from pathlib import Path
import numpy as np
from cavmae.dataloaders.loading import reader
from cavmae.dataloaders.shards.shard_set import ShardSet
class SlowReader(reader.ClipReader):
    def _read_frames(self, task, *rest):
        hangs = task.sample == 1
        if task.sample == 3 and not MET.exists():
            MET.touch()
            hangs = True
        reader.decode_original = lambda *_: time.sleep(600) if hangs else PICTURE
        return super()._read_frames(task, *rest)
MET = Path(os.environ["MET"])
PICTURE = np.zeros((64, 64, 3), np.uint8)
member = ShardSet.member
def slow_member(shards, shard, sample, name):
    time.sleep(3.5 if (sample, name) == (2, "source") else 0)
    return member(shards, shard, sample, name)
ShardSet.member = slow_member
"""


def test_a_clip_that_hangs_a_reader_is_found_and_slow_storage_is_not_blamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: Callable[..., TrainLoader]
) -> None:
    """Sample 1 never ends in PyAV; the bytes of sample 2 take longer than decoding may; sample 3
    meets a deadlock once, as of FFmpeg's threads under load. What hung stays in the journal, so
    that a rank that is ended meanwhile does not meet it again."""
    listing = generate(tmp_path / "videos", 8, seed=2, workers=1)
    pack(PackConfig(str(listing), str(tmp_path / "shards"), tiers="original", workers=1))
    (tmp_path / "slow_reader.py").write_text(SLOW_READER)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("MET", str(tmp_path / "met"))
    monkeypatch.setattr(ShardSet, "member", ShardSet.member)  # so that it is undone
    slow_reader = importlib.import_module("slow_reader").SlowReader
    for module in (quarantine, pipeline):
        monkeypatch.setattr(module, "ClipReader", slow_reader)
        monkeypatch.setattr(module, "DECODE_SECONDS", 1.5)
    shards = ShardSet(tmp_path / "shards/original")
    position = next(n for n in range(8) if plan_of(shards).samples(n, 1)[0].sample == 1)

    loader = start(shards.folder, journal=Journal(tmp_path / "journal"))
    ids = [sample_id for batch in take(loader, 2) for sample_id in batch.sample_ids]
    (found,) = loader.quarantine
    assert (found.sample_id, found.reason) == (shards.sample_id(0, 1), "decoder_hang")
    assert found.position == position
    assert {shards.sample_id(0, 2), shards.sample_id(0, 3)} <= set(ids) and len(ids) == 8
    left = Journal(tmp_path / "journal").unfinished(shards, 0, 1)
    assert left[0].sample == 1 and left[0].position == position


def reader_processes() -> list[int]:
    """Process ids of this process's readers."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        if parent == os.getpid() and b"process_pool" in command:
            found.append(int(folder.name))
    return found


@pytest.mark.usefixtures("started_pools")
def test_a_reader_that_is_killed_costs_no_clip(
    packed_synthetic: Path, start: Callable[..., TrainLoader]
) -> None:
    """As by the kernel when memory is short: the clip at hand is tried out and found sound."""
    undisturbed = by_position(take(start(packed_synthetic / "video"), 12))
    loader = start(packed_synthetic / "video", config={"prefetch_batches": 1})
    batches = take(loader, 2)
    before = set(reader_processes())
    for process in before:
        os.kill(process, signal.SIGKILL)
    batches += take(loader, 10)
    assert before
    assert loader.quarantine == []
    assert {position: one[0] for position, one in by_position(batches).items()} == {
        position: one[0] for position, one in undisturbed.items()
    }
