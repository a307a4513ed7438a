"""Training on a Ray cluster: `cavmae train RECIPE [--workers 8] [--field value ...]`.

Ray places the ranks and reports when one fails; this driver then decides whether and when they are
started again (`restarts.py`). A rank runs `cavmae.trainer.run` and resumes from the checkpoints of
the run folder, never from Ray's last report.
"""

import dataclasses
import os
import secrets
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from cavmae.cluster.config import RAY_KINDS, RayRunConfig, without_cluster
from cavmae.cluster.connection import (
    absolute_path,
    address_of,
    connected,
    node_slots,
    release_reservations,
    report_shortage,
)
from cavmae.cluster.restarts import End, Failure, RestartPolicy, check_run_folder
from cavmae.cluster.status_relay import StatusRelay
from cavmae.command import exit_code
from cavmae.credentials import redacted
from cavmae.dataloaders.sampling.step_shares import check_ranks
from cavmae.dataloaders.shards.shard_set import ShardSet
from cavmae.trainer.checkpoint.format import checkpoint_folder, list_checkpoints, step_of
from cavmae.trainer.checkpoint.store import Store
from cavmae.trainer.config.parse import parse
from cavmae.trainer.fault_tolerance.lease import OWNER_VARIABLE
from cavmae.trainer.fault_tolerance.preemption import (
    SIGTERM,
    START_AGAIN_EXIT_CODE,
    request_stop,
    requested_stop,
    withdraw_request,
)
from cavmae.trainer.run import MakeHooks
from cavmae.trainer.run_status import LauncherStatus, RunStatus, read_status
from cavmae.trainer.run_summary import RunSummary
from cavmae.trainer.tracking.code_snapshot import started_by
from cavmae.trainer.tracking.sqlite_uri import sqlite_file, sqlite_uri

