"""The loaders: the planned samples, bit for bit, from any start, with any readers and ranks."""

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import assert_equal, given, take

from cavmae.dataloaders.batch import AudioVideoBatch
from cavmae.dataloaders.config import ClipShape, DataConfig
from cavmae.dataloaders.loading.loader import TrainLoader, ValidationLoader
from cavmae.dataloaders.sampling.sample_plan import SamplePlan
from cavmae.dataloaders.sampling.step_shares import StepShares
from cavmae.dataloaders.shards.shard_set import ShardSet

SHAPE = ClipShape(audio_frames=208, mel_bins=32, image_size=48)
CONFIG = DataConfig(reader_workers=1, decode_threads=1, shuffle_window=4)
SEED, BATCH, LANES = 11, 8, 4


@pytest.fixture
def start(train_loader: Callable[..., TrainLoader], packed_synthetic: Path) -> Callable[..., Any]:
    """Start a loader of the `video` tier that ends with the test."""

    def loader(tier: str = "video", **fields: Any) -> TrainLoader:
        config = replace(CONFIG, train=str(packed_synthetic / tier), **fields.pop("config", {}))
        return train_loader(config, SHAPE, **fields)

    return loader


def reader_processes(parent: int) -> list[int]:
    """Process ids of the readers of a process."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
            status = (folder / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(status[1]) == parent and status[0] != "Z" and b"process_pool" in command:
            found.append(int(folder.name))
    return found


@pytest.mark.parametrize("tier", ["video", "frames"])
def test_a_batch_has_the_promised_shapes_and_facts(
    start: Callable[..., TrainLoader], packed_synthetic: Path, tier: str
) -> None:
    batch = take(start(tier), 1)[0]
    shards = ShardSet(packed_synthetic / tier)
    planned = SamplePlan(shards.sizes, SEED, LANES, CONFIG.shuffle_window).samples(0, BATCH)
    assert given(batch.log_mel).shape == (BATCH, 208, 32)
    assert given(batch.frames).shape == (BATCH, 1, 3, 48, 48)
    assert given(batch.log_mel).dtype == given(batch.frames).dtype == torch.float32
    assert batch.positions.tolist() == list(range(BATCH))
    assert batch.epochs.tolist() == [0] * BATCH
    assert batch.sample_ids == tuple(shards.sample_id(p.shard, p.sample) for p in planned)
    for row, one in enumerate(planned):
        described = shards.description(one.shard, one.sample)
        assert batch.labels[row] == tuple(described["labels"])
        assert given(batch.frame_seconds)[row].item() in described["video"]["times_seconds"]
        seconds = described["audio"]["samples"] / 16000
        assert given(batch.audio_seconds)[row].tolist() == pytest.approx([0.0, seconds])
    assert given(batch.frames).std() > 0.1
    assert given(batch.log_mel).std() > 0.1


def test_padding_is_zero_before_the_log_mel_is_normalised(
    start: Callable[..., TrainLoader],
) -> None:
    batch = take(start(), 1)[0]
    silence = (0 - CONFIG.log_mel_mean) / CONFIG.log_mel_std
    heard = [
        int((seconds * 16000 - 400) // 160) + 1 for seconds in given(batch.audio_seconds)[:, 1]
    ]
    assert max(heard) < 208
    for row, frames in enumerate(heard):
        assert torch.allclose(given(batch.log_mel)[row, frames:], torch.tensor(silence))
        assert not torch.allclose(given(batch.log_mel)[row, :frames], torch.tensor(silence))


@pytest.mark.parametrize("tier", ["video", "frames"])
def test_a_loader_started_in_the_middle_goes_on_bit_for_bit(
    start: Callable[..., TrainLoader], tier: str
) -> None:
    """Over the end of an epoch (24 clips), with another number of readers."""
    whole = take(start(tier), 7)
    resumed = start(tier, start_position=2 * BATCH, config={"reader_workers": 3})
    assert_equal(take(resumed, 5), whole[2:])
    assert [sorted(set(batch.epochs.tolist())) for batch in whole] == [[0]] * 3 + [[1]] * 3 + [[2]]


@pytest.mark.parametrize(
    ("world_size", "sizes"),
    [(4, [[1, 1]] * 4), (3, [[1, 1], [2, 1], [2, 1]])],
    ids=["evenly", "unevenly"],
)
def test_ranks_and_accumulation_together_see_the_same_clips(
    start: Callable[..., TrainLoader], world_size: int, sizes: list[list[int]]
) -> None:
    """Two steps of 8 clips on several ranks, in two micro-batches each."""

    def rows(batches: list[AudioVideoBatch]) -> dict[int, tuple[str, torch.Tensor, torch.Tensor]]:
        return {
            position: (batch.sample_ids[row], given(batch.log_mel)[row], given(batch.frames)[row])
            for batch in batches
            for row, position in enumerate(batch.positions.tolist())
        }

    whole = rows(take(start(), 2))
    shared = {}
    for rank in range(world_size):
        batches = take(start(rank=rank, world_size=world_size, micro_batch=max(sizes[-1])), 4)
        assert [len(batch.sample_ids) for batch in batches] == 2 * sizes[rank]
        positions = [p for batch in batches for p in batch.positions.tolist()]
        assert positions == sorted(positions)
        shared |= rows(batches)
    assert sorted(shared) == sorted(whole)
    for position, (sample_id, log_mel, frames) in whole.items():
        assert shared[position][0] == sample_id
        assert torch.allclose(shared[position][1], log_mel, atol=1e-5)
        assert torch.equal(shared[position][2], frames)


def test_every_clip_comes_once_an_epoch(start: Callable[..., TrainLoader]) -> None:
    batches = take(start("frames"), 6)
    for epoch in (0, 1):
        ids = [
            sample_id
            for batch in batches
            for sample_id, its_epoch in zip(batch.sample_ids, batch.epochs.tolist(), strict=True)
            if its_epoch == epoch
        ]
        assert len(ids) == len(set(ids)) == 24


def test_a_second_iterator_goes_on_where_the_first_stopped(
    start: Callable[..., TrainLoader],
) -> None:
    loader = start("frames")
    positions = [
        position
        for _ in range(3)
        for batch in take(loader, 1)
        for position in batch.positions.tolist()
    ]
    assert positions == list(range(3 * BATCH))
    assert loader.wait_seconds > 0


@pytest.mark.parametrize(("world_size", "limit"), [(1, 0), (3, 10)])
def test_validation_has_every_clip_once_in_packing_order(
    packed_synthetic: Path,
    validation_loader: Callable[..., ValidationLoader],
    world_size: int,
    limit: int,
) -> None:
    shards = ShardSet(packed_synthetic / "frames")
    everything = [
        shards.sample_id(shard, sample)
        for shard, size in enumerate(shards.sizes)
        for sample in range(size)
    ]
    ids = []
    for rank in range(world_size):
        loader = validation_loader(
            CONFIG,
            SHAPE,
            folder=str(packed_synthetic / "frames"),
            rank=rank,
            world_size=world_size,
            limit=limit,
        )
        ids += [sample_id for batch in loader for sample_id in batch.sample_ids]
    assert ids == everything[: limit or 24]


def test_validation_repeats_exactly_and_does_not_depend_on_the_batch(
    packed_synthetic: Path, validation_loader: Callable[..., ValidationLoader]
) -> None:
    def loader(batch: int) -> ValidationLoader:
        folder = str(packed_synthetic / "video")
        return validation_loader(CONFIG, SHAPE, folder=folder, batch=batch, limit=7)

    by_three = loader(3)
    first = list(by_three)
    assert_equal(list(by_three), first)
    at_once = next(iter(loader(7)))
    assert torch.equal(torch.cat([given(batch.frames) for batch in first]), given(at_once.frames))
    log_mel = torch.cat([given(batch.log_mel) for batch in first])
    assert torch.allclose(log_mel, given(at_once.log_mel), atol=1e-5)
    middle = ShardSet(packed_synthetic / "video").description(0, 0)["ten_frames"][5]["seconds"]
    assert given(at_once.frame_seconds)[0].item() == pytest.approx(middle)


def test_parts_of_a_set_have_batches_of_their_own(
    packed_synthetic: Path, validation_loader: Callable[..., ValidationLoader]
) -> None:
    folder, parts = str(packed_synthetic / "frames"), [range(0, 8), range(16, 24)]
    loader = validation_loader(CONFIG, SHAPE, folder=folder, parts=parts)
    positions = [batch.positions.tolist() for batch in loader]
    assert positions == [[*range(5)], [5, 6, 7], [*range(16, 21)], [21, 22, 23]]


@pytest.mark.parametrize("tier", ["video", "frames"])
def test_ten_frames_of_a_clip_in_validation_are_the_ten_in_order(
    tier: str, packed_synthetic: Path, validation_loader: Callable[..., ValidationLoader]
) -> None:
    """What a classifier averages over; one frame is the sixth of them."""
    folder = str(packed_synthetic / tier)
    batches = [
        next(
            iter(
                validation_loader(
                    replace(CONFIG, frames_per_clip=count), SHAPE, folder=folder, batch=4, limit=4
                )
            )
        )
        for count in (1, 10)
    ]
    shards = ShardSet(folder)
    times = [
        [frame["seconds"] for frame in shards.description(0, clip)["ten_frames"]]
        for clip in range(4)
    ]
    torch.testing.assert_close(batches[1].frame_seconds, torch.tensor(times))
    assert torch.equal(given(batches[1].frames)[:, 5], given(batches[0].frames)[:, 0])
    assert torch.equal(given(batches[1].log_mel), given(batches[0].log_mel))


@pytest.mark.usefixtures("started_pools")
def test_an_unfinished_validation_can_be_begun_again(
    packed_synthetic: Path, validation_loader: Callable[..., ValidationLoader]
) -> None:
    loader = validation_loader(CONFIG, SHAPE, folder=str(packed_synthetic / "frames"), batch=4)
    first = next(iter(loader))
    assert [len(batch.sample_ids) for batch in loader] == [4] * 6
    assert first.positions.tolist() == [0, 1, 2, 3]
    assert reader_processes(os.getpid()) == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"micro_batch": 0}, r"micro_batch is 0; use 1 or more"),
        ({"lanes": 3}, r"lanes is 3.* does not divide global_batch = 8; use 8"),
        ({"world_size": 9}, r"there are 9 ranks and global_batch is 8; use 1 to 8 ranks"),
        ({"lanes": 64, "global_batch": 64, "micro_batch": 64}, r"24 samples, fewer than lanes"),
        ({"start_position": 3}, r"start_position is 3, .* a multiple of lanes = 4"),
        ({"config": {"frame_choice": "published"}}, r"data.frame_choice is published, but"),
    ],
    ids=["micro_batch", "lanes", "world_size", "small_set", "start_position", "frame_choice"],
)
def test_what_does_not_fit_is_refused_with_the_field_its_value_and_the_fix(
    start: Callable[..., TrainLoader], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        start(**fields)


@pytest.mark.usefixtures("started_pools")
def test_a_loader_that_is_closed_or_forgotten_leaves_no_process_and_no_thread(
    start: Callable[..., TrainLoader], packed_synthetic: Path
) -> None:
    threads = threading.active_count()
    loader = start()
    take(loader, 1)
    assert len(reader_processes(os.getpid())) == 1
    loader.close()
    loader.close()
    assert reader_processes(os.getpid()) == []
    with pytest.raises(RuntimeError, match="the loader is closed"):
        next(iter(loader))
    config = replace(CONFIG, train=str(packed_synthetic / "video"))
    forgotten = TrainLoader(
        config,
        SHAPE,
        seed=SEED,
        shares=StepShares(global_batch=8, lanes=4, world_size=1, micro_batch=8),
        rank=0,
        device=torch.device("cpu"),
    )
    take(forgotten, 1)
    del forgotten
    gc.collect()
    assert reader_processes(os.getpid()) == []
    assert threading.active_count() == threads


def test_a_loader_works_in_a_thread_that_is_not_the_main_one(
    start: Callable[..., TrainLoader],
) -> None:
    """Ray Train runs the training loop in one."""
    main = take(start(), 2)
    batches: list[AudioVideoBatch] = []
    thread = threading.Thread(target=lambda: batches.extend(take(start(), 2)))
    thread.start()
    thread.join(120)
    assert_equal(batches, main)


SCRIPT = """
import itertools, os, sys, threading
from pathlib import Path
import torch
from cavmae.dataloaders.config import ClipShape, DataConfig
from cavmae.dataloaders.loading.loader import TrainLoader
from cavmae.dataloaders.loading.quarantine import Journal
from cavmae.dataloaders.sampling.step_shares import StepShares
def say(line):
    # One write: `print` of an unbuffered process makes two, and two processes mix theirs.
    os.write(1, (line + "\\n").encode())
