"""Shards at a URL: the same bytes whatever the store does, fetched once, kept within a limit."""

import hashlib
import itertools
import logging
import os
import random
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from cavmae.benchmarks.harness.object_store import FAULTS, ObjectStore, object_store
from cavmae.dataloaders.config import Augmentation, CacheSettings, ClipShape, DataConfig
from cavmae.dataloaders.loading.loader import TrainLoader
from cavmae.dataloaders.sampling.sample_plan import SamplePlan
from cavmae.dataloaders.sampling.step_shares import StepShares
from cavmae.dataloaders.shards.cache import ChunkCache
from cavmae.dataloaders.shards.format import ShardError, description_bytes, member_names
from cavmae.dataloaders.shards.shard_set import ShardSet
from cavmae.dataloaders.shards.storage import open_storage
from cavmae.dataloaders.shards.writer import ShardWriter, write_index
from cavmae.dataloaders.tools import verify

SHARDS, SAMPLES = 12, 40
MEMBERS = member_names("video", "flac")


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of 12 shards with 40 samples of 1 to 6 kB."""
    return make_set(tmp_path_factory.mktemp("set"), seed=0)


def make_set(folder: Path, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    entries = []
    for shard in range(SHARDS):
        writer = ShardWriter(folder, f"{shard:06d}")
        for number in range(SAMPLES):
            key = f"{shard * SAMPLES + number:09d}"
            flac, mp4 = rng.bytes(int(rng.integers(500, 3000))), rng.bytes(3000)
            crc32 = {"flac": zlib.crc32(flac), "mp4": zlib.crc32(mp4)}
            description = description_bytes({"schema": 5, "key": key}, crc32)
            writer.add(key, {"json": description, "flac": flac, "mp4": mp4})
        entries.append(writer.finish())
    write_index(
        folder,
        tier="video",
        audio_codec="flac",
        video_codec="vp9",
        short_side=256,
        frame_choice="by_time",
        skipped=0,
        content=[hashlib.sha256(b"%d" % number).hexdigest() for number in range(SHARDS * SAMPLES)],
        shards=[entry for entry in entries if entry],
    )
    return folder


@pytest.fixture(scope="module")
def running(local: Path) -> Iterator[tuple[ObjectStore, str]]:
    with object_store() as store, pytest.MonkeyPatch.context() as patch:
        for name, value in store.environment.items():
            patch.setenv(name, value)
        yield store, store.upload(local, "clips")


@pytest.fixture
def store(running: tuple[ObjectStore, str]) -> Iterator[ObjectStore]:
    yield running[0]
    running[0].fail(0)


@pytest.fixture
def url(running: tuple[ObjectStore, str]) -> str:
    return running[1]


def cache(folder: Path, limit_bytes: int = 10**9, chunk_bytes: int = 8192) -> CacheSettings:
    return CacheSettings(str(folder), limit_bytes, chunk_bytes)


def sent(store: ObjectStore) -> int:
    return store.counts().get("bytes", 0)


def assert_same(remote: ShardSet, local: Path, places: list[tuple[int, int]]) -> None:
    truth = ShardSet(local)
    for shard, sample in places:
        for extension in MEMBERS:
            expected = truth.member(shard, sample, extension)
            assert remote.member(shard, sample, extension) == expected
        assert remote.sample_id(shard, sample) == truth.sample_id(shard, sample)


EVERYTHING = [(shard, sample) for shard in range(SHARDS) for sample in range(SAMPLES)]
SOME = [(shard, sample) for shard in range(3) for sample in range(0, SAMPLES, 7)]


@pytest.mark.parametrize("kind", FAULTS)
def test_each_fault_of_the_store_is_got_over(
    kind: str, store: ObjectStore, url: str, local: Path, tmp_path: Path
) -> None:
    store.fail(3, [kind])
    before = store.counts().get(kind, 0)
    remote = ShardSet(url, cache(tmp_path, chunk_bytes=65536))
    assert_same(remote, local, SOME)
    assert store.counts()[kind] > before


def test_what_our_own_tries_get_over_is_said(
    store: ObjectStore, url: str, local: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Over plain HTTP no library tries again for us."""
    store.fail(4, ["truncated", "reset"])
    remote = ShardSet(url.replace("s3:/", store.url), cache(tmp_path, chunk_bytes=65536))
    with caplog.at_level(logging.WARNING):
        assert_same(remote, local, SOME)
    assert "try 1 of 6 failed" in caplog.text and "/clips/00000" in caplog.text


