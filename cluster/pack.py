"""`cavmae pack`, with `--ray` on a cluster.

Clips are decoded in Ray tasks, a few in each, in worker processes that may be lost; this process
writes the shards in the order of the list, as it does without Ray. So bytes, restarts, duplicates
and reports do not depend on the cluster. All data pass through this process: where its network is
the bottleneck, pack the list in parts.
"""

import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable
from functools import partial
from typing import Any

from cavmae.cluster.config import ClusterConfig
from cavmae.cluster.connection import connected
from cavmae.dataloaders.packing import pack
from cavmae.dataloaders.process_pool import TaskLimits, run_in_order

CLIPS_TOGETHER = 16
"""Clips of one Ray task, whose worker process takes a second to start."""
TASKS_PER_CORE = 2
"""Limit of concurrent tasks: it bounds the results that wait for an earlier task to be written."""


def main(argv: list[str]) -> int:
    """Run the command line; returns the exit code."""
    return pack.main(argv, on_ray=on_ray)


def on_ray(address: str) -> pack.Executor:
    """Return the executor of a cluster; empty: the one that RAY_ADDRESS names, else a new one."""
    return partial(_run_in_order, address)


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
        address: address of the cluster.
        workers: cores of a cluster that is started here; a running one is used whole.
    """
    with connected(ClusterConfig(workers=workers, address=address), threads=1):
        import ray  # not earlier: it reads its environment when it is imported

        task = ray.remote(num_cpus=1, max_retries=3)(_run_some)
        limit = TASKS_PER_CORE * max(1, int(ray.cluster_resources().get("CPU", 1)))
        under_way: deque[Any] = deque()
        tasks = iter(arguments)
        while some := tuple(itertools.islice(tasks, CLIPS_TOGETHER)):
            under_way.append(task.remote(function, some, limits))
            if len(under_way) == limit:
                yield from ray.get(under_way.popleft())
        while under_way:
            yield from ray.get(under_way.popleft())


def _run_some(function: Callable[[Any], Any], some: tuple[Any, ...], limits: TaskLimits) -> Any:
    return list(run_in_order(function, some, workers=1, limits=limits))