say("the script's body runs")
config = DataConfig(train=sys.argv[1], reader_workers=2, decode_threads=1)
loader = TrainLoader(
    config, ClipShape(64, 32, 32), seed=0, rank=int(os.environ.get("RANK", 0)),
    shares=StepShares(4, 4, world_size=int(os.environ.get("WORLD_SIZE", 1)), micro_batch=2),
    device=torch.device("cpu"), journal=Journal(Path(sys.argv[2]) / "journal"),
)
for batch in itertools.islice(loader, 3):
    say(" ".join(map(str, batch.positions.tolist())))
if "raise" in sys.argv:
    raise RuntimeError("something else went wrong")
"""


def test_a_script_without_a_main_guard_that_fails_before_it_closes_ends_at_once(
    packed_synthetic: Path, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(packed_synthetic / "video"), str(tmp_path), "raise"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["the script's body runs", "0 1", "2 3", "4 5"]
    assert done.returncode == 1
    assert "something else went wrong" in done.stderr
    assert not (tmp_path / "journal").exists(), "a journal is left, as after a crash"


@pytest.mark.slow
def test_loaders_work_under_torchrun(packed_synthetic: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, str(script), str(packed_synthetic / "video"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = sorted(line for line in done.stdout.splitlines() if line[0].isdigit())
    assert lines == ["0 1", "10 11", "2 3", "4 5", "6 7", "8 9"]