def test_without_a_cache_only_the_members_are_fetched(
    store: ObjectStore, url: str, local: Path
) -> None:
    remote = ShardSet(url)
    remote.sample_id(0, 0)
    before = sent(store)
    data = [remote.member(0, 3, extension) for extension in MEMBERS]
    assert sent(store) - before == sum(map(len, data))


def test_verify_reads_a_url_once(
    packed_synthetic: Path, store: ObjectStore, capsys: pytest.CaptureFixture[str]
) -> None:
    url = store.upload(packed_synthetic, "whole")
    before = sent(store)
    assert verify.main([url, "--decode"]) == 0
    size = sum(path.stat().st_size for path in packed_synthetic.rglob("*.tar"))
    assert size <= sent(store) - before < 1.05 * size
    assert capsys.readouterr().out.count("none") == 6


def test_verify_names_what_is_damaged_at_a_url(
    packed_synthetic: Path,
    store: ObjectStore,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "video"
    shutil.copytree(packed_synthetic / "video", folder)
    data = bytearray((folder / "000001.tar").read_bytes())
    offset, _ = ShardSet(folder)._range(1, 5, "flac")
    data[offset + 50] ^= 1
    (folder / "000001.tar").write_bytes(data)
    assert verify.main([store.upload(folder, "unsound")]) == 1
    errors = capsys.readouterr().err
    assert "000001.tar: its SHA-256 is not that of index.json" in errors
    assert "000001.tar: 000000013: flac is damaged (CRC-32)" in errors


def test_once_cached_the_store_is_not_needed(local: Path, tmp_path: Path) -> None:
    with object_store() as store, pytest.MonkeyPatch.context() as patch:
        for name, value in store.environment.items():
            patch.setenv(name, value)
        url = store.upload(local, "leaving").replace("s3:/", store.url)
        assert_same(ShardSet(url, cache(tmp_path)), local, EVERYTHING)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "sleep", lambda _: None)  # the tries for index.json
        assert_same(ShardSet(url, cache(tmp_path)), local, EVERYTHING)


READER = """
import random, sys
from cavmae.dataloaders.shards.shard_set import ShardSet
from cavmae.dataloaders.config import CacheSettings
url, folder, limit, seed, local, count = sys.argv[1:]
remote = ShardSet(url, CacheSettings(folder, int(limit), 8192))
truth = ShardSet(local)
places = [(shard, sample) for shard in range(len(truth.sizes)) for sample in range(truth.sizes[0])]
random.Random(int(seed)).shuffle(places)
for shard, sample in places[: int(count)]:
    assert remote.member(shard, sample, "flac") == truth.member(shard, sample, "flac")
"""


def read_in_processes(url: str, folder: Path, limit: int, local: Path, samples: int) -> None:
    """Read so many samples in each of three processes, in an order of its own."""
    words = [[url, folder, limit, seed, local, samples] for seed in range(3)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", READER, *map(str, some)],
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
        )
        for some in words
    ]
    assert [process.wait(120) for process in processes] == [0] * 3


def test_processes_of_a_node_fetch_each_piece_once(
    store: ObjectStore, url: str, local: Path, tmp_path: Path
) -> None:
    size = sum(path.stat().st_size for path in local.iterdir())
    before = sent(store)
    read_in_processes(url, tmp_path, 10**9, local, samples=SHARDS * SAMPLES)
    index = (local / "index.json").stat().st_size
    assert sent(store) - before <= size + 3 * index


