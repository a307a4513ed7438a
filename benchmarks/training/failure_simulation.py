"""A month of a run, simulated failure by failure: how much of it goes into steps that last."""

import math
from dataclasses import dataclass

import numpy as np

MONTHS = 200
"""Simulated each time: the 5% that go worst are ten months."""


@dataclass(frozen=True)
class Month:
    """What a run of so many GPUs goes through in a month.

    Attributes:
        gpus: of the run.
        failures: mean number.
        goodput: mean share of the time, 0 to 1, that goes into steps that last.
        worst_goodput: share that 95% of the months exceed.
        seconds_per_failure: mean loss by one failure, repeated steps included.
    """

    gpus: int
    failures: float
    goodput: float
    worst_goodput: float
    seconds_per_failure: float


@dataclass(frozen=True)
class Run:
    """What decides how a run gets through failures; all in seconds, but for the share.

    Attributes:
        between_failures: mean time between two failures, which come at random.
        hang_share: of the failures, 0 to 1, that only the watchdog notices.
        hang: until it does, after which the run recovers as from any other.
        recovery: from a failure that is noticed to the next step.
        interval: of training between two checkpoints.
        stall: that training stands still for a checkpoint.
        write: from then until the checkpoint is committed, beside the steps.
    """

    between_failures: float
    hang_share: float
    hang: float
    recovery: float
    interval: float
    stall: float
    write: float


def simulated_month(run: Run, gpus: int, seconds: float) -> Month:
    """Simulate months of a run; the same numbers for the same arguments.

    Args:
        run: its times.
        gpus: noted in the result.
        seconds: of a month.
    """
    draw = np.random.default_rng(0)
    found = [_simulated(run, seconds, draw) for _ in range(MONTHS)]
    kept, failures = (np.array(column) for column in zip(*found, strict=True))
    undisturbed = seconds * run.interval / (run.interval + run.stall)
    return Month(
        gpus=gpus,
        failures=float(failures.mean()),
        goodput=float(kept.mean() / seconds),
        worst_goodput=float(np.quantile(kept, 0.05) / seconds),
        seconds_per_failure=float((undisturbed - kept).sum() / max(failures.sum(), 1)),
    )


def _simulated(run: Run, seconds: float, draw: np.random.Generator) -> tuple[float, int]:
    """Return the seconds of training that last, and the number of failures."""
    clock, kept, failures = 0.0, 0.0, 0
    segment = run.interval + run.stall
    while True:
        trained = draw.exponential(run.between_failures)
        if clock + trained >= seconds:  # what the last checkpoint does not have is not lost
            return kept + (seconds - clock) * run.interval / segment, failures
        committed = max(0, math.floor((trained - run.write) / segment))
        kept, clock, failures = kept + committed * run.interval, clock + trained, failures + 1
        while clock < seconds:
            lost = run.recovery + run.hang * (draw.random() < run.hang_share)
            again = draw.exponential(run.between_failures)
            if again >= lost:
                clock += lost
                break
            clock, failures = clock + again, failures + 1  # it fails again while it recovers
        if clock >= seconds:
            return kept, failures
