"""Goodput at its limits, and the interval that nothing beats."""

import math
import random

import pytest

from cavmae.benchmarks.training.goodput import (
    LLAMA_3_GPU_SECONDS_PER_FAILURE,
    Failures,
    best_interval,
    goodput,
)

DAY = 86_400.0


def test_without_failures_only_checkpoints_cost() -> None:
    assert goodput(Failures(math.inf, 300.0, 0.0), 600.0) == 1.0
    assert goodput(Failures(math.inf, 300.0, 6.0), 594.0) == 0.99
    assert math.isinf(best_interval(Failures(math.inf, 300.0, 6.0)))


def test_rare_failures_cost_their_recovery_and_half_an_interval() -> None:
    found = goodput(Failures(100 * DAY, 300.0, 0.0), 600.0)
    assert 1 - found == pytest.approx((300 + 600 / 2) / (100 * DAY), rel=0.01)


def test_a_run_that_fails_all_the_time_gets_nowhere() -> None:
    assert goodput(Failures(60.0, 300.0, 6.0), 600.0) < 1e-3
    assert goodput(Failures(1e-3, 300.0, 6.0), 600.0) == 0.0


@pytest.mark.parametrize("between", [600.0, 3600.0, DAY])
@pytest.mark.parametrize("cost", [0.2, 5.0, 60.0])
def test_no_interval_beats_the_best_one(between: float, cost: float) -> None:
    failures = Failures(between, 120.0, cost)
    best = goodput(failures, best_interval(failures))
    others = [goodput(failures, best_interval(failures) * factor) for factor in (0.5, 0.8, 1.25, 2)]
    assert all(best > other for other in others)


def test_goodput_is_that_of_a_run_with_failures_drawn() -> None:
    failures, interval = Failures(3600.0, 120.0, 10.0), 900.0
    draw = random.Random(0)
    elapsed, done, next_failure = 0.0, 0, draw.expovariate(1 / 3600)
    while done < 20_000:
        end = elapsed + interval + 10.0
        if end <= next_failure:
            elapsed, done = end, done + 1
            continue
        while next_failure < end:  # and again while it starts
            elapsed = next_failure + 120.0
            next_failure += draw.expovariate(1 / 3600)
            end = elapsed
    assert done * interval / elapsed == pytest.approx(goodput(failures, interval), rel=0.01)


def test_llama_3_failed_every_three_hours() -> None:
    assert pytest.approx(3.1, rel=0.01) == LLAMA_3_GPU_SECONDS_PER_FAILURE / 16_384 / 3600
