"""Code that runs in Ray's processes: one rank's training, and the report of a failed rank.

It is apart from the driver, which is often a `__main__` that other processes cannot import. Ray's
torch backend sets the rank variables and the process group before it calls `train_rank`.
"""

import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import ray
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.context import get_train_context

from cavmae.cluster.restarts import BY_USER, Failure, Kind, check_run_folder
from cavmae.command import UserMistake, raised_by_us
from cavmae.trainer.checkpoint.format import checkpoint_folder, list_checkpoints
from cavmae.trainer.checkpoint.store import Store
from cavmae.trainer.config.configs import RunConfig
from cavmae.trainer.fault_tolerance.lease import OWNER_VARIABLE
from cavmae.trainer.run import run
from cavmae.trainer.run_status import write_status
from cavmae.trainer.run_summary import RunSummary
from cavmae.trainer.tracking.code_snapshot import COMMAND_VARIABLE

log = logging.getLogger(__name__)

_MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)
_GATHER_SECONDS = 2.0
"""What is away fails on all nodes within this time, what is missing on one node on that one."""
_SHOWN_RANKS = 8

NODE_PREEMPTED = "node preemption notice"
"""Prefix of the reason for which ranks stop and are restarted on other nodes."""


class RankError(Exception):
    """A rank's error in a form that reaches the driver; those of libraries may not be picklable.

    Attributes:
        kind, error_type, text: see `Failure`.
    """

    def __init__(self, kind: Kind, error_type: str, text: str) -> None:
        super().__init__(kind, error_type, text)
        self.kind: Kind = kind
        self.error_type = error_type
        self.text = text

    def __str__(self) -> str:
        return f"{self.error_type}: {self.text.partition(chr(10))[0]}"


class RanksFailed(Exception):
    """Ends an attempt. Attributes: failure, what the controller knows of it."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure)
        self.failure = failure


def train_rank(settings: dict[str, Any]) -> RunSummary:
    """Train as the rank that the environment names.

    Args:
        settings: `config`, the run with absolute paths; `make_hooks` (see `run`); `owner`, which
            all attempts of a driver share; `command`, which started it; `has_trained`, whether the
            run has a folder; and `has_checkpoint`.

    Raises:
        RankError: training failed.
    """
    config: RunConfig = settings["config"]
    os.environ |= {OWNER_VARIABLE: settings["owner"], COMMAND_VARIABLE: settings["command"]}
    try:
        if os.environ["RANK"] == "0":
            _check_mounts(config, settings)
        return run(config, preemption_notice, settings["make_hooks"])
    except Exception as error:
        kind = kind_of(error)
        if kind in ("crash", "unreachable"):
            log.exception("this rank failed")
        raise RankError(kind, type(error).__name__, str(error).strip() or repr(error)) from None


def _check_mounts(config: RunConfig, settings: dict[str, Any]) -> None:
    """Refuse to begin anew in an empty folder because a file system is not mounted.

    Raises:
        FileNotFoundError: what the run has had is not there.
    """
    if settings["has_trained"]:
        check_run_folder(Path(config.run_dir))
    store = Store(checkpoint_folder(config))
    if settings["has_checkpoint"] and not list_checkpoints(store):
        raise FileNotFoundError(
            f"{store.location()} has no checkpoint any more; is its file system mounted?"
        )


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


def kind_of(error: Exception) -> Kind:
    """Return what is known of the cause of an error."""
    # They need torch, which the ranks have imported by now and `cavmae train --help` has not.
    import torch.distributed as dist

    from cavmae.dataloaders.loading.quarantine import DataFaultError
    from cavmae.trainer.trainer import NonFiniteError

    if isinstance(error, DataFaultError | UserMistake):
        return "lasting"
    if isinstance(error, NonFiniteError):
        return "not finite"
    if isinstance(error, _MISSING):
        return "missing"
    if isinstance(error, OSError):
        return "unreachable"
    if isinstance(error, ValueError) and raised_by_us(error):
        return "refused"
    if isinstance(error, dist.DistError) or "gloo/transport" in str(error):
        return "peer"
    return "crash"


class FailureReport(WorkerGroupCallback):
    """Ends an attempt when a rank fails, with what the driver needs to decide what comes next.

    It runs in Ray Train's controller, which stops when a callback raises.

    Args:
        run_dir: the run folder, whose status gets the error at once.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._gathering = False

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Note the ranks, whose nodes have names."""
        self._group = worker_group

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        """Raise RanksFailed if a rank has failed."""
        if self._gathering or not worker_group_status.errors:
            return
        errors = reports(worker_group_status.errors)
        names = {node["NodeID"]: node["NodeName"] for node in ray.nodes()}
        workers = self._group.get_workers()
        nodes = [names[worker.metadata.node_id] for worker in workers]
        failure = failure_of(errors, nodes)
        write_status(
            self._run_dir,
            state="restarting",
            reason="a rank failed",
            last_error=failure.line,
            error_type=failure.error_type,
        )
        if failure.kind in ("missing", "unreachable"):
            errors |= self._others_soon()
            failure = failure_of(errors, nodes)
        if failure.kind not in BY_USER:  # the driver has a line for those
            for rank in list(errors)[:_SHOWN_RANKS]:
                print(f"rank {rank} failed: {errors[rank]}", file=sys.stderr)
            if len(errors) > _SHOWN_RANKS:
                print(f"{len(errors) - _SHOWN_RANKS} more ranks failed", file=sys.stderr)
            sys.stderr.flush()
        raise RanksFailed(failure)

    def _others_soon(self) -> dict[int, RankError]:
        """Return the errors of ranks a moment later."""
        time.sleep(_GATHER_SECONDS)
        self._gathering = True  # the poll calls this object again
        return reports(self._group.poll_status(_GATHER_SECONDS).errors)


def reports(errors: dict[int, Exception]) -> dict[int, RankError]:
    """Describe what Ray Train reports of ranks, by rank."""
    causes = {
        rank: getattr(error, "health_check_failure", error)  # a dead process
        for rank, error in sorted(errors.items())
    }
    return {
        rank: cause
        if isinstance(cause, RankError)
        else RankError(
            "crash", type(cause).__name__, str(cause).strip().rpartition("\n")[2].strip()
        )
        for rank, cause in causes.items()
    }


def failure_of(errors: dict[int, RankError], nodes: list[str]) -> Failure:
    """Describe an attempt that ended with these errors.

    Args:
        errors: by rank.
        nodes: name of each rank's node.
    """
    at_fault = {rank for rank, error in errors.items() if error.kind != "peer"}
    decisive = {rank for rank in at_fault if errors[rank].kind in ("lasting", "not finite")}
    first = min(decisive or at_fault or errors)
    return Failure(
        kind=errors[first].kind,
        error_type=errors[first].error_type,
        text=errors[first].text,
        rank=first,
        nodes=frozenset(nodes[rank] for rank in at_fault) if len(set(nodes)) > 1 else frozenset(),
    )
