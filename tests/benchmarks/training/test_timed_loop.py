"""Each step that is told has its own time alone, and steps are told from the first timed one on."""

from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cavmae.benchmarks.harness import timeline
from cavmae.benchmarks.harness.power import Energy
from cavmae.benchmarks.training import timed_loop
from cavmae.benchmarks.training.timed_loop import AllTimed, TimedLoop
from cavmae.benchmarks.training.timed_plan import TimedPlan

CPU = torch.device("cpu")
WARM_UP, STEPS, PART_STEPS = 2, 3, 2


class Clock:
    """A clock that goes only when it is told to."""

    now = 0.0

    def pass_seconds(self, seconds: float) -> None:
        self.now += seconds


class SlowMeter:
    """Notes when it was started and stopped, each of which takes a time."""

    readable = True

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def start(self) -> None:
        self._clock.pass_seconds(300)
        self._began = self._clock.now

    def stop(self) -> Energy:
        measured = self._clock.now - self._began
        self._clock.pass_seconds(300)
        return Energy(measured, 1.0, "seconds for joules")


class SlowObserver:
    """Takes the time of an observer to be made, and labels nothing."""

    def __init__(self, clock: Clock) -> None:
        clock.pass_seconds(300)

    def backward(self, _loss: torch.Tensor) -> AbstractContextManager[None]:
        return nullcontext()

    def check(self) -> None: ...


def train(timed: TimedLoop, clock: Clock, accumulation: int) -> None:
    """Take steps as the trainer does, whose batches, forward, backward and update take 0.1, 10, 20
    and 40 s; step n, from 0, takes n seconds of its own."""
    hooks, step = timed.hooks(), 0
    nothing: Any = SimpleNamespace(module=None, loss=lambda *_: None)
    task = hooks.wrap_task(nothing)
    while True:
        with hooks.span("data wait"):
            clock.pass_seconds(0.1)
        for _ in range(accumulation):
            with hooks.span("forward"):
                task.loss(nothing, nothing)
                clock.pass_seconds(10)
            with hooks.span("backward"):
                clock.pass_seconds(20)
        with hooks.span("update"):
            clock.pass_seconds(40)
        with hooks.span("checkpoint"):
            clock.pass_seconds(step)
        step += 1


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timeline.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(timed_loop, "power_meter", lambda _device: SlowMeter(clock))
    monkeypatch.setattr(timed_loop, "PartObserver", lambda *_: SlowObserver(clock))
    monkeypatch.setattr(timed_loop, "observe_collectives", lambda _: clock.pass_seconds(300))
    return clock


def results(clock: Clock, part_steps: int = PART_STEPS, accumulation: int = 1) -> dict[str, Any]:
    timed = TimedLoop(CPU, TimedPlan(True, WARM_UP, STEPS, part_steps))
    with pytest.raises(AllTimed):
        train(timed, clock, accumulation)
    return timed.results()


def own_seconds(steps: list[dict[str, Any]]) -> list[float]:
    return [one["loop"]["step"] for one in steps]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_timed_steps_are_those_after_the_warm_up(clock: Clock, accumulation: int) -> None:
    found = results(clock, accumulation=accumulation)
    assert own_seconds(found["steps"]) == pytest.approx([2, 3, 4])
    assert own_seconds(found["part_steps"]) == pytest.approx([5, 6])


def test_what_the_end_of_the_timed_steps_takes_is_in_no_step(clock: Clock) -> None:
    found = results(clock)
    expected = {
        "data wait": {"step": pytest.approx(0.1)},
        "rest of the model": {"forward": 10, "backward": 20},
        "optimizer": {"step": 40},
    }
    for one, own in zip(found["steps"] + found["part_steps"], (2, 3, 4, 5, 6), strict=True):
        assert one == expected | {"loop": {"step": pytest.approx(own)}}


def test_energy_is_of_the_timed_steps(clock: Clock) -> None:
    assert results(clock)["energy"]["joules"] == pytest.approx(3 * 70.1 + 2 + 3 + 4)


def test_without_steps_by_parts_the_timed_ones_are_whole(clock: Clock) -> None:
    found = results(clock, part_steps=0)
    assert own_seconds(found["steps"]) == pytest.approx([2, 3, 4])
    assert found["part_steps"] == []
