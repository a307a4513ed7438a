"""The training loop of every run: micro-batches in, updates, scores and checkpoints out."""

import dataclasses
import itertools
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.profiler import record_function

from cavmae.atomic_write import write_json
from cavmae.dataloaders.batch import AudioVideoBatch
from cavmae.dataloaders.config import ClipShape
from cavmae.dataloaders.loading.loader import TrainLoader
from cavmae.dataloaders.loading.quarantine import Journal, journal_folder
from cavmae.trainer.checkpoint.format import RunState, list_checkpoints
from cavmae.trainer.checkpoint.load import load_newest
from cavmae.trainer.checkpoint.save import CheckpointSaver
from cavmae.trainer.checkpoint.weight_average import EpochWeights, save_weights
from cavmae.trainer.config.configs import FinetuneConfig, PretrainConfig
from cavmae.trainer.config.resolve import step_shares
from cavmae.trainer.cost_model.run_rates import RunRates, Span
from cavmae.trainer.distributed.collectives import on_all_ranks, on_first_rank, reduce_step
from cavmae.trainer.distributed.engine import Engine, Update
from cavmae.trainer.fault_tolerance.lease import TakenOverError
from cavmae.trainer.fault_tolerance.preemption import StopRequest
from cavmae.trainer.fault_tolerance.stragglers import RankTimer, StragglerMonitor
from cavmae.trainer.fault_tolerance.watchdog import Watchdog
from cavmae.trainer.lr_schedule import learning_rate
from cavmae.trainer.run_dir import OpenRun
from cavmae.trainer.run_summary import RunSummary
from cavmae.trainer.tasks.build_model import configure_blocks
from cavmae.trainer.tasks.finetune import FinetuneTask
from cavmae.trainer.tasks.labels import open_labels
from cavmae.trainer.tasks.pretrain import PretrainTask
from cavmae.trainer.tasks.task import Loader, Task
from cavmae.trainer.tracking.profiler import StepProfile
from cavmae.trainer.tracking.run_logger import RunLogger
from cavmae.trainer.validator import Validator

log = logging.getLogger(__name__)

RETRIES_PER_INTERVAL = 10
"""A failed checkpoint is retried after this part of the steps between two."""


class NonFiniteError(RuntimeError):
    """Too many updates in a row had a loss or gradient that is not finite."""


@dataclass(frozen=True)
class Hooks:
    """What benchmarks and tests put in place of a trainer's parts.

    Attributes:
        make_loader: called with the arguments of `TrainLoader`.
        wrap_task: gets the run's task and returns the one to train.
        span: context of a named part of a step: data wait, begin step, forward, backward, update,
            validation, checkpoint.
    """

    make_loader: Callable[..., Loader] = TrainLoader
    wrap_task: Callable[[Task], Task] = lambda task: task
    span: Span = record_function


