"""Every moment of a timeline belongs to one label, and the labels of a step sum to the step."""

import pytest
import torch

from cavmae.benchmarks.harness import timeline
from cavmae.benchmarks.harness.timeline import Label, Timeline

OUTER, INNER, NEXT = Label("outer"), Label("inner", "forward"), Label("next")


class Clock:
    """A clock that goes only when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(timeline.time, "perf_counter", lambda: self.now)

    def pass_seconds(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_a_label_within_another_has_its_own_time_alone(clock: Clock) -> None:
    line = Timeline(torch.device("cpu"), OUTER)
    line.begin_step(OUTER)
    clock.pass_seconds(1)
    with line.within(INNER):
        clock.pass_seconds(10)
    clock.pass_seconds(100)
    line.switch(NEXT)
    clock.pass_seconds(1000)
    line.begin_step(OUTER)
    assert line.seconds() == [{OUTER: 101, INNER: 10, NEXT: 1000}]


def test_time_before_the_first_step_and_of_a_step_that_goes_on_is_left_out(clock: Clock) -> None:
    line = Timeline(torch.device("cpu"), OUTER)
    clock.pass_seconds(5)
    for seconds in (1, 2, 3):
        line.begin_step(NEXT)
        clock.pass_seconds(seconds)
    assert line.seconds() == [{NEXT: 1}, {NEXT: 2}]


def test_a_call_that_fails_leaves_its_label(clock: Clock) -> None:
    line = Timeline(torch.device("cpu"), OUTER)

    def fail(_what: str) -> None:
        clock.pass_seconds(1)
        raise ValueError(line.label)

    line.begin_step(OUTER)
    with pytest.raises(ValueError, match="inner"):
        line.within(INNER)(fail)("x")
    clock.pass_seconds(2)
    line.begin_step(OUTER)
    assert line.seconds() == [{OUTER: 2, INNER: 1}]


def test_moments_of_a_gpu_are_those_of_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    current, streams = "compute", []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None: ...

        def record(self, stream: str | None = None) -> None:
            streams.append(stream or current)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: current)
    line = Timeline(torch.device("cuda"), OUTER)
    current = "gathered weights"
    with line.within(INNER):
        pass
    assert streams == ["compute"] * 3
