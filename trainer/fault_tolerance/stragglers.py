"""Which rank the others wait for.

Ranks synchronize in every step, so a step takes the same time on all of them. What differs is how
long a rank is busy by itself before it first has to wait: its batch, and its forward pass up to the
exchange of embeddings (to the end of the pass if there is none; its batch alone under ZeRO 3, which
gathers weights in the forward pass).
"""

import logging
import statistics
import time

import torch

log = logging.getLogger(__name__)

_REPORT_AFTER = 3
"""Updates in a row with the same slowest rank before it is reported."""


class RankTimer:
    """Times how long this rank is busy in each step; nothing is synchronized for it.

    Args:
        device: this rank's device. On a GPU its stream's clock counts, and the host's clock while
            it waits for data.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._began = 0.0
        self._events: list[torch.cuda.Event] = []
        self._measured = True
        self._seconds = 0.0
        self._steps = 0

    def begin_step(self) -> None:
        """Note that a step begins, with the wait for its batch."""
        self._collect()
        self._began = time.monotonic()
        self._measured = False

    def batch_ready(self) -> None:
        """Note that the batch has arrived."""
        self._seconds += time.monotonic() - self._began
        self._began = time.monotonic()
        if self._cuda:
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self._events[0].record()

    def before_sync(self) -> None:
        """Note that this rank is about to wait for others; the first time in a step counts."""
        if self._measured:
            return
        self._measured = True
        self._steps += 1
        if self._cuda:
            self._events[1].record()
        else:
            self._seconds += time.monotonic() - self._began

    def pop_mean(self) -> float:
        """Return the mean busy seconds of the steps since the last call; call it when the step is
        done on the device."""
        self._collect()
        mean = self._seconds / max(self._steps, 1)
        self._seconds, self._steps = 0.0, 0
        return mean

    def _collect(self) -> None:
        if self._events:
            self._seconds += self._events[0].elapsed_time(self._events[1]) / 1e3
            self._events = []


class StragglerMonitor:
    """Reports the rank that the others keep waiting for.

    Args:
        ratio: a rank is a straggler if it is busy this many times as long as the median rank and
            keeps the others waiting for a tenth of the step or more; 0: never.
        hosts: host name of each rank.
    """

    def __init__(self, ratio: float, hosts: list[str]) -> None:
        self._ratio = ratio
        self._hosts = hosts
        self._suspect, self._times, self._reported = -1, 0, -1

    def update(self, busy_seconds: list[float], step_seconds: float) -> dict[str, float]:
        """Compare the ranks and return the metrics.

        Args:
            busy_seconds: by rank, from `RankTimer.pop_mean`.
            step_seconds: time of a whole step.
        """
        slowest = max(range(len(busy_seconds)), key=busy_seconds.__getitem__)
        median = statistics.median_low(busy_seconds)
        longest = busy_seconds[slowest]
        ratio = longest / median if median > 0 else 1.0
        slow = 0 < self._ratio <= ratio and longest - median >= 0.1 * step_seconds
        self._times = self._times + 1 if slow and slowest == self._suspect else int(slow)
        self._suspect = slowest if slow else -1
        if self._times == _REPORT_AFTER and slowest != self._reported:
            self._reported = slowest
            log.warning(
                "rank %d on %s is a straggler: it is busy for %.3g s of each step before it waits "
                "for others, %.1f times the median rank's %.3g s; check that node's disk, network, "
                "clock speeds and other processes",
                slowest,
                self._hosts[slowest],
                longest,
                ratio,
                median,
            )
        return {"slowest_rank": float(slowest), "slowest_rank_ratio": ratio}
