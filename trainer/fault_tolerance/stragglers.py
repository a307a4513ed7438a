"""Which rank the others wait for.

Ranks meet in every step, so all steps take the same time on all of them. What differs is how long a
rank works by itself before it first has to wait: its batch, and its forward pass up to the exchange
of embeddings (to the end of the pass where there is none; its batch alone under ZeRO 3, which
gathers weights in the forward pass).
"""

import logging
import statistics
import time

import torch

log = logging.getLogger(__name__)

_MEETINGS = 3
"""Reports in a row with the same slowest rank, until it is told."""


class RankTimer:
    """Measures one rank; nothing is synchronized for it.

    Args:
        device: of the rank. On a GPU its stream's clock counts, and the host's while it waits for
            data.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._began = 0.0
        self._events: list[torch.cuda.Event] = []
        self._measured = True
        self._seconds = 0.0
        self._steps = 0

    def step(self) -> None:
        """A step begins; the batch is still to come."""
        self._collect()
        self._began = time.monotonic()
        self._measured = False

    def batch_ready(self) -> None:
        """The batch has come."""
        self._seconds += time.monotonic() - self._began
        self._began = time.monotonic()
        if self._cuda:
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self._events[0].record()

    def before_sync(self) -> None:
        """This rank is about to wait for others; only the first time in a step counts."""
        if self._measured:
            return
        self._measured = True
        self._steps += 1
        if self._cuda:
            self._events[1].record()
        else:
            self._seconds += time.monotonic() - self._began

    def take(self) -> float:
        """Mean seconds of a step since this was called last; the step is over on the device."""
        self._collect()
        mean = self._seconds / max(self._steps, 1)
        self._seconds, self._steps = 0.0, 0
        return mean

    def _collect(self) -> None:
        if self._events:
            self._seconds += self._events[0].elapsed_time(self._events[1]) / 1e3
            self._events = []


class StragglerReport:
    """Tells, on one rank, which rank is waited for.

    Args:
        ratio: a rank that works so many times as long as the median one, and so keeps the others
            waiting for a tenth of the step or more, is named. 0: never.
        hosts: of each rank.
    """

    def __init__(self, ratio: float, hosts: list[str]) -> None:
        self._ratio = ratio
        self._hosts = hosts
        self._suspect, self._times, self._told = -1, 0, -1

    def look(self, own_seconds: list[float], step_seconds: float) -> dict[str, float]:
        """Take each rank's own time; returns the metrics.

        Args:
            own_seconds: by rank, as `RankTimer.take` gives it.
            step_seconds: what a step took.
        """
        slowest = max(range(len(own_seconds)), key=own_seconds.__getitem__)
        median = statistics.median_low(own_seconds)
        longest = own_seconds[slowest]
        ratio = longest / median if median > 0 else 1.0
        slow = 0 < self._ratio <= ratio and longest - median >= 0.1 * step_seconds
        self._times = self._times + 1 if slow and slowest == self._suspect else int(slow)
        self._suspect = slowest if slow else -1
        if self._times == _MEETINGS and slowest != self._told:
            self._told = slowest
            log.warning(
                "rank %d on %s is a straggler: it works %.3g s of each step before it meets the "
                "others, %.1f times the median rank's %.3g s; look at that node's disk, network, "
                "clocks and neighbours",
                slowest,
                self._hosts[slowest],
                longest,
                ratio,
                median,
            )
        return {"slowest_rank": float(slowest), "slowest_rank_ratio": ratio}
