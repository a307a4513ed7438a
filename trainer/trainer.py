"""The training loop: micro-batches in, updates, scores and checkpoints out.

It knows a task (`begin_step`, `loss`, `metrics`), an engine and callbacks for what happens now and
then; pretraining and fine-tuning share it.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch.profiler import record_function

from cavmae.dataloaders.batch import AudioVideoBatch
from cavmae.trainer.distributed.engine import Engine
from cavmae.trainer.fault_tolerance.preemption import StopRequest
from cavmae.trainer.fault_tolerance.stragglers import RankTimer, StragglerReport
from cavmae.trainer.fault_tolerance.watchdog import Watchdog
from cavmae.trainer.tracking.profiler import StepProfile

log = logging.getLogger(__name__)

RETRIES_PER_INTERVAL = 10
"""A checkpoint that failed is tried again after this part of the steps between two."""


class Task(Protocol):
    """What a step computes; `description` is for the log."""

    @property
    def description(self) -> str: ...
    def begin_step(self, engine: Engine, batches: list[AudioVideoBatch]) -> None: ...
    def loss(self, engine: Engine, batch: AudioVideoBatch) -> torch.Tensor: ...
    def metrics(self) -> dict[str, torch.Tensor]: ...


class Loader(Protocol):
    """Endless micro-batches, with the time that taking them has cost."""

    wait_seconds: float

    def __iter__(self) -> Iterator[AudioVideoBatch]: ...


class Saver(Protocol):
    """Writes checkpoints beside the steps; `is_open` and what `commit` returns are the same on all
    ranks."""

    failures: int

    @property
    def is_open(self) -> bool: ...
    @property
    def is_writing(self) -> bool: ...
    def begin(self, step: int) -> None: ...
    def commit(self) -> bool: ...


@dataclass(frozen=True)
class LoopOutcome:
    """Attributes: step, optimizer steps done; stopped, why the run was asked to leave early, empty
    where it was not; skipped_updates, steps whose loss or gradient was not finite."""

    step: int
    stopped: str
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
    max_skipped_updates: int,
    report_every: int,
    report: Callable[[int, dict[str, float]], None],
    evaluate_every: int,
    evaluate: Callable[[int], None],
    end_step: Callable[[int], None],
    save_every: int,
    saver: Saver,
    stop: StopRequest,
    rank_timer: RankTimer,
    stragglers: StragglerReport,
    watchdog: Watchdog,
    profile: StepProfile,
    device: torch.device,
) -> LoopOutcome:
    """Train from `start_step` to `steps`, or until a rank is asked to leave; all ranks call it.

    The last step, and a step at which the ranks are asked to leave, are always saved; the last step
    is always evaluated. A checkpoint that could not be written is tried again soon; none is begun
    in a row of updates that were left out, so that a run can go on from before them.

    Raises:
        OSError: the last checkpoint could not be written; those before it stay.
        NonFiniteError: `max_skipped_updates` updates in a row were left out. What was saved
            before stays.
    """
    batches = iter(loader)
    skipped = skipped_in_a_row = 0
    since, since_step, waited = time.monotonic(), start_step, loader.wait_seconds
    step, save_again = start_step, -1
    if step >= steps:  # killed after its last checkpoint: the scores are still to be told
        evaluate(step)
    with stop, closing(profile), closing(watchdog):  # no step is watched while a trace is written
        while step < steps:
            watchdog.step()
            rank_timer.step()
            with record_function("data wait"):
                parts = [next(batches).to(device) for _ in range(accumulation)]
            rank_timer.batch_ready()
            if engine.zero_stage == 3:
                rank_timer.before_sync()
            with record_function("begin step"):
                task.begin_step(engine, parts)
            for index, part in enumerate(parts):
                with record_function("forward"):
                    loss = task.loss(engine, part)
                rank_timer.before_sync()
                with record_function("backward"):
                    engine.backward(loss)
                    if index + 1 < len(parts):
                        engine.accumulate()
            rate = learning_rate(step)
            with record_function("update"):
                update = engine.update(rate)
            step += 1

            skipped_in_a_row = 0 if update.applied else skipped_in_a_row + 1
            skipped += not update.applied
            last = step == steps
            due = step % report_every == 0 or last
            means, (stops, writers), own_seconds = _over_ranks(
                task.metrics() if due or not update.applied else {},
                (bool(stop.reason), saver.is_writing),
                rank_timer.take() if due else None,
                device,
            )
            if stops:
                stop.start_budget()
            if saver.is_open and not writers and not saver.commit():
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
                if skipped_in_a_row >= max_skipped_updates:
                    raise NonFiniteError(
                        f"{skipped_in_a_row} updates in a row were not finite, up to step {step}; "
                        "lower optimizer.learning_rate, set engine.clip_grad_norm, or raise "
                        "engine.max_skipped_updates"
                    )
            if due:
                now = time.monotonic()
                seconds = max(now - since, 1e-9)
                report(
                    step,
                    means
                    | {
                        "gradient_norm": update.gradient_norm,
                        "learning_rate": rate,
                        "skipped_updates": float(skipped),
                        "samples_per_second": (step - since_step) * global_batch / seconds,
                        "checkpoint_failures": float(saver.failures),
                        "data_wait_share": (loader.wait_seconds - waited) / seconds,
                    }
                    | stragglers.look(own_seconds, seconds / (step - since_step)),
                )
                since, since_step, waited = now, step, loader.wait_seconds
            end_step(step)
            if stops and not last and step % evaluate_every == 0:
                log.warning("the evaluation of step %d is left out", step)
            elif step % evaluate_every == 0 or last:
                with watchdog.pause(), record_function("evaluation"):
                    evaluate(step)
            if step % save_every == 0 or step == save_again or last or stops:
                if skipped_in_a_row and not (last or stops):
                    save_again = step + 1
                else:
                    with watchdog.pause(), record_function("checkpoint"):
                        saver.begin(step)
            if last or stops:
                with watchdog.pause():
                    _commit_last(saver, step)
            if profile.ends:
                with watchdog.pause():
                    profile.step()
                    dist.barrier()  # else the next step waits for the rank that writes longest
            else:
                profile.step()
            if stops and not last:
                return LoopOutcome(step, _first_reason(stop), skipped)
    return LoopOutcome(step, "", skipped)


def _commit_last(saver: Saver, step: int) -> None:
    if not saver.commit():
        raise OSError(
            f"the checkpoint of step {step}, the last of this start, could not be written (the log "
            "has the reason); make room and start again: the run goes on from the one before"
        )


def _over_ranks(
    metrics: dict[str, torch.Tensor],
    flags: tuple[bool, ...],
    own_seconds: float | None,
    device: torch.device,
) -> tuple[dict[str, float], list[int], list[float]]:
    """Means of the metrics, on how many ranks each flag is set, and each rank's own seconds (none
    where they are None), in one small reduction."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    names = sorted(metrics)
    seconds = torch.zeros(0 if own_seconds is None else world_size, dtype=torch.float64)
    if own_seconds is not None:
        seconds[rank] = own_seconds
    values = [metrics[name].double().reshape(1) for name in names]
    counts = torch.tensor(flags, dtype=torch.float64)
    total = torch.cat([*values, counts.to(device), seconds.to(device)])
    dist.all_reduce(total)
    sums = total.tolist()
    means = {name: value / world_size for name, value in zip(names, sums, strict=False)}
    after = len(names) + len(flags)
    return means, [int(count) for count in sums[len(names) : after]], sums[after:]


def _first_reason(stop: StopRequest) -> str:
    """Of the first rank that has one; it may have reached the others later."""
    reasons = [""] * dist.get_world_size()
    dist.all_gather_object(reasons, stop.reason)
    return next(filter(None, reasons))
