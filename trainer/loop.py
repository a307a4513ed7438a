"""The training loop: micro-batches in, updates, scores and checkpoints out.

It knows a task (`begin_step`, `loss`, `metrics`), an engine and callbacks for what happens now and
then; pretraining and fine-tuning share it.
"""

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from types import FrameType
from typing import Protocol

import torch
import torch.distributed as dist

from cavmae.dataloaders.batch import AudioVideoBatch
from cavmae.trainer.engine import Engine
from cavmae.trainer.watchdog import Watchdog

log = logging.getLogger(__name__)

RETRIES_PER_INTERVAL = 10
"""A checkpoint that failed is tried again after this part of the steps between two."""


class Task(Protocol):
    """What a step computes."""

    def begin_step(self, engine: Engine, batches: list[AudioVideoBatch]) -> None: ...
    def loss(self, engine: Engine, batch: AudioVideoBatch) -> torch.Tensor: ...
    def metrics(self) -> dict[str, torch.Tensor]: ...


class Loader(Protocol):
    """Endless micro-batches, with the time that taking them has cost."""

    wait_seconds: float

    def __iter__(self) -> Iterator[AudioVideoBatch]: ...


class Saver(Protocol):
    """Writes checkpoints beside the steps; `open` and what `commit` returns are the same on all
    ranks."""

    failures: int

    @property
    def open(self) -> bool: ...
    @property
    def writing(self) -> bool: ...
    def begin(self, step: int) -> None: ...
    def commit(self) -> bool: ...


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
    saver: Saver,
    watchdog: Watchdog,
    device: torch.device,
) -> LoopOutcome:
    """Train from `start_step` to `steps`, or until SIGTERM; all ranks call it.

    The last step, and a step at which SIGTERM arrives, are always saved; the last step is always
    evaluated. A checkpoint that could not be written is tried again soon; none is begun in a row of
    updates that were left out, so that a run can go on from before them.

    Raises:
        OSError: the last checkpoint could not be written; those before it stay.
        NonFiniteError: `maximum_skipped_updates` updates in a row were left out. What was saved
            before stays.
    """
    batches = iter(loader)
    skipped = skipped_in_a_row = 0
    since, since_step, waited = time.monotonic(), start_step, loader.wait_seconds
    step, save_again = start_step, -1
    if step >= steps:  # killed after its last checkpoint: the scores are still to be told
        evaluate(step)
    with _StopSignal() as stop_signal, closing(watchdog):
        while step < steps:
            watchdog.step()
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
            means, (stops, writers) = _over_ranks(
                task.metrics() if due or not update.applied else {},
                (stop_signal.received, saver.writing),
                device,
            )
            if saver.open and not writers and not saver.commit():
                save_again = step + max(1, save_every // RETRIES_PER_INTERVAL)
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
                            "checkpoint_failures": float(saver.failures),
                            "data_wait_share": (loader.wait_seconds - waited) / seconds,
                        },
                    )
                )
                since, since_step, waited = now, step, loader.wait_seconds
            if step % evaluate_every == 0 or last:
                with watchdog.pause():
                    evaluate(step)
            if step % save_every == 0 or step == save_again or last or stops:
                if skipped_in_a_row and not (last or stops):
                    save_again = step + 1
                else:
                    with watchdog.pause():
                        saver.begin(step)
            if last or stops:
                with watchdog.pause():
                    _commit_last(saver, step)
            if stops and not last:
                return LoopOutcome(step, stopped=True, skipped_updates=skipped)
    return LoopOutcome(step, stopped=False, skipped_updates=skipped)


def _commit_last(saver: Saver, step: int) -> None:
    if not saver.commit():
        raise OSError(
            f"the checkpoint of step {step}, the last of this start, could not be written (the log "
            "has the reason); make room and start again: the run goes on from the one before"
        )


def _over_ranks(
    metrics: dict[str, torch.Tensor], flags: tuple[bool, ...], device: torch.device
) -> tuple[dict[str, float], list[int]]:
    """Means of the metrics, and on how many ranks each flag is set, in one small reduction."""
    names = sorted(metrics)
    values = [metrics[name].double() for name in names]
    counts = torch.tensor(flags, device=device, dtype=torch.float64)
    total = torch.cat([torch.stack(values), counts]) if values else counts
    dist.all_reduce(total)
    sums = total.tolist()
    world_size = dist.get_world_size()
    means = {name: value / world_size for name, value in zip(names, sums, strict=False)}
    return means, [int(count) for count in sums[len(names) :]]


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
