"""`cavmae embed`, with `--workers` on a cluster.

Each Ray process has one model and takes some shards at a time. Files are whole or not there, so
where a process dies Ray starts it again and it does what is missing of the same shards.
"""

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
import tyro

from cavmae.cluster.config import ClusterConfig
from cavmae.cluster.connection import absolute_path, connected, tell_shortage
from cavmae.command import exit_code
from cavmae.trainer.embeddings.embed import (
    EmbedConfig,
    embed_set,
    in_this_process,
    tell,
    write_files,
)
from cavmae.trainer.embeddings.parquet_store import Origin
from cavmae.trainer.evaluation.trained_run import AnyRun, open_trained_encoders
from cavmae.trainer.model.encoder import AudioVideoEncoder

PARTS_PER_WORKER = 4
"""Parts of the work for each process, where there are shards enough: the last ones end together."""
MOST_SHARDS = 16
"""Of a part: a died process does a part again, less the files that it wrote."""


@dataclass(frozen=True)
class RayEmbedConfig(EmbedConfig):
    """Write what a finished run makes of the sound and the frames of every clip of a packed set.

    Run the same command again to go on after an interruption.

    Raises:
        ValueError: a field out of its range.
    """

    workers: int = 0
    """Ray processes that embed, each with a model of its own; 0: this process does."""
    gpus_per_worker: int = 0
    """1: each has a GPU of its own; 0: they embed on CPUs."""
    cpus_per_worker: int = 1
    """CPU cores reserved for each, and its CPU threads."""
    address: str = ""
    """Ray cluster to use, such as `auto` or HOST:6379; empty: the one that RAY_ADDRESS names, else
    one that is started for this command and ends with it."""
    max_failures: int = 3
    """Times that a process that died is started again."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.workers:
            self.cluster()
        elif self.address or self.gpus_per_worker:
            raise ValueError(
                "workers is 0, with which this process embeds, and address or gpus_per_worker is "
                "set; set workers to the number of Ray processes, or leave them out"
            )

    def cluster(self) -> ClusterConfig:
        """Where the processes are."""
        names = ("workers", "gpus_per_worker", "cpus_per_worker", "address", "max_failures")
        return ClusterConfig(**{name: getattr(self, name) for name in names})


class Embedder:
    """What a Ray process does; the run is opened when the first shards are, so that its errors are
    answers to a call."""

    def __init__(self, config: EmbedConfig, origin: Origin, device: str) -> None:
        self._config, self._origin, self._device = config, origin, device

    def embed(self, numbers: Sequence[int]) -> Sequence[int]:
        """Write the files of some shards; returns their numbers.

        Raises:
            LastingError: what the user has to mend.
        """
        from cavmae.cluster.worker import LastingError, is_lasting

        try:
            for _ in write_files(*self._opened, self._config, self._origin, numbers):
                pass
        except Exception as error:
            if is_lasting(error):
                raise LastingError(str(error)) from error
            raise
        return numbers

    @cached_property
    def _opened(self) -> tuple[AnyRun, AudioVideoEncoder]:
        run = open_trained_encoders(self._config.run_dir)
        return run, run.model(torch.device(self._device))


def _on_ray(
    asked: RayEmbedConfig, config: EmbedConfig, origin: Origin, numbers: Sequence[int]
) -> Iterator[int]:
    """The executor of a cluster."""
    cluster = asked.cluster()
    with connected(cluster, threads=cluster.cpus_per_worker) as folder:
        import ray  # Not before: it reads its environment when it is imported.
        from ray.exceptions import RayActorError, RayTaskError
        from ray.util import ActorPool

        from cavmae.cluster.worker import LastingError

        tell_shortage(cluster)
        names = ("run_dir", "shards", "out")
        paths = {name: absolute_path(name, getattr(config, name), folder) for name in names}
        size = max(1, min(MOST_SHARDS, len(numbers) // (PARTS_PER_WORKER * cluster.workers)))
        parts = [numbers[first : first + size] for first in range(0, len(numbers), size)]
        remote: Any = ray.remote(
            num_cpus=cluster.cpus_per_worker,
            num_gpus=cluster.gpus_per_worker,
            max_restarts=cluster.max_failures,
            max_task_retries=cluster.max_failures,
        )(Embedder)
        device = "cuda" if cluster.gpus_per_worker else "cpu"
        pool = ActorPool(
            [
                remote.remote(dataclasses.replace(config, **paths), origin, device)
                for _ in range(min(cluster.workers, len(parts)))
            ]
        )
        try:
            for done in pool.map_unordered(lambda one, part: one.embed.remote(part), parts):
                yield from done
        except RayTaskError as error:
            if not isinstance(error.cause, LastingError):
                raise
            raise ValueError(str(error.cause)) from None
        except RayActorError as error:
            raise RuntimeError(
                f"a process died more often than max_failures = {cluster.max_failures} "
                "allows; the same command goes on with the shards that have no file: "
                f"{str(error).strip().partition(chr(10))[0]}"
            ) from error


def main(arguments: list[str]) -> int:
    """The command; returns its exit code."""
    config = tyro.cli(RayEmbedConfig, prog="cavmae embed", args=arguments)
    executor = partial(_on_ray, config) if config.workers else in_this_process
    tell(config, embed_set(config, executor))
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
