"""The training loop with its calls labelled on a timeline: first as the loop sees them, for rates,
then by parts of the model."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import torch

from cavmae.benchmarks.harness.power import Energy, PowerMeter, power_meter
from cavmae.benchmarks.harness.process_memory import peak_bytes
from cavmae.benchmarks.harness.timeline import Label, Timeline
from cavmae.benchmarks.step.parts import REST, PartObserver, observe_collectives
from cavmae.dataloaders.batch import AudioVideoBatch
from cavmae.trainer.distributed.engine import Engine, Update
from cavmae.trainer.trainer import Loader, LoopOutcome, Task

DATA, LOOP, OPTIMIZER = Label("data wait"), Label("loop"), Label("optimizer")


class AllTimed(Exception):
    """All steps are timed; what else the run would do is left out."""


class TimedLoop:
    """Stands for the loop's `train`, and calls it.

    Args:
        train: of the loop.
        warm_up: steps that are not timed.
        steps: timed steps.
        part_steps: steps after those that are timed by parts.
    """

    def __init__(
        self, train: Callable[..., LoopOutcome], *, warm_up: int, steps: int, part_steps: int
    ) -> None:
        self._train = train
        self._first, self._end = warm_up, warm_up + steps
        self._part_steps = part_steps
        self._observer: PartObserver | None = None
        self._updated = True  # the next batch is the first of a step
        self._done = 0

    def train(
        self, engine: Engine, task: Task, loader: Loader, *, device: torch.device, **options: Any
    ) -> LoopOutcome:
        """Train as the loop does; raises AllTimed."""
        self._device, self._engine = device, engine
        self._timeline = Timeline(device, LOOP)
        self._meter: PowerMeter = power_meter(device)
        # These objects alone, in this process alone.
        engine.backward = self._backward(engine.backward)
        engine.update = self._update(engine.update)
        forward = Label(REST, "forward")
        task.begin_step = self._timeline.during(forward, task.begin_step)
        task.loss = self._timeline.during(forward, task.loss)
        batches = _LabelledBatches(loader, self)
        return self._train(engine, task, batches, device=device, **options)

    def _backward(self, inner: Callable[..., None]) -> Callable[..., None]:
        def backward(loss: torch.Tensor) -> None:
            parts = self._observer.backward(loss) if self._observer else nullcontext()
            with self._timeline.within(Label(REST, "backward")), parts:
                inner(loss)

        return backward

    def _update(self, inner: Callable[..., Update]) -> Callable[..., Update]:
        def update(learning_rate: float) -> Update:
            with self._timeline.within(OPTIMIZER):
                done = inner(learning_rate)
            self._updated = True
            self._done += 1
            return done

        return update

    def waits_for_batch(self) -> None:
        """The loop is about to ask for a batch."""
        if not self._updated:
            self._timeline.switch(DATA)
            return
        self._updated = False
        if self._done == self._first:
            self._meter.start()
        if self._done == self._end:
            # What follows takes time, so it is in a step of its own that `results` leaves out.
            self._timeline.begin_step(LOOP)
            self._energy: Energy = self._meter.stop()
            self._peak_bytes = peak_bytes(self._device)
            if self._part_steps:
                self._observer = PartObserver(self._engine.module, self._timeline)
                observe_collectives(self._timeline)
        self._timeline.begin_step(DATA)
        if self._done == self._end + self._part_steps:
            if self._observer:
                self._observer.check()
            raise AllTimed

    def has_batch(self) -> None:
        """The batch has come."""
        self._timeline.switch(LOOP)

    def results(self) -> dict[str, Any]:
        """What was found, as JSON values: seconds of each timed step by part and kind; the same of
        the steps by parts; energy and most memory of the timed steps."""
        seconds = [_as_json(step) for step in self._timeline.seconds()]
        return {
            "steps": seconds[self._first : self._end],
            "part_steps": seconds[self._end + 1 :],
            "energy": asdict(self._energy),
            "peak_memory_bytes": self._peak_bytes,
        }


class _LabelledBatches:
    """A loader whose batches are waited for on the timeline."""

    def __init__(self, loader: Loader, timed: TimedLoop) -> None:
        self._loader, self._timed = loader, timed

    @property
    def wait_seconds(self) -> float:
        """Of the loader."""
        return self._loader.wait_seconds

    def __iter__(self) -> Iterator[AudioVideoBatch]:
        batches = iter(self._loader)
        while True:
            self._timed.waits_for_batch()
            batch = next(batches)
            self._timed.has_batch()
            yield batch


def _as_json(step: dict[Label, float]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for label, seconds in step.items():
        found.setdefault(label.part, {})[label.kind] = seconds
    return found
