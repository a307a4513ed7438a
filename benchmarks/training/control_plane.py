"""`cavmae bench control-plane`: what a thousand ranks do besides training, by their own code.

Ranks are threads of a few processes, eight to a node, which is a temporary folder of its own; the
run folder is one that all share. Nothing is sent: what ranks would exchange is pickled, as their
collectives do, and a rank's share of the work on what all have sent is timed. So the times are of
this machine's file system and processor, which all ranks share here and a node's ranks elsewhere.
"""

import pickle
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from cavmae.benchmarks.harness.records import RecordedConfig, timing, write_record
from cavmae.benchmarks.harness.synthetic_shards import synthetic_shards
from cavmae.benchmarks.harness.work_folder import work_folder
from cavmae.benchmarks.report.console import show
from cavmae.dataloaders.loading.quarantine import Journal
from cavmae.dataloaders.loading.reader import EncodedClip, ReadTask
from cavmae.dataloaders.process_pool import ProcessPool
from cavmae.dataloaders.shards.shard_set import ShardSet
from cavmae.field_checks import Limit, PositiveInt
from cavmae.trainer.checkpoint.format import (
    MANIFEST,
    Manifest,
    attempt_folder,
    checkpoint_name,
    manifest_bytes,
    read_manifest,
)
from cavmae.trainer.checkpoint.store import FileDigest, Store
from cavmae.trainer.fault_tolerance.lease import Lease
from cavmae.trainer.run_status import read_status, write_status

NODE_RANKS = 8
CLIPS = 24
_STEP, _ATTEMPT = checkpoint_name(1), 1


@dataclass(frozen=True)
class ControlPlaneConfig(RecordedConfig):
    """Time journals, quarantine, manifests, lease and status of many ranks.

    Raises:
        ValueError: an option out of its range.
    """

    ranks: PositiveInt = 1024
    """Ranks."""
    processes: Annotated[int, Limit(lambda count: 1 <= count <= 4, "1 to 4")] = 4
    """Processes whose threads are the ranks."""
    clips: PositiveInt = 96
    """Clips that a rank decodes at a time."""
    micro_batches: PositiveInt = 10
    """Times that each rank writes its journal."""


@dataclass(frozen=True)
class Ranks:
    """Some ranks of a run, as the threads of a process. Called with the name of a method and some
    ranks; returns seconds and result of each."""

    work: Path
    clips: int
    micro_batches: int
    journals: dict[int, Journal] = field(default_factory=dict)

    def __call__(self, task: tuple[str, range]) -> list[tuple[float, Any]]:
        name, ranks = task
        part: Callable[[int], Any] = getattr(self, name)

        def timed(rank: int) -> tuple[float, Any]:
            began = time.perf_counter()
            result = part(rank)
            return time.perf_counter() - began, result

        with ThreadPoolExecutor(len(ranks)) as threads:
            return list(threads.map(timed, ranks))

    @property
    def store(self) -> Store:
        return Store(self.work / "run" / "checkpoints")

    def journal_of(self, rank: int) -> Journal:
        return Journal(self.work / f"node-{rank // NODE_RANKS}")

    def train_and_crash(self, rank: int) -> None:
        """Write a journal for each micro-batch, and leave it."""
        shards, journal = ShardSet(self.work / "shards/frames"), self.journal_of(rank)
        places = [
            (shard, sample) for shard, size in enumerate(shards.sizes) for sample in range(size)
        ]
        for batch in range(self.micro_batches):
            first = (batch * 1024 + rank) * self.clips
            journal.write(
                _encoded(shards, ReadTask(first + number, 0, *places[number % len(places)]))
                for number in range(self.clips)
            )

    def start_again(self, rank: int) -> bytes:
        """Read a share of the node's journals; returns what the rank sends."""
        self.journals[rank] = self.journal_of(rank)
        shards = ShardSet(self.work / "shards/frames")
        return pickle.dumps(self.journals[rank].unfinished(shards, rank % NODE_RANKS, NODE_RANKS))

    def remove_journals(self, rank: int) -> None:
        """Remove what was read, once all ranks have sent it."""
        self.journals[rank].remove_left()

    def write_checkpoint(self, rank: int) -> dict[str, FileDigest]:
        """Write this rank's file of a checkpoint, next to nothing."""
        name = f"state/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        path = f"{attempt_folder(_STEP, _ATTEMPT)}/{name}"
        return {name: self.store.write(path, lambda file: file.write(b"0" * 1024))}


def _encoded(shards: ShardSet, task: ReadTask) -> EncodedClip:
    name = shards.sample_id(task.shard, task.sample)
    return EncodedClip(task, name, (), b"", (), None, (0, 0, 1, 1), False, (0.0,), (0.0, 0.0))


def main(arguments: list[str]) -> int:
    """Measure, print and write the record."""
    config = tyro.cli(ControlPlaneConfig, prog="cavmae bench control-plane", args=arguments)
    with work_folder("control-plane") as work:
        synthetic_shards(work, CLIPS)
        results = measure(config, work)
    show(write_record(config.out, "control-plane", torch.device("cpu"), vars(config), results))
    return 0


def measure(config: ControlPlaneConfig, work: Path) -> dict[str, Any]:
    """Return the times of each part.

    Args:
        config: how many ranks.
        work: folder with packed `shards`.
    """
    ranks = Ranks(work, config.clips, config.micro_batches)
    results: dict[str, Any] = {}

    def on_ranks(name: str) -> list[Any]:
        began = time.perf_counter()
        futures = [
            pool.submit((name, range(config.ranks)[number :: config.processes]))
            for number, pool in enumerate(pools)
        ]
        found = [one for future in futures for one in future.result()]
        results[name] = timing([seconds for seconds, _ in found])
        del results[name]["all_seconds"]
        results[name]["ranks_together_seconds"] = time.perf_counter() - began
        return [result for _, result in found]

    def on_one_rank(name: str, work: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = work()
        results[name] = {"seconds": time.perf_counter() - began}
        return result

    with ExitStack() as stack:
        pools = [
            stack.enter_context(closing(ProcessPool(ranks, 1))) for _ in range(config.processes)
        ]
        on_ranks("train_and_crash")
        sent = on_ranks("start_again")
        suspects = on_one_rank(
            "suspects", lambda: {task for one in sent for task in pickle.loads(one)}
        )
        on_ranks("remove_journals")
        results["suspects"] |= {"bytes": sum(map(len, sent)), "clips": len(suspects)}
        files = on_ranks("write_checkpoint")
    news = [
        pickle.dumps({(f"000000/{rank:09}", "crc_mismatch")} if rank % 100 == 0 else set())
        for rank in range(config.ranks)
    ]
    on_one_rank("news", lambda: set().union(*map(pickle.loads, news)))
    results["news"]["bytes"] = sum(map(len, news))
    digests = {name: digest for one in files for name, digest in one.items()}
    manifest = manifest_bytes(Manifest(_ATTEMPT, digests))
    on_one_rank("manifest_written", lambda: ranks.store.put(f"{_STEP}/{MANIFEST}", manifest))
    on_one_rank("manifest_read", lambda: read_manifest(ranks.store, _STEP))
    run_dir = work / "run"
    with Lease() as lease:
        on_one_rank("lease_taken", lambda: lease.take({"run_dir": Store(run_dir)}))
        on_one_rank("lease_renewed", lease.renew)
    on_one_rank("status_written", lambda: write_status(run_dir, state="running", step=1))
    on_one_rank("status_read", lambda: read_status(run_dir))
    return results
