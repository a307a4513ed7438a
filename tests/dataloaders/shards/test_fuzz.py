"""Whatever bytes a set holds, reading it gives a value or an error that is documented.

Each loop mutates sound files with a fixed seed and reports how many inputs it has tried;
`CAVMAE_FUZZ_INPUTS` asks for more of them.
"""

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from copy import deepcopy
from itertools import chain
from pathlib import Path

import pytest

from cavmae.dataloaders.config import ClipShape, DataConfig
from cavmae.dataloaders.loading.reader import (
    BadSample,
    ClipReader,
    EncodedClip,
    ReaderSettings,
    ReadTask,
    StorageError,
)
from cavmae.dataloaders.packing.clip_list import list_clips
from cavmae.dataloaders.shards.format import ShardError, parse_member_index
from cavmae.dataloaders.shards.shard_set import ShardSet
from cavmae.dataloaders.shards.writer import ShardWriter

INPUTS = int(os.environ.get("CAVMAE_FUZZ_INPUTS", "400"))
"""Of each kind."""
SNIPPETS = [
    b"\0", b"\xff", b"\n", b" ", b"-1", b"99999999999999999999999", b"NaN", b"1e999", b"{",
    b"[" * 2000,
    b"null", b'""', b"../../etc/passwd", b"/etc/passwd", b"pipe:cat", b"v1.2 0", b'"schema":3',
    "\u2028\ud7ff".encode(),
]  # fmt: skip


def mutations(data: bytes, seed: int, count: int = INPUTS) -> Iterator[bytes]:
    """Damaged versions of some bytes: bits flipped, parts cut, doubled, replaced."""
    chance = random.Random(seed)
    for _ in range(count):
        damaged = bytearray(data)
        for _ in range(chance.choice([1, 1, 2, 8])):
            place = chance.randrange(len(damaged) + 1)
            end = min(len(damaged), place + chance.choice([1, 2, 20, 500]))
            kind = chance.randrange(5)
            if kind == 0 and place < len(damaged):
                damaged[place] ^= 1 << chance.randrange(8)
            elif kind == 1:
                del damaged[place:end]
            elif kind == 2:
                damaged[place:place] = damaged[place:end]
            elif kind == 3:
                damaged[place:end] = chance.choice(SNIPPETS)
            else:
                del damaged[place:]
        yield bytes(damaged)


ODD = [None, True, -1, 0, 1, 2**40, 2**70, 1e999, float("nan"), 0.5, "", "x", [], {}, [None] * 10]


def changed_values(data: bytes, seed: int, count: int = INPUTS) -> Iterator[bytes]:
    """JSON in which some values are of another kind or out of range."""
    chance = random.Random(seed)
    for _ in range(count):
        value = json.loads(data)
        for _ in range(chance.choice([1, 1, 2])):
            inner = value
            while True:
                key = chance.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
                if not (
                    inner[key] and isinstance(inner[key], dict | list) and chance.random() < 0.9
                ):
                    break
                inner = inner[key]
            inner[key] = deepcopy(chance.choice(ODD))
        yield json.dumps(value).encode()


@pytest.fixture
def copy(packed_synthetic: Path, tmp_path: Path) -> Path:
    """A set of one shard that may be damaged."""
    folder = tmp_path / "frames"
    folder.mkdir()
    for name in ("000000.tar", "000000.idx"):
        shutil.copy(packed_synthetic / "frames" / name, folder)
    index = json.loads((packed_synthetic / "frames" / "index.json").read_bytes())
    index["shards"], index["samples"] = index["shards"][:1], index["shards"][0]["samples"]
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def try_all(
    path: Path,
    seed: int,
    use: Callable[[], object],
    record: Callable[[str, object], None],
    allowed: tuple[type[Exception], ...],
) -> None:
    """Use each damaged version of a file; only `allowed` errors may come, with a message."""
    sound = path.read_bytes()
    outcomes = {"used": 0, "refused": 0}
    versions = mutations(sound, seed)
    if path.suffix == ".json":
        versions = chain(versions, changed_values(sound, seed + 100))
    for data in versions:
        path.write_bytes(data)
        try:
            use()
            outcomes["used"] += 1
        except allowed as error:
            assert str(error).strip()
            outcomes["refused"] += 1
    path.write_bytes(sound)
    assert use() is not None and outcomes["refused"] > INPUTS // 10
    record(path.name, outcomes)
    print(f"{sum(outcomes.values())} versions of {path.name}: {outcomes}")


