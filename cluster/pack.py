"""`cavmae pack`, with `--ray` on a cluster.

Clips are decoded in Ray tasks, a few in each, in worker processes that may be lost; this process
writes the shards in the order of the list, as it does without Ray. So bytes, restarts, duplicates
and reports do not depend on the cluster. All data pass through this process: where its network is
the bottleneck, pack the list in parts.
"""

import itertools
from collections.abc import Callable, Generator, Iterable
from functools import partial
from typing import Any

from cavmae.cluster.config import ClusterConfig
from cavmae.cluster.connection import connected
from cavmae.dataloaders.packing import pack
from cavmae.dataloaders.process_pool import TaskLimits, made_ahead, run_in_order

CLIPS_TOGETHER = 16
"""Clips of one Ray task, whose worker process takes a second to start."""
TASKS_PER_CORE = 2
"""Limit of concurrent tasks: it bounds the results that wait for an earlier task to be written."""


def main(argv: list[str]) -> int:
    """Run the command line; returns the exit code."""
    return pack.main(argv, on_ray=lambda address: partial(_run_in_order, address))


def _run_in_order(
    address: str,
    function: Callable[[Any], Any],
    arguments: Iterable[Any],
    *,
    workers: int,
    limits: TaskLimits,
) -> Generator[Any]:
    """Do as `run_in_order` does, on Ray.

    Args:
        address: of the cluster; empty: the one that RAY_ADDRESS names, else a new one.
        workers: cores of a cluster that is started here; a running one is used whole.
    """
    with connected(ClusterConfig(workers=workers, address=address), threads=1):
        import ray  # not earlier: it reads its environment when it is imported

        task = ray.remote(num_cpus=1, max_retries=3)(_run_some)
        limit = TASKS_PER_CORE * max(1, int(ray.cluster_resources().get("CPU", 1)))
        clips = iter(arguments)
        parts = iter(lambda: tuple(itertools.islice(clips, CLIPS_TOGETHER)), ())
        under_way = (task.remote(function, part, limits) for part in parts)
        for results in made_ahead(under_way, limit):
            yield from ray.get(results)


def _run_some(function: Callable[[Any], Any], some: tuple[Any, ...], limits: TaskLimits) -> Any:
    return list(run_in_order(function, some, workers=1, limits=limits))
