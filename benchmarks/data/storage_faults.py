"""`cavmae bench data-day`: a day in the life of the loader, in minutes.

One-second clips, few of them different, in many shards on an S3 store that fails now and then; two
ranks with one cache that is smaller than the set; all of it killed and started again several times.
At the end the ranks' logs must show every sample exactly once an epoch, in the planned order.

A rank's log is what a checkpoint is for a run: after a kill both ranks go on from the last step
that both have written.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from cavmae.benchmarks.harness.object_store import ObjectStore, object_store
from cavmae.benchmarks.harness.records import write_record
from cavmae.dataloaders.batch import ClipShape
from cavmae.dataloaders.config import DataConfig
from cavmae.dataloaders.loading.loader import TrainLoader
from cavmae.dataloaders.packing.pack import PackConfig, pack
from cavmae.dataloaders.sampling.sample_plan import SamplePlan, rank_positions
from cavmae.dataloaders.shards.format import description_bytes
from cavmae.dataloaders.shards.shard_set import ShardSet
from cavmae.dataloaders.shards.writer import ShardWriter, write_index
from cavmae.dataloaders.tools.synthetic import generate

RANKS, LANES, GLOBAL_BATCH, WINDOW = 2, 8, 64, 256
SHAPE = ClipShape(audio_frames=96, mel_bins=128, image_size=32)
SEED = 3


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(
        prog="cavmae bench data-day", description="Kills, a failing store, a small cache."
    )
    arguments.add_argument("--clips", type=int, default=20_000, help="samples of the set")
    arguments.add_argument("--different", type=int, default=200, help="of them different")
    arguments.add_argument("--shards", type=int, default=40, help="that the clips are packed in")
    arguments.add_argument("--kills", type=int, default=3, help="times that all ranks are killed")
    arguments.add_argument("--faults", type=int, default=50, help="one answer in so many fails")
    arguments.add_argument("--work-dir", default="runs/data-day", help="made and removed")
    arguments.add_argument("--out", default="benchmarks/results", help="folder of the record")
    return arguments


def main(argv: list[str]) -> int:
    """Live the day and write a record; returns 1 where the logs are not the plan."""
    flags = parser().parse_args(argv)
    if flags.clips % flags.shards or flags.different < 1 or flags.clips < GLOBAL_BATCH:
        raise ValueError(
            f"--clips is {flags.clips}, --shards {flags.shards}, --different {flags.different}; "
            f"use a number of clips from {GLOBAL_BATCH} that the shards divide"
        )
    work = Path(flags.work_dir)
    work.mkdir(parents=True)
    try:
        with object_store() as store:
            results = _day(flags, work, store)
    finally:
        shutil.rmtree(work)
    print(
        f"record: {write_record(flags.out, 'data-day', torch.device('cpu'), vars(flags), results)}"
    )
    print(
        f"{results['samples_logged']} samples in {results['epochs']:.2f} epochs, killed "
        f"{results['kills']} times: {'as planned' if results['as_planned'] else 'NOT AS PLANNED'}"
    )
    return 0 if results["as_planned"] else 1


def _day(flags: argparse.Namespace, work: Path, store: ObjectStore) -> dict[str, Any]:
    began = time.monotonic()
    folder = _make_set(work, flags.clips, flags.different, flags.shards)
    size = sum(path.stat().st_size for path in folder.iterdir())
    url = store.upload(folder, "day")
    store.fail(flags.faults)
    prepared = time.monotonic()
    steps = flags.clips // GLOBAL_BATCH + 8  # Into the second epoch.
    settings = {
        "url": url,
        "steps": steps,
        "cache": str(work / "cache"),
        "gigabytes": size / 2 / 1e9,
    }
    kills = 0
    resumed = []
    while True:
        done = min(len(_logged(work, rank)) for rank in range(RANKS))
        for rank in range(RANKS):
            _cut_log(work, rank, done)
        if done == steps:
            break
        resumed.append(done)
        ranks = [_start(work, rank, done, settings, store) for rank in range(RANKS)]
        until = (kills + 1) * steps // (flags.kills + 1) if kills < flags.kills else steps
        _wait(work, ranks, until)
        if until < steps:
            for process in ranks:
                process.send_signal(signal.SIGKILL)
            kills += 1
        for process in ranks:
            process.wait()
    counts = store.counts()
    logs = [_logged(work, rank) for rank in range(RANKS)]
    cached = sum(path.stat().st_size for path in (work / "cache").rglob("*") if path.is_file())
    ids = [sample for step in range(steps) for rank in range(RANKS) for sample in logs[rank][step]]
    first_epoch = Counter(_in_order(logs, steps)[: flags.clips])
    return {
        "as_planned": _planned(folder, steps) == logs,
        "each_sample_once_in_the_first_epoch": len(first_epoch) == flags.clips
        and set(first_epoch.values()) == {1},
        "samples_logged": len(ids),
        "epochs": len(ids) / flags.clips,
        "kills": kills,
        "resumed_at_steps": resumed,
        "set_bytes": size,
        "cache_limit_bytes": size // 2,
        "cache_bytes_at_the_end": cached,
        "bytes_sent": counts["bytes"],
        "sent_over_set": counts["bytes"] / size,
        "faults": {name: counts.get(name, 0) for name in ("error", "reset", "truncated", "slow")},
        "prepare_seconds": prepared - began,
        "day_seconds": time.monotonic() - prepared,
    }


def _make_set(work: Path, clips: int, different: int, shards: int) -> Path:
    """A `frames` tier in which `different` clips come again and again under new keys."""
    listing = generate(work / "videos", different, SEED, size=32, fps=8, seconds=1.0)
    out = work / "packed"
    pack(PackConfig(str(listing), str(out), tiers="frames"), Console(quiet=True))
    packed = ShardSet(out / "frames")
    members = [
        {name: packed.member(shard, sample, name) for name in packed.members}
        for shard, size in enumerate(packed.sizes)
        for sample in range(size)
    ]
    folder = work / "set"
    folder.mkdir()
    entries = []
    for shard in range(shards):
        writer = ShardWriter(folder, f"{shard:06d}")
        for number in range(clips // shards):
            serial = shard * (clips // shards) + number
            media = dict(members[serial % len(members)])
            description = json.loads(media.pop("json")) | {"key": f"{serial:09d}"}
            crc32 = description.pop("crc32")
            crc32.pop("json", None)
            text = description_bytes(description, crc32)
            writer.add(f"{serial:09d}", {"json": text, **media})
        entries.append(writer.finish())
    write_index(
        folder,
        tier="frames",
        audio_codec=packed.audio_codec,
        video_codec=None,
        short_side=32,
        frame_choice="by_time",
        skipped=0,
        shards=[entry for entry in entries if entry],
    )
    return folder


def _planned(folder: Path, steps: int) -> list[list[list[str]]]:
    """What each rank's log has to be: rank, step, ids."""
    shards = ShardSet(folder)
    plan = SamplePlan(shards.sizes, SEED, LANES, WINDOW)
    return [
        [
            [
                shards.sample_id(planned.shard, planned.sample)
                for planned in plan.at(rank_positions(step, rank, RANKS, GLOBAL_BATCH, LANES))
            ]
            for step in range(steps)
        ]
        for rank in range(RANKS)
    ]


