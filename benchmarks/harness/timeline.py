"""A timeline of a device over the steps of a run: every moment belongs to exactly one label.

So the labels of a step sum to the step. A label begins with a time stamp: on a GPU an event in the
stream that was current when the timeline was made, for which nothing waits; on a CPU its clock.
Work of other streams at the same time counts to no label.
"""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch


class Label(NamedTuple):
    """Attributes: part of a step; kind, `forward` or `backward`, or `step` for neither."""

    part: str
    kind: str = "step"


class Timeline:
    """Labels the moments of a run, step by step.

    Args:
        device: device whose time is labelled.
        first: label until the first switch.
    """

    def __init__(self, device: torch.device, first: Label) -> None:
        self._device = device
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._starts: list[int] = []
        self._marks: list[tuple[float | torch.cuda.Event, Label]] = []
        self.label = first
        self.switch(first)

    def begin_step(self, label: Label) -> None:
        """Begin a step with a label; end the one before, if any."""
        self._starts.append(len(self._marks))
        self.switch(label)

    def switch(self, label: Label) -> None:
        """Label the time from now on."""
        self.label = label
        self._marks.append((self._now(), label))

    def _now(self) -> float | torch.cuda.Event:
        if self._stream is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)  # a library may have made another stream current
        return event

    @contextmanager
    def within(self, label: Label) -> Iterator[None]:
        """Label the time within, then restore the label before."""
        before = self.label
        self.switch(label)
        try:
            yield
        finally:
            self.switch(before)

    def seconds(self) -> list[dict[Label, float]]:
        """Return the seconds of each step that has ended, by label; wait for the device."""
        if self._stream is not None:
            torch.cuda.synchronize(self._device)
        found = []
        for first, after in zip(self._starts, self._starts[1:], strict=False):
            spent: dict[Label, float] = defaultdict(float)
            for place in range(first, after):
                mark, label = self._marks[place]
                spent[label] += _between(mark, self._marks[place + 1][0])
            found.append(dict(spent))
        return found


def _between(mark: float | torch.cuda.Event, later: float | torch.cuda.Event) -> float:
    if isinstance(mark, torch.cuda.Event):
        assert isinstance(later, torch.cuda.Event)
        return mark.elapsed_time(later) / 1e3
    assert not isinstance(later, torch.cuda.Event)
    return later - mark
