"""`cavmae embed`, with `--workers` on a cluster.

Each Ray process holds one model and embeds some shards at a time. Files are written atomically, so
a process that died is restarted by Ray and does what is missing of the same shards.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
import tyro

from cavmae.cluster.config import ClusterConfig
from cavmae.cluster.connection import absolute_path, connected, report_shortage
from cavmae.cluster.restarts import BY_USER
from cavmae.trainer.embeddings.embed import (
    EmbedConfig,
    embed_listed,
    embed_set,
    in_this_process,
    tell,
    write_files,
)
from cavmae.trainer.embeddings.parquet_store import Origin
from cavmae.trainer.evaluation.trained_run import AnyRun, open_trained
from cavmae.trainer.model.encoder import AudioVideoEncoder

PARTS_PER_WORKER = 4
"""Tasks for each process, given enough shards, so that all processes end at about the same time."""
MAX_SHARDS_PER_PART = 16
"""A restarted process repeats at most this many shards, less the files that were written."""


@dataclass(frozen=True)
class RayEmbedConfig(EmbedConfig):
    """Write the audio and video embeddings of every clip of a packed set, or of files.

    Rerun the same command to resume the embedding of a set after an interruption.

    Raises:
        ValueError: a field is out of range.
    """

    workers: int = 0
    """Ray processes that embed, each with its own model; 0: embed in this process."""
    gpus_per_worker: int = 0
    """1: each has its own GPU; 0: they embed on CPUs."""
    cpus_per_worker: int = 1
    """CPU cores reserved for each, which is also its number of threads."""
    address: str = ""
    """Ray cluster to use, such as `auto` or HOST:6379; empty: the one that RAY_ADDRESS names, else
    one that is started and stopped with this command."""
    max_failures: int = 3
    """Times that a dead process is restarted."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.workers and self.of_files:
            raise ValueError(
                "workers is set, which is of packed sets; pack the files, or omit workers"
            )
        if self.workers:
            self.cluster()
        elif self.address or self.gpus_per_worker:
            raise ValueError(
                "workers is 0, which embeds in this process, and address or gpus_per_worker is "
                "set; set workers to the number of Ray processes, or omit them"
            )

    def cluster(self) -> ClusterConfig:
        """Return the cluster settings of these fields."""
        names = ("workers", "gpus_per_worker", "cpus_per_worker", "address", "max_failures")
        return ClusterConfig(**{name: getattr(self, name) for name in names})


class Embedder:
    """The actor of a Ray process. It opens the run with the first shards, so that errors are raised
    by a call."""

    def __init__(self, config: EmbedConfig, origin: Origin, device: str) -> None:
        self._config, self._origin, self._device = config, origin, device

    def embed(self, numbers: Sequence[int]) -> int:
        """Write the files of some shards; return how many clips that were.

        Raises:
            RankError: an error that the user has to fix.
        """
        from cavmae.cluster.worker import RankError, kind_of

        try:
            return sum(write_files(*self._opened, self._config, self._origin, numbers))
        except Exception as error:
            kind = kind_of(error)
            if kind in BY_USER:
                raise RankError(kind, type(error).__name__, str(error)) from error
            raise

    @cached_property
    def _opened(self) -> tuple[AnyRun, AudioVideoEncoder]:
        run = open_trained(self._config.run_dir)
        return run, run.model(torch.device(self._device))


def _on_ray(
    ray_config: RayEmbedConfig, config: EmbedConfig, origin: Origin, numbers: Sequence[int]
) -> Iterator[int]:
    """Execute on a Ray cluster."""
    cluster = ray_config.cluster()
    with connected(cluster, threads=cluster.cpus_per_worker) as folder:
        import ray  # not earlier: it reads its environment when it is imported
        from ray.exceptions import RayActorError, RayTaskError
        from ray.util import ActorPool

        from cavmae.cluster.worker import RankError

        report_shortage(cluster)
        paths: dict[str, Any] = {
            name: absolute_path(name, getattr(config, name), folder) for name in ("run_dir", "out")
        }
        paths["inputs"] = (absolute_path("shards", config.shards, folder),)
        size = max(
            1, min(MAX_SHARDS_PER_PART, len(numbers) // (PARTS_PER_WORKER * cluster.workers))
        )
        parts = [numbers[first : first + size] for first in range(0, len(numbers), size)]
        remote: Any = ray.remote(
            num_cpus=cluster.cpus_per_worker,
            num_gpus=cluster.gpus_per_worker,
            max_restarts=cluster.max_failures,
            max_task_retries=cluster.max_failures,
        )(Embedder)
        device = "cuda" if cluster.gpus_per_worker else "cpu"
        pool: Any = ActorPool(
            [
                remote.remote(dataclasses.replace(config, **paths), origin, device)
                for _ in range(min(cluster.workers, len(parts)))
            ]
        )
        try:
            yield from pool.map_unordered(lambda one, part: one.embed.remote(part), parts)
        except RayTaskError as error:
            if not isinstance(error.cause, RankError):
                raise
            raise ValueError(error.cause.text) from None
        except RayActorError as error:
            raise RuntimeError(
                f"a process died more often than max_failures = {cluster.max_failures} "
                "allows; rerun the same command to resume with the shards that have no file: "
                f"{str(error).strip().partition(chr(10))[0]}"
            ) from error


def main(arguments: list[str]) -> int:
    """Run the command; returns its exit code."""
    config = tyro.cli(RayEmbedConfig, prog="cavmae embed", args=arguments)
    if config.of_files:
        embed_listed(config)
        return 0
    executor = partial(_on_ray, config) if config.workers else in_this_process
    tell(config, embed_set(config, executor))
    return 0
