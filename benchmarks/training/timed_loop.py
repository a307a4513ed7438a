"""The training loop with the spans of its steps on a timeline: first as the loop sees them, for
rates, then by parts of the model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import Any, cast

import torch

from cavmae.benchmarks.harness.power import Energy, power_meter
from cavmae.benchmarks.harness.timeline import Label, Timeline
from cavmae.benchmarks.step.parts import REST, PartObserver, observe_collectives
from cavmae.benchmarks.training.timed_plan import TimedPlan
from cavmae.dataloaders.batch import AudioVideoBatch
from cavmae.dataloaders.loading.loader import TrainLoader
from cavmae.trainer.cost_model.run_rates import peak_bytes
from cavmae.trainer.distributed.engine import Engine
from cavmae.trainer.tasks.task import Loader, Task
from cavmae.trainer.trainer import Hooks

DATA, LOOP, OPTIMIZER = Label("data wait"), Label("loop"), Label("optimizer")
_SPANS = {
    "begin step": Label(REST, "forward"),
    "forward": Label(REST, "forward"),
    "backward": Label(REST, "backward"),
    "update": OPTIMIZER,
}


Step = dict[str, dict[str, float]]
"""Seconds of a timed step by part and kind."""


def step_total(step: Step) -> float:
    """Return the seconds of a step."""
    return sum(seconds for kinds in step.values() for seconds in kinds.values())


class AllTimed(Exception):
    """All steps are timed; the rest of the run is skipped."""


class TimedLoop:
    """Times the steps of a trainer through its hooks, which raise AllTimed after the last one.

    Args:
        device: this rank's device.
        plan: the steps to time.
    """

    def __init__(self, device: torch.device, plan: TimedPlan) -> None:
        self._device = device
        self._first, self._end = plan.warm_up, plan.warm_up + plan.steps
        self._part_steps = plan.part_steps
        self._timeline = Timeline(device, LOOP)
        self._meter = power_meter(device)
        self._observer: PartObserver | None = None
        self._done = 0

    def hooks(self, make_loader: Callable[..., Loader] = TrainLoader) -> Hooks:
        """Return the trainer's hooks.

        Args:
            make_loader: makes the loader.
        """
        return Hooks(make_loader, self._wrap_task, self.span)

    def _wrap_task(self, task: Task) -> Task:
        self._task = _RememberedTask(task)
        return cast(Task, self._task)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Label a part of a step."""
        if name == "data wait":
            self._begin_step()
            yield
            self._timeline.switch(LOOP)
            return
        if name not in _SPANS:
            yield
            return
        parts = nullcontext()
        if name == "backward" and self._observer:
            parts = self._observer.backward(self._task.last_loss)
        with self._timeline.within(_SPANS[name]), parts:
            yield
        self._done += name == "update"

    def _begin_step(self) -> None:
        if self._done == self._first:
            self._meter.start()
        if self._done == self._end:
            # What follows takes time, so it is in a step of its own that `results` skips.
            self._timeline.begin_step(LOOP)
            self._energy: Energy = self._meter.stop()
            self._peak_bytes = peak_bytes(self._device)
            if self._part_steps:
                self._observer = PartObserver(self._task.engine.module, self._timeline)
                observe_collectives(self._timeline)
        self._timeline.begin_step(DATA)
        if self._done == self._end + self._part_steps:
            if self._observer:
                self._observer.check()
            raise AllTimed

    def results(self) -> dict[str, Any]:
        """Return JSON values: seconds of each timed step by part and kind, the same of the steps by
        parts, and energy and peak memory of the timed steps."""
        seconds = [_as_json(step) for step in self._timeline.seconds()]
        return {
            "steps": seconds[self._first : self._end],
            "part_steps": seconds[self._end + 1 :],
            "energy": asdict(self._energy),
            "peak_memory_bytes": self._peak_bytes,
        }


class _RememberedTask:
    """A task that remembers its engine and its last loss."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self.engine: Engine
        self.last_loss: torch.Tensor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def loss(self, engine: Engine, batch: AudioVideoBatch) -> torch.Tensor:
        self.engine, self.last_loss = engine, self._task.loss(engine, batch)
        return self.last_loss


def _as_json(step: dict[Label, float]) -> Step:
    found: Step = {}
    for label, seconds in step.items():
        found.setdefault(label.part, {})[label.kind] = seconds
    return found