_PATH_FIELDS = (
    *("run_dir", "initial_weights", "data.validation", "checkpoint.folder", "tracking.uri"),
    *("cluster.storage", "classifier.labels"),
)
_EXTRA_GRACE_SECONDS = 4.0
"""The driver waits this much longer than the ranks' own limit, as they may be starting."""
IN_RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray sets it for the drivers of its jobs."""
RETRIED = "CAVMAE_RETRIED"
"""Set to 1 by a launcher that runs a failed command again by itself."""


class TrainingError(RuntimeError):
    """The ranks failed more often than allowed."""


def main(arguments: list[str], make_hooks: MakeHooks | None = None) -> int:
    """Run the command; returns its exit code.

    Args:
        arguments: words after the command.
        make_hooks: see `cavmae.trainer.run.run`; pickled for the ranks.
    """
    config = parse(arguments, RAY_KINDS, "cavmae train")
    if config.cluster.dry_run:
        from cavmae.cluster.dry_run import dry_run

        return dry_run(config)
    with StatusRelay(Path(config.run_dir)):
        summary = train_on_ray(config, make_hooks)
    print(f"{summary.run_dir}: step {summary.step} of {summary.steps}", file=sys.stderr)
    # KubeRay starts a job again that ends with an error: one that a person has stopped must not.
    is_done = not summary.stopped or (IN_RAY_JOB in os.environ and summary.stopped != SIGTERM)
    return 0 if is_done else START_AGAIN_EXIT_CODE


def train_on_ray(config: RayRunConfig, make_hooks: MakeHooks | None = None) -> RunSummary:
    """Train to the end, restarts included; returns rank 0's summary.

    Raises:
        ValueError, OSError: an error that the user has to fix, of the driver or of any rank.
        TrainingError: the ranks failed for good.
    """
    cluster, run_dir = config.cluster, Path(config.run_dir)
    with LauncherStatus(run_dir) as status:
        check_run(config)
        again = started_again(run_dir)
        if not address_of(cluster) and not again:
            ShardSet(config.data.train_folders)  # fail on a wrong path before Ray is started
        withdraw_request(run_dir)  # of an earlier attempt
        threads = config.threads_per_rank or cluster.cpus_per_worker
        policy = RestartPolicy(cluster.max_failures, cluster.outage_hours * 3600, has_trained=again)
        with connected(cluster, threads) as working_folder:
            resolved = with_absolute_paths(config, working_folder)
            resolved = dataclasses.replace(resolved, threads_per_rank=threads)
            budget = config.checkpoint.grace_seconds
            with _sigterm_requests_stop(Path(resolved.run_dir), budget) as signals:
                return _Driver(resolved, make_hooks, policy, status, signals).train()


def started_again(run_dir: Path) -> bool:
    """Return whether a launcher, not a person, has run this command again after it had trained."""
    status = None
    with suppress(OSError, ValueError):
        status = read_status(run_dir)
    if int(os.environ.get("SLURM_RESTART_COUNT") or 0):
        return status is None or status.step > 0  # None: the file system is away
    return os.environ.get(RETRIED) == "1" and status is not None and status.step > 0


def check_run(config: RayRunConfig) -> None:
    """Refuse now what the ranks would refuse later.

    Raises:
        ValueError: there are no data, or more ranks than samples in a step.
    """
    check_ranks(config.global_batch, config.cluster.workers)
    if not config.data.train_folders:
        raise ValueError("data.train is empty; give the folder of a packed tier, e.g. shards/video")


def checked_job(words: list[str], program: str) -> RayRunConfig:
    """Parse the arguments of `cavmae train`, and refuse now what a job would refuse in an hour.

    Raises:
        ValueError: they are not a run, or a path is relative to this folder.
    """
    config = parse(words, RAY_KINDS, program)
    check_run(config)
    with_absolute_paths(config, None)
    return config


@contextmanager
def _sigterm_requests_stop(run_dir: Path, budget_seconds: float) -> Iterator[list[int]]:
    """On SIGTERM, request that the ranks save and stop, and end the driver if they exceed the
    budget. Outside the main thread this does nothing.

    Yields the received signals: ranks that are stopping for another reason forget this one.
    """
    signals: list[int] = []

    def request(number: int, _frame: FrameType | None) -> None:
        signals.append(number)
        print("SIGTERM: stop requested; the ranks save and stop", file=sys.stderr, flush=True)
        if run_dir.is_dir():
            request_stop(run_dir, SIGTERM)
        if budget_seconds:
            signal.setitimer(signal.ITIMER_REAL, budget_seconds + _EXTRA_GRACE_SECONDS)

    def end(_signal: int, _frame: FrameType | None) -> None:
        raise TrainingError(
            f"SIGTERM, and the ranks did not stop within {budget_seconds + _EXTRA_GRACE_SECONDS:g} "
            "s; rerun the same command to resume from the newest checkpoint"
        )

    try:
        before = [signal.signal(signal.SIGTERM, request), signal.signal(signal.SIGALRM, end)]
    except ValueError:
        yield signals
        return
    try:
        yield signals
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in zip((signal.SIGTERM, signal.SIGALRM), before, strict=True):
            signal.signal(number, handler)


def with_absolute_paths(config: RayRunConfig, folder: Path | None) -> RayRunConfig:
    """Make all paths absolute, as the ranks have another working directory.

    Args:
        config: its paths are relative to `folder`, or absolute.
        folder: the user's working directory; None in a Ray job, whose own is a temporary copy.

    Raises:
        ValueError: a path is relative in a Ray job.
    """

    def absolute(name: str, path: str) -> str:
        if database := sqlite_file(path):
            return sqlite_uri(Path(absolute_path(name, str(database), folder)))
        return absolute_path(name, path, folder)

    data = dataclasses.replace(
        config.data,
        train=",".join(absolute("data.train", one) for one in config.data.train_folders),
        cache_folder=absolute("data.cache_folder", config.data.cache.folder),
    )
    config = dataclasses.replace(config, data=data)
    for name in _PATH_FIELDS:
        group, _, field = name.rpartition(".")
        owner: Any = getattr(config, group, None) if group else config
        if owner is not None:
            owner = dataclasses.replace(owner, **{field: absolute(name, getattr(owner, field))})
            config = dataclasses.replace(config, **{group: owner}) if group else owner
    return config


class _Driver:
    """Starts the ranks of a run as often as it takes.

    Args:
        config: its paths are absolute.
        make_hooks: see `main`.
        policy: decides after each failure.
        status: of the run.
        signals: those that this process has received.
    """

    def __init__(
        self,
        config: RayRunConfig,
        make_hooks: MakeHooks | None,
        policy: RestartPolicy,
        status: LauncherStatus,
        signals: list[int],
    ) -> None:
        self._config = config
        self._make_hooks = make_hooks
        self._policy = policy
        self._status = status
        self._signals = signals
        self._run_dir = Path(config.run_dir)
        # An attempt takes over at once from those before it.
        self._owner = os.environ.get(OWNER_VARIABLE) or secrets.token_hex(8)

    def train(self) -> RunSummary:
        """Train to the end or a stop.

        Raises:
            ValueError, TrainingError: the run ends here.
        """
        from cavmae.cluster.elastic import MORE_FIT
        from cavmae.cluster.worker import NODE_PREEMPTED

        while True:
            if shortage := report_shortage(self._config.cluster):
                self._status.change("waiting", reason=shortage)
            attempt = self._known().attempt
            outcome = self._attempt()
            if isinstance(outcome, RunSummary):
                moves = outcome.stopped.startswith((MORE_FIT, NODE_PREEMPTED))
                if not moves or self._signals:
                    return outcome
                self._policy.has_trained = True
                self._policy.progressed(outcome.step)
                self._status.change("restarting", reason=outcome.stopped)
                _say(
                    f"Stopped at step {outcome.step}/{outcome.steps} ({outcome.stopped}). "
                    "Restarting the ranks."
                )
                continue
            seconds = self._seconds_after(outcome, attempt) if outcome else 0.0
            if stopped := self._stopped_within(seconds):
                return stopped

    def _attempt(self) -> RunSummary | Failure | None:
        """Run the ranks once; None: there were too few nodes for too long."""
        try:
            if self._policy.has_trained:
                check_run_folder(self._run_dir)
            return self._fit()
        except OSError as error:  # of the run folder, which Ray Train writes too
            return Failure("missing", type(error).__name__, str(error))

    def _fit(self) -> RunSummary | Failure | None:
        """Have Ray Train start the ranks, and wait for their end."""
        from ray.exceptions import OutOfMemoryError, RayActorError
        from ray.train import (
            ControllerError,
            FailureConfig,
            LoggingConfig,
            RunConfig,
            ScalingConfig,
            TrainingFailedError,
        )
        from ray.train.torch import TorchConfig
        from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

        from cavmae.cluster.elastic import ElasticTorchTrainer
        from cavmae.cluster.worker import FailureReport, RanksFailed, train_rank

        config, cluster = self._config, self._config.cluster
        minimum = cluster.min_workers
        left_out = self._ids_of_left_out()
        callbacks: list[Any] = [FailureReport(self._run_dir)]  # Ray's own kind: it has the nodes
        trainer = ElasticTorchTrainer(
            train_rank,
            run_dir=self._run_dir,
            left_out=left_out,
            train_loop_config={
                "config": without_cluster(config),
                "make_hooks": self._make_hooks,
                "has_trained": self._policy.has_trained,
                "has_checkpoint": self._policy.checkpoint >= 0,
                "owner": self._owner,
                "command": started_by(),
            },
            torch_config=TorchConfig(timeout_s=cluster.collective_timeout_seconds),
            scaling_config=ScalingConfig(
                num_workers=(minimum, cluster.workers) if minimum else cluster.workers,
                elastic_resize_monitor_interval_s=cluster.resize_every_seconds,
                placement_strategy="PACK",  # GPUs of one node first
                use_gpu=cluster.gpus_per_worker > 0,
                resources_per_worker={"CPU": cluster.cpus_per_worker},
                label_selector={"ray.io/node-id": f"!in({','.join(left_out)})"}
                if left_out
                else None,
            ),
            run_config=RunConfig(
                storage_path=cluster.storage or str(self._run_dir / "ray"),
                failure_config=FailureConfig(  # one failure ends it: this class starts it again
                    max_failures=0,
                    controller_failure_limit=0,
                    max_preemption_failures=0,
                    # Ray would end ranks that still save at the deadline of a notice.
                    preemption_grace_s=config.checkpoint.grace_seconds,
                ),
                callbacks=callbacks,
                # FailureReport and this class report every failure once, and shorter.
                logging_config=LoggingConfig(log_level="CRITICAL"),
            ),
        )
        try:
            summary = trainer.fit().return_value
        except ControllerError as error:
            cause = error.controller_failure
            if isinstance(cause, RanksFailed):
                return cause.failure
            if isinstance(cause, WorkerGroupStartupTimeoutError):
                return None
            return Failure("crash", type(cause).__name__, str(cause).strip())
        except TrainingFailedError as error:
            return Failure("crash", type(error).__name__, str(error).strip())
        except (RayActorError, OutOfMemoryError) as error:
            release_reservations()
            text = str(error).strip().partition("\n")[0]
            return Failure("crash", "ControllerGone", f"Ray Train's controller is gone: {text}")
        assert isinstance(summary, RunSummary)
        return summary

    def _seconds_after(self, failure: Failure, attempt: int) -> float:
        """Return how long to wait after a failure.

        Args:
            failure: what Ray knows of it.
            attempt: number of the attempt before the one that failed.

        Raises:
            ValueError, TrainingError: the run ends here.
        """
        if self._signals:
            return 0.0
        known = self._known()
        loaded = bool(known.resumed_from or known.last_step_at)
        failure = dataclasses.replace(
            failure,
            began=loaded and known.attempt > attempt,
            step=known.step,
            checkpoint=self._newest_checkpoint(),
        )
        answer = self._policy.after(failure, time.monotonic(), self._can_do_without)
        if isinstance(answer, End):
            raise (ValueError if answer.by_user else TrainingError)(answer.message)
        error = {"last_error": failure.line, "error_type": failure.error_type}
        self._status.change("restarting", reason=answer.reason, **error)
        _say(
            f"restarting all ranks from the newest checkpoint in {answer.wait_seconds:.0f} s "
            f"({answer.reason}): {failure.line}"
        )
        return answer.wait_seconds

    def _stopped_within(self, seconds: float) -> RunSummary | None:
        """Wait without ranks; returns a summary if the run is to stop meanwhile."""
        end = time.monotonic() + seconds
        while not (reason := SIGTERM if self._signals else self._request()):
            left = end - time.monotonic()
            if left <= 0:
                return None
            time.sleep(min(1.0, left))
        self._status.change("stopped", reason=reason)
        known = self._known()
        return RunSummary(str(self._run_dir), known.step, known.steps, reason, 0, 0, 0.0, 0.0)

    def _request(self) -> str:
        """Return why a person wants the run to stop, if one does; a resize is not needed now."""
        from cavmae.cluster.elastic import MORE_FIT

        with suppress(OSError):
            reason = requested_stop(self._run_dir)
            if not reason.startswith(MORE_FIT):
                return reason
            withdraw_request(self._run_dir)
        return ""

    def _known(self) -> RunStatus:
        """Return what the ranks have written last; nothing where it can't be read."""
        with suppress(OSError, ValueError):
            return read_status(self._run_dir) or RunStatus("waiting")
        return RunStatus("waiting")

    def _newest_checkpoint(self) -> int:
        """Return the step of the newest checkpoint; -1 where there is none or it can't be seen."""
        with suppress(OSError, ValueError):
            names = list_checkpoints(Store(checkpoint_folder(self._config)))
            return step_of(names[-1]) if names else -1
        return -1

    def _can_do_without(self, names: set[str]) -> bool:
        """Return whether the other nodes have room for the ranks."""
        cluster = self._config.cluster
        room = sum(room for name, room in node_slots(cluster) if name not in names)
        return room >= (cluster.min_workers or cluster.workers)

    def _ids_of_left_out(self) -> list[str]:
        """Return Ray's ids of the nodes that are left out; one that was restarted has another."""
        import ray

        return [node["NodeID"] for node in ray.nodes() if node["NodeName"] in self._policy.left_out]


def _say(text: str) -> None:
    print(redacted(text), file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
