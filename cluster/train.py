"""Training on a Ray cluster: `cavmae train RECIPE [--workers 8] [--field value ...]`.

Ray places the ranks and starts them again when one dies; what a rank does is
`cavmae.trainer.run`, and what it goes on from is the run folder, never Ray's last report.
"""

import dataclasses
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType

from cavmae.cluster.config import RAY_KINDS, RayRunConfig, without_cluster
from cavmae.cluster.connection import absolute_path, address_of, connected, tell_shortage
from cavmae.cluster.status_relay import StatusRelay
from cavmae.command import exit_code
from cavmae.dataloaders.sampling.sample_plan import check_ranks, default_lanes
from cavmae.dataloaders.shards.shard_set import ShardSet
from cavmae.trainer.config.configs import FinetuneConfig
from cavmae.trainer.config.parse import parse
from cavmae.trainer.fault_tolerance.preemption import (
    START_AGAIN_EXIT_CODE,
    request_stop,
    withdraw_request,
)
from cavmae.trainer.run import MakeHooks
from cavmae.trainer.run_status import LauncherStatus
from cavmae.trainer.run_summary import RunSummary

_SECONDS_TO_END = 10.0
"""What the driver waits longer than the ranks, which may be starting."""


class TrainingError(RuntimeError):
    """The ranks failed more often than allowed, or in a way that Ray does not repeat."""


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
    """Run to the end, restarts included; returns how rank 0 ended.

    Raises:
        ValueError, OSError: what the user has to mend, from the driver or from any rank.
        TrainingError: the ranks failed for good.
    """
    with LauncherStatus(Path(config.run_dir)) as status:
        return _train_on_ray(config, status, make_hooks)


def _train_on_ray(
    config: RayRunConfig, status: LauncherStatus, make_hooks: MakeHooks | None
) -> RunSummary:
    cluster = config.cluster
    check_run(config)
    if not address_of(cluster):
        ShardSet(config.data.train_folders)  # a wrong path is told now, not when Ray is up
    threads = config.threads_per_rank or cluster.cpus_per_worker
    with connected(cluster, threads) as working_folder:
        if shortage := tell_shortage(cluster):
            status.change("waiting", reason=shortage)
        resolved = with_absolute_paths(config, working_folder)
        resolved = dataclasses.replace(resolved, threads_per_rank=threads)
        run_dir = Path(resolved.run_dir)
        withdraw_request(run_dir)  # one of a start before
        with _sigterm_asks_to_leave(run_dir, config.checkpoint.grace_seconds) as asked:
            while True:
                summary = _fit(resolved, make_hooks)
                if asked or not _goes_on(summary):
                    return summary
                status.change("restarting", reason=summary.stopped)
                print(
                    f"Stopped at step {summary.step}/{summary.steps} ({summary.stopped}). "
                    "Restarting the ranks.",
                    file=sys.stderr,
                    flush=True,
                )


def check_run(config: RayRunConfig) -> None:
    """Find out now what the ranks would find out when they are there.

    Raises:
        ValueError: no data, or ranks that can't share the batch.
    """
    check_ranks(config.lanes or default_lanes(config.global_batch), config.cluster.workers)
    if not config.data.train_folders:
        raise ValueError("data.train is empty; give the folder of a packed tier, e.g. shards/video")


def _goes_on(summary: RunSummary) -> bool:
    """Whether the ranks left for others to take their place."""
    if not summary.stopped:
        return False
    from cavmae.cluster.elastic import MORE_FIT
    from cavmae.cluster.worker import NODE_GOES

    return summary.stopped.startswith((MORE_FIT, NODE_GOES))


@contextmanager
def _sigterm_asks_to_leave(run_dir: Path, budget_seconds: float) -> Iterator[list[int]]:
    """SIGTERM of the driver asks the ranks to save and leave, and ends the driver where they do
    not within the budget. In another thread than the main one, nothing is done.

    Yields the signals that came: ranks that were leaving for another reason forget this one.
    """
    asked: list[int] = []

    def ask(number: int, _frame: FrameType | None) -> None:
        asked.append(number)
        print("SIGTERM: the ranks are asked to save and leave", file=sys.stderr, flush=True)
        if run_dir.is_dir():
            request_stop(run_dir, "SIGTERM")
        if budget_seconds:
            signal.setitimer(signal.ITIMER_REAL, budget_seconds + _SECONDS_TO_END)

    def end(_signal: int, _frame: FrameType | None) -> None:
        raise TrainingError(
            f"SIGTERM, and the ranks did not leave within {budget_seconds + _SECONDS_TO_END:g} s; "
            "the same command goes on from the newest checkpoint"
        )

    try:
        before = [signal.signal(signal.SIGTERM, ask), signal.signal(signal.SIGALRM, end)]
    except ValueError:
        yield asked
        return
    try:
        yield asked
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in zip((signal.SIGTERM, signal.SIGALRM), before, strict=True):
            signal.signal(number, handler)