def test_a_cache_that_is_too_small_stays_small_and_right(
    store: ObjectStore, url: str, local: Path, tmp_path: Path
) -> None:
    limit = sum(path.stat().st_size for path in local.iterdir()) // 4
    read_in_processes(url, tmp_path, limit, local, samples=160)
    kept = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert kept <= limit + 3 * 8192, "more than the limit and a piece for each process"
    assert not list(tmp_path.rglob("*.partial"))


def test_the_pieces_used_longest_ago_go_first(tmp_path: Path) -> None:
    chunks = ChunkCache(tmp_path, limit_bytes=10_000)
    for number in range(8):
        chunks.get_or_fetch(f"old {number}", lambda: bytes(1000))
        os.utime(chunks._path(f"old {number}"), (number, number))
    chunks.get("old 0")  # now the newest
    for number in range(4):
        chunks.get_or_fetch(f"new {number}", lambda: bytes(1000))
    assert chunks.get("old 0") and chunks.get("new 3")
    assert chunks.get("old 1") is None and chunks.get("old 2") is None


@pytest.mark.parametrize("damage", ["flipped", "cut", "emptied"])
def test_a_damaged_piece_is_fetched_again(
    damage: str, store: ObjectStore, url: str, local: Path, tmp_path: Path
) -> None:
    assert_same(ShardSet(url, cache(tmp_path)), local, EVERYTHING[:40])
    for path in tmp_path.glob("??/*"):
        data = bytearray(path.read_bytes())
        if damage == "flipped":
            data[::50] = bytes(255 - value for value in data[::50])
        path.write_bytes({"cut": data[:-9], "emptied": b""}.get(damage, data))
    assert_same(ShardSet(url, cache(tmp_path)), local, EVERYTHING[:40])


def test_damage_in_the_store_is_the_sample_s(
    store: ObjectStore, url: str, local: Path, tmp_path: Path
) -> None:
    damaged = bytearray((local / "000001.tar").read_bytes())
    offset, _ = ShardSet(local)._range(1, 5, "flac")
    damaged[offset + 10] ^= 1
    damaged_url = store.upload(local, "damaged")
    store.replace("damaged", "000001.tar", bytes(damaged))
    remote = ShardSet(damaged_url, cache(tmp_path))
    with pytest.raises(ShardError, match="crc_mismatch: flac of sample 5 of s3://damaged/000001"):
        remote.member(1, 5, "flac")
    assert_same(remote, local, [(1, 4), (1, 6)])


def test_a_set_that_is_packed_anew_is_not_mixed_with_what_was_kept(
    store: ObjectStore, tmp_path: Path
) -> None:
    for seed in (1, 2):
        folder = tmp_path / str(seed)
        folder.mkdir()
        make_set(folder, seed)
        url = store.upload(folder, "again")
        assert_same(ShardSet(url, cache(tmp_path / "cache")), folder, SOME)


def test_four_nodes_fetch_hardly_more_than_the_set(
    store: ObjectStore, url: str, local: Path, tmp_path: Path
) -> None:
    """Each node reads its part of the permuted shards, and of a shard at a cut only its part."""
    size = sum(path.stat().st_size for path in local.glob("*.tar"))
    before = sent(store)
    for node in range(4):
        remote = ShardSet(url, cache(tmp_path / str(node)))
        plan = SamplePlan(remote.sizes, seed=5, lanes=4, window=60)
        for planned in plan.at(np.arange(node, plan.count, 4)):
            for extension in MEMBERS:
                remote.member(planned.shard, planned.sample, extension)
    indexes = sum(path.stat().st_size for path in local.iterdir() if path.suffix != ".tar")
    assert sent(store) - before - 4 * indexes <= 1.05 * size


