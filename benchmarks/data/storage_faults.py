"""`cavmae bench storage-faults`: load from a failing store, killed and resumed several times.

One-second clips, few of them different, in many shards on an S3 store that fails now and then; two
ranks with one cache that is smaller than the set; all ranks are killed several times. At the end
the ranks' logs must show every sample exactly once an epoch, in the planned order.

A rank's log stands for a checkpoint: after a kill both ranks resume from the last step that both
have written.
"""

import hashlib
import json
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from cavmae.atomic_write import write_text
from cavmae.benchmarks.harness.object_store import ObjectStore, object_store
from cavmae.benchmarks.harness.processes import Start, module_command
from cavmae.benchmarks.harness.records import RecordedConfig, write_record
from cavmae.benchmarks.harness.synthetic_shards import synthetic_shards
from cavmae.dataloaders.config import ClipShape, DataConfig
from cavmae.dataloaders.loading.loader import TrainLoader
from cavmae.dataloaders.sampling.sample_plan import SamplePlan
from cavmae.dataloaders.sampling.step_shares import StepShares
from cavmae.dataloaders.shards.format import description_bytes
from cavmae.dataloaders.shards.shard_set import ShardSet
from cavmae.dataloaders.shards.writer import ShardWriter, write_index

RANKS, LANES, GLOBAL_BATCH, WINDOW = 2, 8, 64, 256
SHARES = StepShares(GLOBAL_BATCH, LANES, RANKS, micro_batch=GLOBAL_BATCH // RANKS)
SHAPE = ClipShape(audio_frames=96, mel_bins=128, image_size=32)
SEED = 3


@dataclass(frozen=True)
class StorageFaultsConfig(RecordedConfig):
    """Load from a failing store with a small cache, killed and resumed several times.

    Raises:
        ValueError: an option out of its range.
    """

    clips: int = 20_000
    """Samples of the set."""
    different: int = 200
    """How many of them are different."""
    shards: int = 40
    """Shards that the clips are packed in."""
    kills: int = 3
    """How often all ranks are killed."""
    faults: int = 50
    """One answer of the store in so many fails."""
    work_dir: str = "runs/storage-faults"
    """Folder that is created, and removed at the end."""

    def __post_init__(self) -> None:
        if self.clips % self.shards or self.different < 1 or self.clips < GLOBAL_BATCH:
            raise ValueError(
                f"clips is {self.clips}, shards {self.shards}, different {self.different}; use a "
                f"number of clips from {GLOBAL_BATCH} that the shards divide"
            )


def main(arguments: list[str]) -> int:
    """Run the loader and write a record; returns 1 where the logs are not the plan."""
    config = tyro.cli(StorageFaultsConfig, prog="cavmae bench storage-faults", args=arguments)
    work = Path(config.work_dir)
    work.mkdir(parents=True)
    try:
        with object_store() as store:
            results = _day(config, work, store)
    finally:
        shutil.rmtree(work)
    device = torch.device("cpu")
    print(f"record: {write_record(config.out, 'storage-faults', device, vars(config), results)}")
    print(
        f"{results['samples_logged']} samples in {results['epochs']:.2f} epochs, killed "
        f"{results['kills']} times: {'as planned' if results['as_planned'] else 'NOT AS PLANNED'}"
    )
    return 0 if results["as_planned"] else 1


def _day(config: StorageFaultsConfig, work: Path, store: ObjectStore) -> dict[str, Any]:
    began = time.monotonic()
    folder = _make_set(work, config.clips, config.different, config.shards)
    size = sum(path.stat().st_size for path in folder.iterdir())
    url = store.upload(folder, "day")
    store.fail(config.faults)
    prepared = time.monotonic()
    steps = config.clips // GLOBAL_BATCH + 8  # Into the second epoch.
    kills = 0
    resumed = []
    while (done := _steps_logged(work)) < steps:
        for rank in range(RANKS):
            _cut_log(work, rank, done)
        resumed.append(done)
        until = (kills + 1) * steps // (config.kills + 1) if kills < config.kills else steps
        commands = []
        for rank in range(RANKS):
            words = {"rank": rank, "step": done, "log": str(_log(work, rank))}
            words |= {"url": url, "steps": steps, "cache": str(work / "cache"), "bytes": size // 2}
            command = module_command("cavmae.benchmarks.data.storage_faults", json.dumps(words))
            commands.append((command, store.environment))
        # Leaving the context kills the ranks.
        with Start(commands, work / "log") as start:
            for step in range(done, until):
                start.wait_for(lambda step=step: _steps_logged(work) > step, f"step {step + 1}")
            if until == steps:
                start.finish()
        kills += until < steps
    counts = store.counts()
    logs = [_logged(work, rank) for rank in range(RANKS)]
    cached = sum(path.stat().st_size for path in (work / "cache").rglob("*") if path.is_file())
    ids = [sample for step in range(steps) for rank in range(RANKS) for sample in logs[rank][step]]
    first_epoch = set(_in_order(logs, steps)[: config.clips])
    return {
        "as_planned": _planned(folder, steps) == logs,
        "each_sample_once_in_the_first_epoch": len(first_epoch) == config.clips,
        "samples_logged": len(ids),
        "epochs": len(ids) / config.clips,
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
    """Make a `frames` tier that repeats `different` clips under new keys."""
    packed = ShardSet(synthetic_shards(work, different, seed=SEED, size=32, seconds=1.0))
    members = [
        {name: packed.member(*clip, name) for name in packed.members}
        for clip in map(packed.at, range(packed.samples))
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
        content=[hashlib.sha256(b"%d" % number).hexdigest() for number in range(clips)],
        shards=[entry for entry in entries if entry],
    )
    return folder


def _planned(folder: Path, steps: int) -> list[list[list[str]]]:
    """Return what the logs must be: ids by rank and step."""
    shards = ShardSet(folder)
    plan = SamplePlan(shards.sizes, SEED, LANES, WINDOW)
    return [
        [
            [
                shards.sample_id(planned.shard, planned.sample)
                for planned in plan.at(step * GLOBAL_BATCH + SHARES.offsets(rank))
            ]
            for step in range(steps)
        ]
        for rank in range(RANKS)
    ]


def _in_order(logs: list[list[list[str]]], steps: int) -> list[str]:
    """Order logged ids by position."""
    found = np.empty(steps * GLOBAL_BATCH, dtype=object)
    for rank, log in enumerate(logs):
        for step, ids in enumerate(log):
            found[step * GLOBAL_BATCH + SHARES.offsets(rank)] = ids
    return found.tolist()


def _log(work: Path, rank: int) -> Path:
    return work / f"rank-{rank}.jsonl"


def _logged(work: Path, rank: int) -> list[list[str]]:
    """Read the ids of each completely written step."""
    return [json.loads(line) for line in _log(work, rank).read_text().split("\n")[:-1]]


def _cut_log(work: Path, rank: int, steps: int) -> None:
    """Keep the first steps of a log."""
    log = _log(work, rank)
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    write_text(log, "".join(lines[:steps]))


def _steps_logged(work: Path) -> int:
    """Count the steps that all ranks have written completely."""
    logs = [_log(work, rank) for rank in range(RANKS)]
    return min(log.read_bytes().count(b"\n") if log.exists() else 0 for log in logs)


def _rank(words: dict[str, Any]) -> None:
    """Run one rank: log the ids of each step, from the given one on."""
    torch.set_num_threads(1)
    loader = TrainLoader(
        DataConfig(
            train=words["url"],
            shuffle_window=WINDOW,
            reader_workers=2,
            decode_threads=1,
            cache_folder=words["cache"],
            cache_gigabytes=words["bytes"] / 1e9,
        ),
        SHAPE,
        seed=SEED,
        shares=SHARES,
        rank=words["rank"],
        device=torch.device("cpu"),
        start_position=words["step"] * GLOBAL_BATCH,
    )
    with open(words["log"], "a", buffering=1) as log:
        for _, batch in zip(range(words["step"], words["steps"]), loader, strict=False):
            log.write(json.dumps(batch.sample_ids) + "\n")
    loader.close()


if __name__ == "__main__":
    _rank(json.loads(sys.argv[1]))
