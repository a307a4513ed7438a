"""Whether processes keep what they use: memory and open file handles over their life.

A leak of a long run is small against its memory, and a process that starts takes memory for a
while. So each process is judged by itself, without its first minute: the median of the last third
of its life against that of the first third.
"""

import statistics
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType

import psutil

WARM_UP_SECONDS = 60.0
"""Of a process, not judged: imports, first steps, pools that fill."""
JUDGED_SECONDS = 60.0
"""Of a process after that, at least; one that ends sooner is not judged."""
MEMORY_GROWTH_SHARE = 0.05
"""What the memory of a flat process may grow by, as a share of it..."""
FIRST_FAILURE_BYTES = 64_000_000
"""...and, of Ray Train's controller, once more by this: the first failure of a rank makes it import
what tells failures apart, torch among it (54 MB seen)..."""
HANDLES_GROWTH = 4
"""...and its open file handles: a log that is changed, a connection that is made anew."""


@dataclass(frozen=True)
class Usage:
    """What a process used at a moment. Attributes: kind of process; process, its number, and
    born_unix_seconds, as numbers come again; memory_bytes, resident; handles, open file
    descriptors."""

    kind: str
    process: int
    born_unix_seconds: float
    unix_seconds: float
    memory_bytes: int
    handles: int


@dataclass(frozen=True)
class Life:
    """A process's use over its life.

    Attributes:
        kind, process: as of its samples.
        seconds: that it was watched for.
        judged: it lived long enough.
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
        """Whether it does not grow; true where it was too short to tell."""
        allowed = MEMORY_GROWTH_SHARE * self.memory_bytes
        if self.kind == "controller":
            allowed += FIRST_FAILURE_BYTES
        return self.memory_growth_bytes <= allowed and self.handles_growth <= HANDLES_GROWTH


def lives(samples: Sequence[Usage]) -> list[Life]:
    """The life of each process, in the order of their starts."""
    processes: dict[tuple[int, float], list[Usage]] = {}
    for sample in samples:
        processes.setdefault((sample.process, sample.born_unix_seconds), []).append(sample)
    return [_life(found) for found in processes.values()]


def _life(samples: list[Usage]) -> Life:
    kind, process = samples[0].kind, samples[0].process
    began, ended = samples[0].unix_seconds, samples[-1].unix_seconds
    kept = [one for one in samples if one.unix_seconds >= began + WARM_UP_SECONDS]
    third = len(kept) // 3
    if third == 0 or ended - began < WARM_UP_SECONDS + JUDGED_SECONDS:
        return Life(kind, process, ended - began, judged=False)
    memory = [statistics.median(one.memory_bytes for one in part) for part in _ends(kept, third)]
    handles = [statistics.median(one.handles for one in part) for part in _ends(kept, third)]
    return Life(
        kind,
        process,
        ended - began,
        judged=True,
        memory_bytes=memory[0],
        memory_growth_bytes=memory[1] - memory[0],
        handles_growth=handles[1] - handles[0],
    )


def _ends(samples: list[Usage], third: int) -> tuple[list[Usage], list[Usage]]:
    return samples[:third], samples[-third:]


class UsageSampler:
    """Looks at processes now and then, in a thread of its own. A context.

    Args:
        processes: those that are there now, by kind.
        every_seconds: between two looks.

    Attributes:
        samples: what was seen so far.
    """

    def __init__(
        self, processes: Callable[[], dict[str, list[psutil.Process]]], every_seconds: float
    ) -> None:
        self._processes = processes
        self._every_seconds = every_seconds
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="usage", daemon=True)
        self.samples: list[Usage] = []

    def __enter__(self) -> "UsageSampler":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._closed.wait(self._every_seconds):
            for kind, found in self._processes().items():
                for process in found:
                    with suppress(psutil.Error):  # it has ended
                        self.samples.append(
                            Usage(
                                kind,
                                process.pid,
                                process.create_time(),
                                time.time(),
                                handles=process.num_fds(),
                                memory_bytes=process.memory_info().rss,
                            )
                        )