class Trainer:
    """One attempt of a run on this rank; all ranks build one and call `train`.

    Args:
        opened: the run.
        notice: returns why the launcher wants this rank to save and stop, or an empty text.
        hooks: replaced parts.

    Attributes:
        step: optimizer steps done.
        skipped, skipped_in_a_row: updates of this attempt that were skipped as not finite.

    Raises:
        ValueError: the checkpoints, the initial weights or the data do not fit the configuration.
        OSError: checkpoints, labels or data can't be read.
    """

    def __init__(self, opened: OpenRun, notice: Callable[[], str], hooks: Hooks) -> None:
        config, ranks, device = opened.config, opened.ranks, opened.device
        run_dir, train_set = opened.run_dir, opened.train_set
        self.config, self.ranks, self.device, self.run_dir = config, ranks, device, run_dir
        self.status, self.lease = opened.status, opened.lease
        self.rates = RunRates(config, ranks.world_size, device, hooks.span)
        self.span = self.rates.span
        torch.manual_seed(config.seed)
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)

        self.timer = RankTimer(device)
        self.task = hooks.wrap_task(build_task(opened, self.timer.before_sync))
        model, groups = self.task.build_model()
        configure_blocks(model, config.engine)
        self.shares = step_shares(config, ranks.world_size)
        self.engine = Engine(
            model,
            config.engine,
            config.optimizer,
            micro_batch=config.micro_batch,
            accumulation=self.shares.accumulation,
            device=device,
            groups=groups,
        )
        checkpoint, state = load_newest(opened.store, self.engine) or ("", None)
        self.fingerprint = train_set.fingerprint
        if state and state.train_set != self.fingerprint:
            raise ValueError(
                f"the run in {run_dir} was trained on other clips than data.train "
                f"{config.data.train} now holds; give the former set, or another --run-dir"
            )
        self.resumed_from = checkpoint
        self.step = self.start_step = state.step if state else 0
        self.skipped = self.skipped_in_a_row = 0
        self.steps_per_epoch = train_set.samples / config.global_batch
        self.epoch_weights = EpochWeights(
            run_dir / "epoch-weights",
            first_epoch=config.average_from_epoch,
            steps=config.steps,
            steps_per_epoch=self.steps_per_epoch,
        )
        journal = Journal(journal_folder(run_dir))
        suspects = on_all_ranks(
            lambda: journal.unfinished(train_set, ranks.local_rank, ranks.local_world_size)
        )
        self.loader = hooks.make_loader(
            config.data,
            ClipShape(config.model.audio_frames, config.model.mel_bins, config.model.image_size),
            seed=config.seed,
            shares=self.shares,
            rank=ranks.rank,
            device=device,
            start_position=state.position if state else 0,
            quarantine=state.quarantine if state else (),
            journal=journal,
            suspects=itertools.chain.from_iterable(suspects),
        )
        journal.remove_left()
        self.quarantined = set(state.quarantine if state else ())
        self.logger = RunLogger(
            config,
            run_dir,
            ranks,
            start_step=self.start_step,
            steps_per_epoch=self.steps_per_epoch,
            device=device,
        )
        self.logger.log_start(self.task.description, train_set, resumed_from=checkpoint)
        self.validator = Validator(config, ranks, device, self.task.validate, self.logger)
        self.saver = CheckpointSaver(
            opened.store,
            config.checkpoint,
            self.engine,
            self._state_at,
            self.start_step,
            opened.attempt,
            self._before_commit,
        )
        self.retry_save_at = -1
        self.stop = StopRequest(
            run_dir if ranks.rank == 0 else None, config.checkpoint.grace_seconds, notice
        )
        self.stragglers = StragglerMonitor(
            config.watchdog.straggler_ratio, on_all_ranks(socket.gethostname)
        )
        self.watchdog = Watchdog(config.watchdog, run_dir / "hangs", ranks.rank)
        self.profiler = StepProfile(
            config.profile,
            run_dir / "profile",
            rank=ranks.rank,
            start_step=self.start_step,
            device=device,
        )

    def train(self) -> RunSummary:
        """Train to the last step, or until a stop is requested.

        Raises:
            OSError: the last checkpoint, or the final weights, could not be written; the
                checkpoints of before stay.
            TakenOverError: another start has taken the run over.
            NonFiniteError: `engine.max_skipped_updates` updates in a row were skipped; the
                checkpoints of before stay.
        """
        began = time.monotonic()
        self.status.running(self.step, self.resumed_from)
        with closing(self.watchdog):
            try:
                stopped = self._loop()
                with self.watchdog.pause():
                    weights = {} if stopped else self._final_weights()
            except TakenOverError:  # MLflow's run is the other start's as well
                raise
            except BaseException:
                self.logger.close("FAILED")
                raise
            finally:
                self.loader.close()
            with self.watchdog.pause():
                return self._finish(stopped, weights, time.monotonic() - began)

    def _finish(self, stopped: str, weights: dict[str, torch.Tensor], seconds: float) -> RunSummary:
        """Write the results, and end the records of the run."""
        samples = (self.step - self.start_step) * self.config.global_batch
        summary = RunSummary(
            run_dir=str(self.run_dir),
            step=self.step,
            steps=self.config.steps,
            stopped=stopped,
            skipped_updates=self.skipped,
            quarantined=len(self.loader.quarantine),
            seconds=seconds,
            samples_per_second=samples / max(seconds, 1e-9),
            scores=self.validator.scores,
            times=self.rates.seconds(self.loader.wait_seconds),
            tracking_uri=self.logger.tracking_uri,
            mlflow_run=self.logger.mlflow_run,
        )
        if not stopped:
            on_first_rank(lambda: self._write_results(weights, summary))
        elif self.ranks.rank == 0:
            self.stop.withdraw()
        self.logger.close("KILLED" if stopped else "FINISHED")
        if stopped:
            log.info(
                "Stopped at step %d/%d (%s). Rerun the same command to resume.",
                self.step,
                self.config.steps,
                stopped,
            )
        self.status.change("stopped" if stopped else "finished", reason=stopped)
        dist.barrier()
        return summary

    def _write_results(self, weights: dict[str, torch.Tensor], summary: RunSummary) -> None:
        try:
            save_weights(self.run_dir / "weights.pt", weights)
            write_json(self.run_dir / "summary.json", dataclasses.asdict(summary))
        except OSError as error:
            raise OSError(
                f"{error}: the last step is done and its checkpoint saved; free some space and "
                "rerun the same command, which writes the weights"
            ) from error

    def _loop(self) -> str:
        """Train until the last step or a stop request; returns the reason for the stop, if any.

        The last step of an attempt is always saved; the last step of a run is always validated. A
        checkpoint that could not be written is retried soon. None is begun while updates are being
        skipped, so that a run can be resumed from before them.
        """
        config = self.config
        batches = iter(self.loader)
        self.rates.begin(self.step, self.loader.wait_seconds)
        if self.step >= config.steps:  # killed after its last checkpoint, before its scores
            self.validator.score(self.engine.module, self.step)
        with self.stop, ExitStack() as end:
            end.callback(self._close_profiler)
            while self.step < config.steps:
                rate = learning_rate(
                    config.schedule,
                    config.optimizer.learning_rate,
                    step=self.step,
                    steps=config.steps,
                    steps_per_epoch=self.steps_per_epoch,
                )
                update, sample_ids = self._train_step(batches, rate)
                step, last = self.step, self.step == config.steps
                log_now = step % config.tracking.every_steps == 0 or last
                metrics = self.task.metrics() if log_now or not update.applied else {}
                if log_now:
                    metrics = metrics | {"gradient_norm": update.gradient_norm}
                means, (stops, writers, lost), busy_seconds = reduce_step(
                    metrics,
                    (bool(self.stop.reason), self.saver.is_writing, bool(self.lease.lost)),
                    self.timer.pop_mean() if log_now else None,
                    self.device,
                )
                if lost:
                    raise TakenOverError(on_first_rank(lambda: self.lease.lost))
                if stops:
                    self.stop.start_grace_period()
                    self.status.change("stopping", reason=self.stop.reason)
                if self.saver.is_open and not writers:
                    # Publishing, and deleting older ones.
                    with self.watchdog.pause(), self.span("checkpoint"):
                        committed = self.saver.commit()
                    if not committed:
                        every = config.checkpoint.every_steps
                        self.retry_save_at = step + max(1, every // RETRIES_PER_INTERVAL)
                if not update.applied:
                    self._check_skipped(means["loss"], sample_ids)
                if log_now:
                    rates = self.rates.metrics(step, self.loader.wait_seconds)
                    step_seconds = config.global_batch / rates["samples_per_second"]
                    self.logger.log_step(
                        step,
                        means
                        | {
                            "learning_rate": rate,
                            "skipped_updates": float(self.skipped),
                            "checkpoint_failures": float(self.saver.failures),
                        }
                        | rates
                        | self.stragglers.update(busy_seconds, step_seconds),
                    )
                self.epoch_weights.keep(self.engine, step)
                self._validate_and_save(stops=bool(stops), last=last)
                self._end_profiled_step()
                if stops and not last:
                    # Of the first rank that has one: it may reach the others later.
                    return next(filter(None, on_all_ranks(lambda: self.stop.reason)))
        return ""

    def _train_step(
        self, batches: Iterator[AudioVideoBatch], learning_rate: float
    ) -> tuple[Update, list[str]]:
        """Take one optimizer step; returns what it did, and ids of some of its samples."""
        self.watchdog.step()
        self.timer.begin_step()
        with self.span("data wait"):
            parts = [next(batches).to(self.device) for _ in range(self.shares.accumulation)]
        self.timer.batch_ready()
        if self.engine.zero_stage == 3:  # gathers weights in the forward pass
            self.timer.before_sync()
        with self.span("begin step"):
            self.task.begin_step(self.engine, parts)
        for index, part in enumerate(parts):
            with self.span("forward"):
                loss = self.task.loss(self.engine, part)
            self.timer.before_sync()
            with self.span("backward"):
                self.engine.backward(loss)
                if index + 1 < len(parts):
                    self.engine.accumulate()
        with self.span("update"):
            update = self.engine.update(learning_rate)
        self.step += 1
        self.status.step = self.step
        self.skipped += not update.applied
        self.skipped_in_a_row = 0 if update.applied else self.skipped_in_a_row + 1
        return update, [name for part in parts for name in part.sample_ids[:8]]

    def _check_skipped(self, loss: float, sample_ids: list[str]) -> None:
        """Warn of an update that was skipped; raises NonFiniteError after too many in a row."""
        log.warning(
            "step %d: the loss (%s) or a gradient is not finite; the update is skipped (%d in a "
            "row, samples %s)",
            self.step,
            loss,
            self.skipped_in_a_row,
            ", ".join(sample_ids),
        )
        if self.skipped_in_a_row < self.config.engine.max_skipped_updates:
            return
        what = f"{self.skipped_in_a_row} updates in a row were not finite, up to step {self.step}"
        weights = self.engine.full_state_dict()
        wrong = on_first_rank(
            lambda: [name for name, tensor in weights.items() if not tensor.isfinite().all()]
        )
        if wrong:
            start = self.resumed_from or self.config.initial_weights or "random weights"
            raise NonFiniteError(
                f"{what}, as the weights are not finite themselves: {len(wrong)} tensors, the "
                f"first {wrong[0]}, after {self.step - self.skipped_in_a_row} steps; this attempt "
                f"started from {start}: start from finite ones"
            )
        raise NonFiniteError(
            f"{what}; lower optimizer.learning_rate, set engine.clip_grad_norm, or raise "
            "engine.max_skipped_updates"
        )

    def _validate_and_save(self, *, stops: bool, last: bool) -> None:
        """Validate and save after a step, if it is due."""
        config, step = self.config, self.step
        if step % config.validation.every_steps == 0 or last:
            if stops and not last:
                log.warning("step %d: validation is skipped, as a stop is requested", step)
            else:
                with self.watchdog.pause(), self.span("validation"):
                    self.validator.score(self.engine.module, step)
        save = step % config.checkpoint.every_steps == 0 or step == self.retry_save_at
        if save and self.skipped_in_a_row and not (last or stops):
            self.retry_save_at = step + 1
        elif save or last or stops:
            with self.watchdog.pause(), self.span("checkpoint"):
                self.saver.begin(step)
        if last or stops:
            with self.watchdog.pause(), self.span("checkpoint"):
                if not self.saver.commit():
                    raise OSError(
                        f"the checkpoint of step {step}, the last of this attempt, could not be "
                        "written (the log has the reason); free some space and rerun the same "
                        "command: the run resumes from the checkpoint before"
                    )

    def _close_profiler(self) -> None:
        with self.watchdog.pause():  # a trace that the end cuts off is written
            self.profiler.close()

    def _end_profiled_step(self) -> None:
        if not self.profiler.ends:
            self.profiler.step()
            return
        with self.watchdog.pause():  # the trace is written
            self.profiler.step()
            dist.barrier()  # or the next step waits for the rank that writes longest

    def _before_commit(self) -> None:
        """Make sure, on the first rank, that the run is still this attempt's, and that the epochs
        before a checkpoint are on the disk."""
        self.lease.check()
        self.epoch_weights.write_waiting()

    def _state_at(self, step: int) -> RunState:
        """Collect what a checkpoint holds beside weights and optimizer; all ranks call it.

        Ranks exchange the clips that are new since the checkpoint before, next to nothing. All of
        them, not only the first: in a gather NCCL connects it to every other rank, while rings
        between all are there already.
        """
        own = {(item.sample_id, item.reason) for item in self.loader.quarantine}
        news = on_all_ranks(lambda: own - self.quarantined)
        self.quarantined = self.quarantined.union(*news)
        return RunState(
            step=step,
            position=step * self.config.global_batch,
            quarantine=tuple(sorted(self.quarantined)),
            train_set=self.fingerprint,
            world_size=self.ranks.world_size,
            zero_stage=self.config.engine.zero_stage,
            dtype=self.config.engine.dtype,
        )

    def _final_weights(self) -> dict[str, torch.Tensor]:
        """Gather the run's weights on rank 0: the last ones, or the mean of epochs, scored."""
        if not self.epoch_weights:
            return self.engine.full_state_dict()
        weights = self.epoch_weights.mean()
        if self.validator.enabled:
            model, _ = self.task.build_model()
            if self.ranks.rank == 0:
                model.load_state_dict(weights)
            model.to(self.device)
            for parameter in model.parameters():
                dist.broadcast(parameter.data, src=0)
            self.validator.score(model, self.step, "averaged")
        return weights


def build_task(opened: OpenRun, before_sync: Callable[[], None]) -> Task:
    """Build the task of a run; the first rank keeps the classes of fine-tuning in its folder.

    Args:
        opened: the run.
        before_sync: called when this rank is about to wait for others in a forward pass.
    """
    config = opened.config
    if isinstance(config, FinetuneConfig):
        labels = on_first_rank(
            lambda: open_labels(config, opened.run_dir, begun=bool(list_checkpoints(opened.store)))
        )
        return FinetuneTask(config, labels, opened.ranks, opened.device)
    assert isinstance(config, PretrainConfig)
    return PretrainTask(config, opened.ranks, opened.device, before_sync)
