"""Training on a Ray cluster: `cavmae train RECIPE [--workers 8] [--field value ...]`.

Ray places the ranks and restarts them when one dies. A rank runs `cavmae.trainer.run` and resumes
from the checkpoints of the run folder, never from Ray's last report.
"""

import dataclasses
import os
import secrets
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from cavmae.cluster.config import RAY_KINDS, RayRunConfig, without_cluster
from cavmae.cluster.connection import absolute_path, address_of, connected, report_shortage
from cavmae.cluster.status_relay import StatusRelay
from cavmae.command import exit_code
from cavmae.dataloaders.sampling.sample_plan import check_ranks, default_lanes
from cavmae.dataloaders.shards.shard_set import ShardSet
from cavmae.trainer.config.parse import parse
from cavmae.trainer.fault_tolerance.lease import OWNER_VARIABLE
from cavmae.trainer.fault_tolerance.preemption import (
    START_AGAIN_EXIT_CODE,
    request_stop,
    withdraw_request,
)
from cavmae.trainer.run import MakeHooks
from cavmae.trainer.run_status import LauncherStatus
from cavmae.trainer.run_summary import RunSummary
from cavmae.trainer.tracking.sqlite_uri import sqlite_file, sqlite_uri

_PATH_FIELDS = (
    *("run_dir", "initial_weights", "data.validation", "checkpoint.folder", "tracking.uri"),
    *("cluster.storage", "classifier.labels"),
)
_EXTRA_GRACE_SECONDS = 10.0
"""The driver waits this much longer than the ranks' own limit, as they may be starting."""


class TrainingError(RuntimeError):
    """The ranks failed more often than allowed, or in a way that Ray does not retry."""


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
    return START_AGAIN_EXIT_CODE if summary.stopped else 0


def train_on_ray(config: RayRunConfig, make_hooks: MakeHooks | None = None) -> RunSummary:
    """Train to the end, restarts included; returns rank 0's summary.

    Raises:
        ValueError, OSError: an error that the user has to fix, of the driver or of any rank.
        TrainingError: the ranks failed for good.
    """
    cluster = config.cluster
    with LauncherStatus(Path(config.run_dir)) as status:
        check_run(config)
        if not address_of(cluster):
            ShardSet(config.data.train_folders)  # fail on a wrong path before Ray is started
        threads = config.threads_per_rank or cluster.cpus_per_worker
        with connected(cluster, threads) as working_folder:
            if shortage := report_shortage(cluster):
                status.change("waiting", reason=shortage)
            resolved = with_absolute_paths(config, working_folder)
            resolved = dataclasses.replace(resolved, threads_per_rank=threads)
            run_dir = Path(resolved.run_dir)
            withdraw_request(run_dir)  # of an earlier attempt
            # An attempt that this driver starts takes over at once from one that it started before.
            owner = os.environ.get(OWNER_VARIABLE) or secrets.token_hex(8)
            with _sigterm_requests_stop(run_dir, config.checkpoint.grace_seconds) as signals:
                while _should_restart(summary := _fit(resolved, make_hooks, owner)) and not signals:
                    status.change("restarting", reason=summary.stopped)
                    print(
                        f"Stopped at step {summary.step}/{summary.steps} ({summary.stopped}). "
                        "Restarting the ranks.",
                        file=sys.stderr,
                        flush=True,
                    )
                return summary


def check_run(config: RayRunConfig) -> None:
    """Refuse now what the ranks would refuse later.

    Raises:
        ValueError: there are no data, or the ranks cannot share the batch.
    """
    check_ranks(config.lanes or default_lanes(config.global_batch), config.cluster.workers)
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


def _should_restart(summary: RunSummary) -> bool:
    """Return whether the ranks stopped to be restarted elsewhere, or with more of them."""
    from cavmae.cluster.elastic import MORE_FIT
    from cavmae.cluster.worker import NODE_PREEMPTED

    return summary.stopped.startswith((MORE_FIT, NODE_PREEMPTED))


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
            request_stop(run_dir, "SIGTERM")
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


def _fit(config: RayRunConfig, make_hooks: MakeHooks | None, owner: str) -> RunSummary:
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

    from cavmae.cluster.elastic import ElasticTorchTrainer
    from cavmae.cluster.worker import FailureReport, PermanentError, train_rank

    cluster = config.cluster
    minimum = cluster.min_workers
    trainer = ElasticTorchTrainer(
        train_rank,
        lanes=config.lanes or default_lanes(config.global_batch),
        run_dir=Path(config.run_dir),
        train_loop_config={
            "config": without_cluster(config),
            "make_hooks": make_hooks,
            "owner": owner,
        },
        torch_config=TorchConfig(timeout_s=cluster.collective_timeout_seconds),
        scaling_config=ScalingConfig(
            num_workers=(minimum, cluster.workers) if minimum else cluster.workers,
            elastic_resize_monitor_interval_s=cluster.resize_every_seconds,
            placement_strategy="PACK",  # GPUs of one node first
            use_gpu=cluster.gpus_per_worker > 0,
            resources_per_worker={"CPU": cluster.cpus_per_worker},
        ),
        run_config=RunConfig(
            storage_path=cluster.storage or str(Path(config.run_dir) / "ray"),
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            callbacks=[FailureReport(cluster.max_failures, Path(config.run_dir))],
            # FailureReport and the exception of `fit` report every failure once, and shorter.
            logging_config=LoggingConfig(log_level="CRITICAL"),
        ),
    )
    try:
        summary = trainer.fit().return_value
    except ControllerError as error:
        if isinstance(error.controller_failure, PermanentError):
            raise ValueError(str(error.controller_failure)) from None
        raise TrainingError(str(error)) from error
    except TrainingFailedError as error:
        raise TrainingError(
            f"the ranks failed more often than max_failures = "
            f"{cluster.max_failures} allows (rerun the same command to resume from the newest "
            f"checkpoint); the last failure: {error}"
        ) from error
    except (RayActorError, OutOfMemoryError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise TrainingError(
            "Ray Train's controller, the process that starts the ranks, is gone (rerun the same "
            f"command to resume from the newest checkpoint): {reason}"
        ) from error
    assert isinstance(summary, RunSummary)
    return summary


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
