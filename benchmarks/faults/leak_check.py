"""Whether processes leak memory or open file handles.

A leak of a long run is small against its memory, and memory grows while a process starts. So each
process is judged by itself, without its first minute: the median of the last third of its life
against that of the first third.
"""

import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class FlatMeans:
    """What is judged of a process, and how much it may grow."""

    warm_up_seconds: float = 60.0
    """First part of a life, not judged: imports, first steps, pools that fill."""
    judged_seconds_at_least: float = 60.0
    """Shortest life after that; a process that ends sooner is not judged."""
    memory_growth_share_at_most: float = 0.05
    """Limit of the growth of memory, as a share of it..."""
    controller_may_grow_once_by_bytes: int = 64_000_000
    """...for Ray Train's controller, more by this: at the first failure of a rank it imports what
    classifies failures, torch among it (54 MB measured)..."""
    handles_growth_at_most: int = 4
    """...and of open file handles: a log that is rotated, a connection that is renewed."""


FLAT_MEANS = FlatMeans()


@dataclass(frozen=True)
class Usage:
    """What a process uses at a moment. Attributes: kind of process; process, its id, and
    born_unix_seconds, as ids are reused; memory_bytes, resident; handles, open file descriptors."""

    kind: str
    process: int
    born_unix_seconds: float
    unix_seconds: float
    memory_bytes: int
    handles: int


@dataclass(frozen=True)
class Life:
    """The use of a process over its life.

    Attributes:
        kind, process: as of its samples.
        seconds: that it was watched for.
        judged: whether it lived long enough.
        memory_bytes: median of the first third of what is judged.
        memory_growth_bytes, handles_growth: median of the last third less that of the first.
    """

    kind: str
    process: int
    seconds: float
    judged: bool
    memory_bytes: float = 0.0
    memory_growth_bytes: float = 0.0
    handles_growth: float = 0.0

    @property
    def flat(self) -> bool:
        """Whether it does not grow; true if it was not judged."""
        allowed = FLAT_MEANS.memory_growth_share_at_most * self.memory_bytes
        if self.kind == "controller":
            allowed += FLAT_MEANS.controller_may_grow_once_by_bytes
        return (
            self.memory_growth_bytes <= allowed
            and self.handles_growth <= FLAT_MEANS.handles_growth_at_most
        )


def lives(samples: Sequence[Usage]) -> list[Life]:
    """Group samples by process, in the order of their starts."""
    processes: dict[tuple[int, float], list[Usage]] = {}
    for sample in samples:
        processes.setdefault((sample.process, sample.born_unix_seconds), []).append(sample)
    return [_life(found) for found in processes.values()]


def _life(samples: list[Usage]) -> Life:
    kind, process = samples[0].kind, samples[0].process
    began, ended = samples[0].unix_seconds, samples[-1].unix_seconds
    kept = [one for one in samples if one.unix_seconds >= began + FLAT_MEANS.warm_up_seconds]
    shortest = FLAT_MEANS.warm_up_seconds + FLAT_MEANS.judged_seconds_at_least
    third = len(kept) // 3
    if third == 0 or ended - began < shortest:
        return Life(kind, process, ended - began, judged=False)
    (memory, handles), (last_memory, last_handles) = (
        (
            statistics.median(one.memory_bytes for one in part),
            statistics.median(one.handles for one in part),
        )
        for part in (kept[:third], kept[-third:])
    )
    return Life(
        kind,
        process,
        ended - began,
        judged=True,
        memory_bytes=memory,
        memory_growth_bytes=last_memory - memory,
        handles_growth=last_handles - handles,
    )


@contextmanager
def usage_samples(
    processes: Callable[[], dict[str, list[psutil.Process]]],
    every_seconds: float,
    samples: list[Usage],
) -> Iterator[None]:
    """Sample the use of processes in a thread.

    Args:
        processes: returns those that exist now, by kind.
        every_seconds: between two samples.
        samples: what is found is added to.
    """
    closed = threading.Event()

    def watch() -> None:
        while not closed.wait(every_seconds):
            for kind, found in processes().items():
                for process in found:
                    with suppress(psutil.Error):  # it has ended
                        samples.append(_usage(kind, process))

    thread = threading.Thread(target=watch, name="usage", daemon=True)
    thread.start()
    try:
        yield
    finally:
        closed.set()
        thread.join()


def _usage(kind: str, process: psutil.Process) -> Usage:
    return Usage(
        kind,
        process.pid,
        process.create_time(),
        time.time(),
        memory_bytes=process.memory_info().rss,
        handles=process.num_fds(),
    )
