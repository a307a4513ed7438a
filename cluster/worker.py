"""Code that runs in Ray's processes: one rank's training, and the reaction to a failed rank.

It is apart from the driver, which is often a `__main__` that other processes cannot import. Ray's
torch backend sets the rank variables and the process group before it calls `train_rank`.
"""

import logging
import os
import sys
from pathlib import Path
from typing import Any

from ray.train import UserCallback
from ray.train.v2._internal.execution.context import get_train_context

from cavmae.command import raised_by_us
from cavmae.trainer.config.configs import RunConfig
from cavmae.trainer.fault_tolerance.lease import OWNER_VARIABLE
from cavmae.trainer.run import run
from cavmae.trainer.run_status import write_status
from cavmae.trainer.run_summary import RunSummary

log = logging.getLogger(__name__)

_PERMANENT_OS_ERRORS = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)


NODE_PREEMPTED = "node preemption notice"
"""Prefix of the reason for which ranks stop and are restarted on other nodes."""


class PermanentError(Exception):
    """An error that restarting the ranks cannot fix; its text is for the user."""


def train_rank(settings: dict[str, Any]) -> RunSummary:
    """Train as the rank that the environment names.

    Args:
        settings: `config`, the run with absolute paths; `make_hooks` (see `run`); and `owner`,
            which all attempts of a driver share.

    Raises:
        PermanentError: an error that the user has to fix.
        Exception: anything else; Ray then restarts all ranks.
    """
    config: RunConfig = settings["config"]
    os.environ[OWNER_VARIABLE] = settings["owner"]
    try:
        return run(config, preemption_notice, settings["make_hooks"])
    except Exception as error:
        if is_permanent(error):
            raise PermanentError(str(error)) from error
        if not _is_of_another_rank(error):
            log.exception("this rank failed")
        raise


def preemption_notice() -> str:
    """Return why the ranks should stop, if Ray reports that one of their nodes will be preempted (a
    spot notice, a drained node); else an empty string.

    This reads what Ray Train has sent to this worker; its public `get_preemption_info` is a
    collective of all workers, which a training step cannot afford.
    """
    info = get_train_context().preemption_context.preemption_info
    if info is None:
        return ""
    ranks = ", ".join(map(str, info.preempted_ranks))
    return f"{NODE_PREEMPTED} (rank {ranks})"


def is_permanent(error: Exception) -> bool:
    """Return whether a retry would fail alike and the message alone tells the user what to fix."""
    # They need torch, which the ranks have imported by now and `cavmae train --help` has not.
    from cavmae.dataloaders.loading.quarantine import DataFaultError

    if isinstance(error, (*_PERMANENT_OS_ERRORS, DataFaultError)):
        return True
    return isinstance(error, ValueError) and raised_by_us(error)


def _is_of_another_rank(error: Exception) -> bool:
    """Return whether the error only says that another rank is gone."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


class FailureReport(UserCallback):
    """Reports failures, also in the run's status, and ends the run where a restart would be in
    vain.

    It runs in Ray Train's controller, which stops when a callback raises.
    """

    def __init__(self, max_failures: int, run_dir: Path) -> None:
        self._max_failures = max_failures
        self._run_dir = run_dir
        self._failures = 0
        self._not_finite = ""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        from cavmae.trainer.trainer import NonFiniteError

        for error in worker_exceptions.values():
            if isinstance(error, PermanentError):
                raise error
            # A hardware fault does not repeat; an error that does is in the run itself.
            if isinstance(error, NonFiniteError) and str(error) == self._not_finite:
                raise PermanentError(f"repeated after resuming from a checkpoint: {error}")
        for error in worker_exceptions.values():
            if isinstance(error, NonFiniteError):
                self._not_finite = str(error)
        self._failures += 1
        causes = {
            rank: getattr(error, "health_check_failure", error)  # a dead process
            for rank, error in sorted(worker_exceptions.items())
        }
        for rank, cause in causes.items():
            print(
                f"rank {rank} failed: {type(cause).__name__}: {_last_line(cause)}", file=sys.stderr
            )
        restarts = self._failures <= self._max_failures
        count = f"{self._failures} of {self._max_failures}"
        rank = next((one for one in causes if not _is_of_another_rank(causes[one])), min(causes))
        write_status(
            self._run_dir,
            state="restarting" if restarts else "failed",
            reason=f"failure {count}",
            last_error=f"rank {rank}: {_last_line(causes[rank])}",
            error_type=type(causes[rank]).__name__,
        )
        if restarts:
            print(
                f"restarting all ranks from the newest checkpoint ({count})",
                file=sys.stderr,
                flush=True,
            )


def _last_line(error: Exception) -> str:
    return str(error).strip().rpartition("\n")[2].strip()
