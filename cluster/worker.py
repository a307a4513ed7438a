"""What runs in Ray's processes: the training of one rank, and what to do when a rank fails.

Apart from the driver, which is often a `__main__` that other processes cannot import. Ray's torch
backend has set the rank variables and joined the ranks before `train_rank` is called.
"""

import logging
import sys
from pathlib import Path
from typing import Any

from ray.train import UserCallback
from ray.train.v2._internal.execution.context import get_train_context

from cavmae.trainer.config.configs import RunConfig
from cavmae.trainer.run import run
from cavmae.trainer.run_status import write_status
from cavmae.trainer.run_summary import RunSummary

log = logging.getLogger(__name__)

_LASTING_OS_ERRORS = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)


NODE_GOES = "a node is taken away"
"""How the reason begins for which ranks leave and others, elsewhere, go on."""


class LastingError(Exception):
    """An error that starting the ranks again cannot mend; its text is for the user."""


def train_rank(settings: dict[str, Any]) -> RunSummary:
    """Train as the rank that the environment names.

    Args:
        settings: `config`, the run with absolute paths, and `make_hooks` (see `run`).

    Raises:
        LastingError: what the user has to mend.
        Exception: anything else, which Ray answers by starting all ranks again.
    """
    config: RunConfig = settings["config"]
    try:
        return run(config, node_notice, settings["make_hooks"])
    except Exception as error:
        if is_lasting(error):
            raise LastingError(str(error)) from error
        if not _is_of_another_rank(error):
            log.exception("this rank failed")
        raise


def node_notice() -> str:
    """Why the ranks should leave: Ray has been told that a node of theirs will be taken away (a
    spot notice, a drained node). Empty: it has not.

    Reads what Ray Train has sent to this worker; its public `get_preemption_info` is a collective
    of all workers, which a training step cannot afford.
    """
    info = get_train_context().preemption_context.preemption_info
    if info is None:
        return ""
    ranks = ", ".join(map(str, info.preempted_ranks))
    return f"{NODE_GOES} (of rank {ranks})"


def is_lasting(error: Exception) -> bool:
    """Whether a repetition would fail alike and the message alone tells the user what to mend."""
    # They need torch, which the ranks have by now and `cavmae train --help` has not.
    from cavmae.dataloaders.loading.quarantine import DataFaultError

    if isinstance(error, (*_LASTING_OS_ERRORS, DataFaultError)):
        return True
    return isinstance(error, ValueError) and _raised_by_us(error)


def _is_of_another_rank(error: Exception) -> bool:
    """Whether it only says that another rank is gone."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def _raised_by_us(error: Exception) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__")).startswith("cavmae.")


class FailureReport(UserCallback):
    """Prints what failed, writes it into the run's status, and ends the run where a repetition
    would be in vain.

    Runs in Ray Train's controller, which takes an exception of a callback for its own and stops.
    """

    def __init__(self, max_failures: int, run_dir: Path) -> None:
        self._maximum_failures = max_failures
        self._run_dir = run_dir
        self._failures = 0
        self._not_finite = ""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        from cavmae.trainer.trainer import NonFiniteError

        for error in worker_exceptions.values():
            if isinstance(error, LastingError):
                raise error
            # A fault of the hardware passes; what comes again is in the run.
            if isinstance(error, NonFiniteError) and str(error) == self._not_finite:
                raise LastingError(f"again, after the run had gone back to a checkpoint: {error}")
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
        restarts = self._failures <= self._maximum_failures
        count = f"{self._failures} of {self._maximum_failures}"
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
                f"starting all ranks again from the newest checkpoint ({count})",
                file=sys.stderr,
                flush=True,
            )


def _last_line(error: Exception) -> str:
    return str(error).strip().rpartition("\n")[2].strip()