def _in_order(logs: list[list[list[str]]], steps: int) -> list[str]:
    """Ids by position."""
    found = np.empty(steps * GLOBAL_BATCH, dtype=object)
    for rank, log in enumerate(logs):
        for step, ids in enumerate(log):
            found[rank_positions(step, rank, RANKS, GLOBAL_BATCH, LANES)] = ids
    return found.tolist()


def _log(work: Path, rank: int) -> Path:
    return work / f"rank-{rank}.jsonl"


def _logged(work: Path, rank: int) -> list[list[str]]:
    """Ids of each step that was written whole."""
    path = _log(work, rank)
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def _cut_log(work: Path, rank: int, steps: int) -> None:
    lines = [json.dumps(ids) + "\n" for ids in _logged(work, rank)[:steps]]
    _log(work, rank).write_text("".join(lines))


def _start(
    work: Path, rank: int, step: int, settings: dict[str, Any], store: ObjectStore
) -> subprocess.Popen:
    words = {"rank": rank, "step": step, "log": str(_log(work, rank)), **settings}
    return subprocess.Popen(
        [sys.executable, "-m", "cavmae.benchmarks.data.storage_faults", json.dumps(words)],
        env=os.environ | store.environment,
        stderr=subprocess.DEVNULL,  # Every fault that is got over is said there.
    )


def _wait(work: Path, ranks: list[subprocess.Popen], steps: int) -> None:
    """Until all ranks have logged that many steps.

    Raises:
        RuntimeError: one ended before.
    """
    while min(len(_logged(work, rank)) for rank in range(RANKS)) < steps:
        for rank, process in enumerate(ranks):
            if process.poll() not in (None, 0):
                raise RuntimeError(f"rank {rank} ended with {process.returncode}")
        time.sleep(0.2)


def _rank(words: dict[str, Any]) -> None:
    """Log the ids of each step, from the given one on."""
    torch.set_num_threads(1)
    loader = TrainLoader(
        DataConfig(
            train=words["url"],
            shuffle_window=WINDOW,
            reader_workers=2,
            decode_threads=1,
            cache_folder=words["cache"],
            cache_gigabytes=words["gigabytes"],
        ),
        SHAPE,
        seed=SEED,
        global_batch=GLOBAL_BATCH,
        micro_batch=GLOBAL_BATCH // RANKS,
        lanes=LANES,
        rank=words["rank"],
        world_size=RANKS,
        device=torch.device("cpu"),
        start_position=words["step"] * GLOBAL_BATCH,
    )
    with open(words["log"], "a", buffering=1) as log:
        for _, batch in zip(range(words["step"], words["steps"]), loader, strict=False):
            log.write(json.dumps(batch.sample_ids) + "\n")
    loader.close()


if __name__ == "__main__":
    _rank(json.loads(sys.argv[1]))