def read_everything(folder: Path) -> list[bytes]:
    shards = ShardSet(folder)
    found = []
    for sample in range(shards.sizes[0]):
        for extension in shards.members:
            try:
                found.append(shards.member(0, sample, extension))
            except ShardError:
                continue
    return found


def test_index_json(copy: Path, record_property: Callable[[str, object], None]) -> None:
    def use() -> object:
        shards = ShardSet(copy)
        assert isinstance(shards.samples, int) and all(size >= 0 for size in shards.sizes)
        return shards

    try_all(copy / "index.json", 1, use, record_property, (ValueError, OSError))


def test_member_index(copy: Path, record_property: Callable[[str, object], None]) -> None:
    path = copy / "000000.idx"
    try_all(
        path,
        2,
        lambda: parse_member_index(path.read_bytes(), ""),
        record_property,
        (ValueError, OSError),
    )


def test_reading_through_a_damaged_member_index(
    copy: Path, record_property: Callable[[str, object], None]
) -> None:
    """It must not read outside the tar, nor for ever."""
    size = (copy / "000000.tar").stat().st_size

    def use() -> object:
        found = read_everything(copy)
        assert all(len(data) <= size for data in found)
        return found

    try_all(copy / "000000.idx", 3, use, record_property, (ValueError, OSError))


def reader_of(folder: Path) -> ClipReader:
    return ClipReader(
        ReaderSettings(
            shards=ShardSet(folder),
            config=DataConfig(),
            shape=ClipShape(audio_frames=198, mel_bins=32, image_size=48),
            seed=0,
            training=True,
            gpu=None,
        )
    )


def test_a_reader_of_a_damaged_tar_answers(
    copy: Path, record_property: Callable[[str, object], None]
) -> None:
    """A clip, or what is wrong with it; never an exception, and never damaged bytes as a clip."""
    path = copy / "000000.tar"
    sound = path.read_bytes()
    truth = {sample: reader_of(copy)(ReadTask(sample, 0, 0, sample)) for sample in range(8)}
    outcomes = {"clip": 0, "damage": 0}
    for number, data in enumerate(mutations(sound, 4)):
        path.write_bytes(data)
        sample = number % 8
        answer = reader_of(copy)(ReadTask(sample, 0, 0, sample))
        assert isinstance(answer, EncodedClip | BadSample) and not isinstance(answer, StorageError)
        if isinstance(answer, EncodedClip):
            whole = truth[sample]
            assert isinstance(whole, EncodedClip)
            assert (answer.audio, answer.frames) == (whole.audio, whole.frames)
        outcomes["clip" if isinstance(answer, EncodedClip) else "damage"] += 1
    assert min(outcomes.values()) > 0
    record_property("000000.tar", outcomes)
    print(f"{INPUTS} versions of 000000.tar: {outcomes}")


def test_a_sample_s_json(copy: Path, record_property: Callable[[str, object], None]) -> None:
    """Of any length: a set is written in which it stands."""
    shards = ShardSet(copy)
    members = {name: shards.member(0, 0, name) for name in shards.members}
    index = json.loads((copy / "index.json").read_bytes())
    outcomes = {"clip": 0, "damage": 0}
    sound = members["json"]
    for data in chain(mutations(sound, 5), changed_values(sound, 7)):
        # Without the checksum, so that what is behind it is tried too.
        data = data.replace(b'"json":', b'"JSON":')
        writer = ShardWriter(copy, "000000")
        writer.add("000000000", {**members, "json": data})
        entry = writer.finish()
        assert entry is not None
        (copy / "index.json").write_text(
            json.dumps({**index, "samples": 1, "shards": [vars(entry)]})
        )
        answer = reader_of(copy)(ReadTask(0, 0, 0, 0))
        assert isinstance(answer, EncodedClip | BadSample)
        outcomes["clip" if isinstance(answer, EncodedClip) else "damage"] += 1
    assert min(outcomes.values()) > 0
    record_property("json", outcomes)
    print(f"{2 * INPUTS} versions of a sample's JSON: {outcomes}")


def test_a_csv_list(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    path = tmp_path / "clips.csv"
    path.write_text('path,start,end,labels\na.mp4,0,10,"dog;cat"\nb.mp4,1.5,3,\n"c d.mp4",,,bird\n')
    try_all(
        path, 6, lambda: list_clips(path, tmp_path / "out"), record_property, (ValueError, OSError)
    )