def with_absolute_paths(config: RayRunConfig, folder: Path | None) -> RayRunConfig:
    """Paths as the ranks need them, whose current folder is another one.

    Args:
        config: paths relative to `folder`, or absolute.
        folder: where the user stands; None in a Ray job, whose current folder is a copy that is
            thrown away.

    Raises:
        ValueError: a relative path in a Ray job.
    """
    absolute = partial(absolute_path, folder=folder)
    uri, sqlite = config.tracking.uri, "sqlite:///"
    if uri.startswith(sqlite):
        uri = sqlite + absolute("tracking.uri", uri.removeprefix(sqlite))
    else:
        uri = absolute("tracking.uri", uri)
    if isinstance(config, FinetuneConfig):
        labels = absolute("classifier.labels", config.classifier.labels)
        classifier = dataclasses.replace(config.classifier, labels=labels)
        config = dataclasses.replace(config, classifier=classifier)
    return dataclasses.replace(
        config,
        run_dir=absolute("run_dir", config.run_dir),
        initial_weights=absolute("initial_weights", config.initial_weights),
        data=dataclasses.replace(
            config.data,
            train=",".join(absolute("data.train", one) for one in config.data.train_folders),
            validation=absolute("data.validation", config.data.validation),
            cache_folder=absolute("data.cache_folder", config.data.cache.folder),
        ),
        checkpoint=dataclasses.replace(
            config.checkpoint, folder=absolute("checkpoint.folder", config.checkpoint.folder)
        ),
        tracking=dataclasses.replace(config.tracking, uri=uri),
        cluster=dataclasses.replace(
            config.cluster, storage=absolute("cluster.storage", config.cluster.storage)
        ),
    )


def _fit(config: RayRunConfig, make_hooks: MakeHooks | None) -> RunSummary:
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
    from cavmae.cluster.worker import FailureReport, LastingError, train_rank

    cluster = config.cluster
    least = cluster.min_workers
    trainer = ElasticTorchTrainer(
        train_rank,
        lanes=config.lanes or default_lanes(config.global_batch),
        run_dir=Path(config.run_dir),
        train_loop_config={"config": without_cluster(config), "make_hooks": make_hooks},
        torch_config=TorchConfig(timeout_s=cluster.collective_timeout_seconds),
        scaling_config=ScalingConfig(
            num_workers=(least, cluster.workers) if least else cluster.workers,
            elastic_resize_monitor_interval_s=cluster.resize_every_seconds,
            placement_strategy="PACK",  # GPUs of one node first
            use_gpu=cluster.gpus_per_worker > 0,
            resources_per_worker={"CPU": cluster.cpus_per_worker}
            | ({"GPU": cluster.gpus_per_worker} if cluster.gpus_per_worker else {}),
        ),
        run_config=RunConfig(
            storage_path=cluster.storage or str(Path(config.run_dir) / "ray"),
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            callbacks=[FailureReport(cluster.max_failures, Path(config.run_dir))],
            # FailureReport and the exception of `fit` tell every failure once, and shorter.
            logging_config=LoggingConfig(log_level="CRITICAL"),
        ),
    )
    try:
        summary = trainer.fit().return_value
    except ControllerError as error:
        if isinstance(error.controller_failure, LastingError):
            raise ValueError(str(error.controller_failure)) from None
        raise TrainingError(str(error)) from error
    except TrainingFailedError as error:
        raise TrainingError(
            f"the ranks failed more often than max_failures = "
            f"{cluster.max_failures} allows (the same command goes on from the newest "
            f"checkpoint); the last time: {error}"
        ) from error
    except (RayActorError, OutOfMemoryError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise TrainingError(
            "Ray Train's controller, the process that starts the ranks, is gone (the same command "
            f"goes on from the newest checkpoint): {reason}"
        ) from error
    assert isinstance(summary, RunSummary)
    return summary


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