def test_a_full_disk_under_the_cache_stops_nothing(
    store: ObjectStore, url: str, local: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(small)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("a file system of 128 kB cannot be mounted here")
    try:
        assert_same(ShardSet(url, cache(small)), local, EVERYTHING[:80])
    finally:
        subprocess.run(["umount", str(small)], check=True)
    assert "the disk is full; nothing more is cached" in caplog.text


def test_a_loader_gives_the_same_batches_from_a_url(
    store: ObjectStore, packed_synthetic: Path, tmp_path: Path
) -> None:
    folder = packed_synthetic / "frames"
    store.fail(5)
    places = {"local": str(folder), "remote": store.upload(folder, "loader")}
    found = {}
    for name, train in places.items():
        loader = TrainLoader(
            DataConfig(train=train, reader_workers=2, cache_folder=str(tmp_path)),
            ClipShape(audio_frames=208, mel_bins=32, image_size=48),
            seed=1,
            shares=StepShares(global_batch=8, lanes=4, world_size=1, micro_batch=8),
            rank=0,
            device=torch.device("cpu"),
        )
        found[name] = list(itertools.islice(loader, 3))
        loader.close()
    for ours, theirs in zip(found["remote"], found["local"], strict=True):
        assert ours.sample_ids == theirs.sample_ids
        assert torch.equal(ours.log_mel, theirs.log_mel) and torch.equal(ours.frames, theirs.frames)


def test_a_cache_smaller_than_what_is_drawn_from_is_said(
    store: ObjectStore, packed_synthetic: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url = store.upload(packed_synthetic / "frames", "warned")
    half = sum(file.bytes for file in ShardSet(packed_synthetic / "frames").files) / 2e9
    for gigabytes, window, mixup_prob, told in (
        (1.0, 4096, 0.5, None),
        (half, 4096, 0.0, "data.shuffle_window"),
        (half, 1, 0.0, None),
        (half, 1, 0.5, "data.augmentation.mixup_prob"),
    ):
        config = DataConfig(
            train=url,
            cache_folder=str(tmp_path),
            cache_gigabytes=gigabytes,
            shuffle_window=window,
            augmentation=Augmentation(mixup_prob=mixup_prob),
            reader_workers=1,
        )
        caplog.clear()
        TrainLoader(
            config,
            ClipShape(audio_frames=208, mel_bins=32, image_size=48),
            seed=1,
            shares=StepShares(global_batch=8, lanes=4, world_size=1, micro_batch=8),
            rank=0,
            device=torch.device("cpu"),
        ).close()
        assert ("data.cache_gigabytes is" in caplog.text) == (told is not None)
        assert told is None or f"raise it, or lower {told}" in caplog.text


@pytest.mark.parametrize("folder", ["pipe:cat /etc/passwd", "PIPE:cat x", "pipe://cat"])
def test_commands_are_refused(folder: str) -> None:
    with pytest.raises(ValueError, match="would run a command"):
        open_storage(folder, None)


def test_an_unknown_kind_of_url_is_named() -> None:
    with pytest.raises(ValueError, match=r"gopher://host/set cannot be opened"):
        ShardSet("gopher://host/set")


def test_a_url_without_a_set_is_named_at_once(store: ObjectStore, tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(FileNotFoundError, match=r"s3://clips/nowhere/index.json does not exist"):
        ShardSet("s3://clips/nowhere", cache(tmp_path))
    assert time.monotonic() - began < 10, "it was tried again and again"


def test_several_sets_are_numbered_through(local: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    make_set(other, seed=3)
    both = ShardSet([local, other])
    assert both.samples == 2 * SHARDS * SAMPLES and both.set_shards == (SHARDS, SHARDS)
    assert both.sample_id(SHARDS + 2, 1) == "1/000002/000000081"
    assert both.member(2, 1, "mp4") == ShardSet(local).member(2, 1, "mp4")
    assert both.member(SHARDS + 2, 1, "mp4") == ShardSet(other).member(2, 1, "mp4")
    assert both.fingerprint != ShardSet(local).fingerprint
    places = random.Random(0).sample(EVERYTHING, 20)
    assert all(
        both.sample_id(*place) == f"0/{ShardSet(local).sample_id(*place)}" for place in places
    )
