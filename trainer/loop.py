"""The training loop: micro-batches in, updates, scores and checkpoints out.

It knows a task (`begin_step`, `loss`, `metrics`), an engine and callbacks for what happens now and
then; pretraining and fine-tuning share it.
"""

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Protocol

import torch
import torch.distributed as dist

from cavmae.dataloaders.batch import AudioVideoBatch
from cavmae.trainer.engine import Engine

log = logging.getLogger(__name__)


class Task(Protocol):
    """What a step computes."""

    def begin_step(self, engine: Engine, batches: list[AudioVideoBatch]) -> None: ...
    def loss(self, engine: Engine, batch: AudioVideoBatch) -> torch.Tensor: ...
    def metrics(self) -> dict[str, torch.Tensor]: ...


class Loader(Protocol):
    """Endless micro-batches, with the time that taking them has cost."""

    wait_seconds: float

    def __iter__(self) -> Iterator[AudioVideoBatch]: ...


@dataclass(frozen=True)
class StepReport:
    """Attributes: step, optimizer steps done; metrics, means over ranks of that step, with
    `samples_per_second` and `data_wait_share` since the last report."""

    step: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class LoopOutcome:
    """Attributes: step, optimizer steps done; stopped, True where SIGTERM ended the run early;
    skipped_updates, steps whose loss or gradient was not finite."""

    step: int
    stopped: bool
    skipped_updates: int


class NonFiniteError(RuntimeError):
    """Too many updates in a row had a loss or gradient that is not finite."""


def train(
    engine: Engine,
    task: Task,
    loader: Loader,
    *,
    start_step: int,
    steps: int,
    accumulation: int,
    global_batch: int,
    learning_rate: Callable[[int], float],
    maximum_skipped_updates: int,
    report_every: int,
    report: Callable[[StepReport], None],
    evaluate_every: int,
    evaluate: Callable[[int], None],
    save_every: int,
    save: Callable[[int], None],
    device: torch.device,
) -> LoopOutcome:
    """Train from `start_step` to `steps`, or until SIGTERM; all ranks call it.

    The last step, and a step at which SIGTERM arrives, are always saved; the last step is always
    evaluated.

    Raises:
        NonFiniteError: `maximum_skipped_updates` updates in a row were left out. What was saved
            before stays.
    """
    batches = iter(loader)
    skipped = skipped_in_a_row = 0
    since, since_step, waited = time.monotonic(), start_step, loader.wait_seconds
    step = start_step
    if step >= steps:  # killed after its last checkpoint: the scores are still to be told
        evaluate(step)
    with _StopSignal() as stop_signal:
        while step < steps:
            parts = [next(batches).to(device) for _ in range(accumulation)]
            task.begin_step(engine, parts)
            for index, part in enumerate(parts):
                engine.backward(task.loss(engine, part))
                if index + 1 < len(parts):
                    engine.count_micro_batch()
            rate = learning_rate(step)
            update = engine.update(rate)
            step += 1

            skipped_in_a_row = 0 if update.applied else skipped_in_a_row + 1
            skipped += not update.applied
            last = step == steps
            due = step % report_every == 0 or last
            means, stop = _over_ranks(
                task.metrics() if due or not update.applied else {}, stop_signal.received, device
            )
            if not update.applied:
                log.warning(
                    "step %d: the loss (%s) or a gradient is not finite; the update is left out "
                    "(%d in a row, samples %s)",
                    step,
                    means["loss"],
                    skipped_in_a_row,
                    ", ".join(name for part in parts for name in part.sample_ids[:8]),
                )
                if skipped_in_a_row >= maximum_skipped_updates:
                    raise NonFiniteError(
                        f"{skipped_in_a_row} updates in a row were not finite, up to step {step}; "
                        "lower optimizer.learning_rate, set engine.clip_gradient_norm, or raise "
                        "engine.maximum_skipped_updates"
                    )
            if due:
                now = time.monotonic()
                seconds = max(now - since, 1e-9)
                report(
                    StepReport(
                        step,
                        means
                        | {
                            "gradient_norm": update.gradient_norm,
                            "learning_rate": rate,
                            "skipped_updates": float(skipped),
                            "samples_per_second": (step - since_step) * global_batch / seconds,
                            "data_wait_share": (loader.wait_seconds - waited) / seconds,
                        },
                    )
                )
                since, since_step, waited = now, step, loader.wait_seconds
            if step % evaluate_every == 0 or last:
                evaluate(step)
            if step % save_every == 0 or last or stop:
                save(step)
            if stop and not last:
                return LoopOutcome(step, stopped=True, skipped_updates=skipped)
    return LoopOutcome(step, stopped=False, skipped_updates=skipped)


def _over_ranks(
    metrics: dict[str, torch.Tensor], stop: bool, device: torch.device
) -> tuple[dict[str, float], bool]:
    """Means of the metrics, and whether any rank was told to stop, in one small reduction."""
    names = sorted(metrics)
    values = [metrics[name].double() for name in names]
    total = torch.stack([*values, torch.tensor(float(stop), device=device, dtype=torch.float64)])
    dist.all_reduce(total)
    *sums, stops = total.tolist()
    world_size = dist.get_world_size()
    return {name: value / world_size for name, value in zip(names, sums, strict=True)}, stops > 0


class _StopSignal:
    """Notes SIGTERM instead of dying of it, in the main thread; the starter's elsewhere."""

    def __init__(self) -> None:
        self.received = False

    def __enter__(self) -> "_StopSignal":
        self._installed = threading.current_thread() is threading.main_thread()
        if self._installed:
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._installed:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, _signal: int, _frame: FrameType | None) -> None:
        log.warning("SIGTERM: saving after this step")
        self.received = True
