"""Logging of metrics, figures and parameters, first to the run folder and then to MLflow.

`metrics.jsonl` is the source of truth and is written first. A thread sends to MLflow, because a
tracking server that hangs must not hold up a training step, and one that is down must end no run
and keep none from starting: what it missed is kept in memory and, when the process ends, as a note
of the last step that it has, with the files. This is the only file that imports MLflow, and only
once a Tracker is built: ranks other than the first never pay for it.
"""

import fcntl
import json
import logging
import math
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from cavmae.atomic_write import TEMPORARY_SUFFIX, atomic_write, read_json, write_json
from cavmae.trainer.config.configs import TrackingConfig
from cavmae.trainer.tracking.code_snapshot import git_commit
from cavmae.trainer.tracking.metrics_file import drop_metrics_after, read_metrics
from cavmae.trainer.tracking.sqlite_uri import sqlite_file, sqlite_uri

log = logging.getLogger(__name__)

PARAMETER_CHARACTERS = 6000  # MLflow cuts longer values
MAX_QUEUED = 10_000
FAILURES_PER_MESSAGE = 100
BEHIND_RECORDS = 100
"""So many queued records are said to be late."""
CLOSE_SECONDS = 60
UNSENT = "mlflow_unsent.json"
"""File of a run folder; present while MLflow lacks records of the run."""


class Tracker:
    """Logs one run; only rank 0 builds it.

    Args:
        config: where MLflow is.
        run_dir: the run folder, for `metrics.jsonl`; the default store is `mlflow.db` beside this
            folder, with its files in `mlartifacts`.
        parameters: the resolved configuration; nested dictionaries become dotted names.
        run_id: the MLflow run to resume; None creates one.
        start_step: the step to resume from. Later lines of `metrics.jsonl` are dropped, since those
            steps run again. (MLflow can't delete them; it shows such steps twice.)
        on_run: called with the MLflow run's id and the URI once it is there, in any thread.

    Attributes:
        run_id: the MLflow run; empty until there is one.
        uri: the MLflow tracking URI, for `mlflow ui --backend-store-uri URI`.
        failures: how often MLflow did not take a record.

    Raises:
        ValueError: a new run's store refuses it. One that is down, and any trouble of a run that
            resumes, is a warning.
    """

    def __init__(
        self,
        config: TrackingConfig,
        run_dir: Path,
        parameters: dict[str, object],
        run_id: str | None = None,
        start_step: int = 0,
        on_run: Callable[[str, str], object] = lambda run_id, uri: None,
    ) -> None:
        self._config, self._run_dir, self._parameters = config, run_dir, parameters
        self._metrics_path = run_dir / "metrics.jsonl"
        run_dir.mkdir(parents=True, exist_ok=True)
        drop_metrics_after(self._metrics_path, start_step)
        self._metrics_file = self._metrics_path.open("ab", buffering=0)
        self._unwritten = b""
        self.uri = config.uri or sqlite_uri(run_dir.resolve().parent / "mlflow.db")
        self.run_id = run_id or ""
        self.failures = 0
        self._resumes = run_id is not None
        self._on_run = on_run
        self._connected = self._late = self._lost = self._note_fails = False
        self._lock = threading.Lock()
        self._unsent_path = run_dir / UNSENT
        self._queue: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._sent_step = start_step
        self._noted_step: int | None = None
        self._lost_files: list[list[str | None]] = []
        self._connect_or_warn()
        self._resend_missed()
        self._sender = threading.Thread(target=self._send_queue, name="mlflow", daemon=True)
        self._sender.start()

    def _connect_or_warn(self) -> None:
        try:
            self._connect()
        except Exception as error:
            if not (self._resumes or _is_transient(error)):
                raise ValueError(
                    f"tracking.uri is {self.uri}: {error}\nSet tracking.uri to a store that takes "
                    "the run; empty: a file beside the run folder"
                ) from error
            self._note_unsent()
            log.warning(
                "MLflow (%s) can't be reached; training goes on, %s has all metrics, and they are "
                "sent when it is back: %s",
                self.uri,
                self._metrics_path,
                error,
            )

    def _connect(self) -> None:
        """Open the store and this run in it; raises what MLflow raises."""
        _set_mlflow_defaults()
        from mlflow import MlflowClient
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        # It logs each error of a database with its traceback, and raises it as well.
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
        create_store(self.uri)
        self._client = MlflowClient(tracking_uri=self.uri)
        if self.run_id:
            run = self._client.get_run(self.run_id)
            self._client.update_run(self.run_id, status="RUNNING")
        else:
            name = self._run_dir.resolve().name
            run = self._client.create_run(self._experiment(self._config.experiment), run_name=name)
            self.run_id = run.info.run_id
        self._on_run(self.run_id, self.uri)
        self._log_parameters(self._parameters, run.data.params, run.data.tags)
        self._system_metrics = SystemMetricsMonitor(
            self.run_id, resume_logging=self._resumes, tracking_uri=self.uri
        )
        self._system_metrics.start()
        self._connected = True

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Log numbers of one step: to `metrics.jsonl` now, or with a later step where the disk is
        full, to MLflow a little later."""
        now_seconds = time.time()
        values = {  # JSON has no NaN
            name: value if math.isfinite(value) else str(value) for name, value in metrics.items()
        }
        record = {"step": step, "unix_seconds": round(now_seconds, 3), **values}
        self._write(json.dumps(record) + "\n")
        self._send_metrics(metrics, step, now_seconds)

    def _write(self, text: str) -> None:
        """Append to `metrics.jsonl`; what does not fit on the disk waits in memory."""
        failed_before = bool(self._unwritten)
        self._unwritten += text.encode()
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._metrics_file.write(self._unwritten) :]
        except OSError as error:
            if not failed_before:
                log.error(
                    "ALARM: metrics could not be written (%s); training continues, and they are "
                    "written with the next ones: %s",
                    self._metrics_path,
                    error,
                )

    def _send_metrics(self, metrics: dict[str, float], step: int, unix_seconds: float) -> None:
        from mlflow.entities import Metric

        entities = [
            Metric(name, float(value), int(unix_seconds * 1000), step)
            for name, value in metrics.items()
        ]
        self._send(
            _Request(lambda: self._client.log_batch(self.run_id, metrics=entities), step=step)
        )

    def log_file(self, path: Path, folder: str | None = None) -> None:
        """Copy a file, which must not change any more, to the artifacts of the MLflow run."""
        self._send(_Request(lambda: self._log_artifact(path, folder), file=[str(path), folder]))

    def _log_artifact(self, path: Path, folder: str | None) -> None:
        self._client.log_artifact(self.run_id, str(path), folder)

    def close(self, status: Literal["FINISHED", "FAILED", "KILLED"] = "FINISHED") -> None:
        """End the MLflow run, after waiting up to a minute for records that are still queued."""
        self._write("")
        if self._unwritten:
            lines = self._unwritten.count(b"\n")
            log.error("ALARM: the last %d lines of %s are lost", lines, self._metrics_path)
        self._metrics_file.close()
        self._send(_Request(lambda: self._system_metrics.finish()))
        self._send(_Request(lambda: self._client.set_terminated(self.run_id, status)))
        self._queue.put(None)
        self._sender.join(CLOSE_SECONDS)
        if self._unsent_path.exists() or self._sender.is_alive():
            log.warning(
                "metrics after step %d are not in MLflow (%s); %s has them, and the next attempt "
                "of this run sends them",
                self._sent_step,
                self.uri,
                self._metrics_path,
            )

    def _experiment(self, name: str) -> str:
        """Return the id of the experiment, created where it doesn't exist."""
        from mlflow.exceptions import MlflowException

        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            database = sqlite_file(self.uri)
            # A server places artifacts itself; SQLite would put them into the current folder.
            location = database and (database.resolve().parent / "mlartifacts").as_uri()
            try:
                return self._client.create_experiment(name, artifact_location=location)
            except MlflowException:
                experiment = self._client.get_experiment_by_name(name)
                if experiment is None:  # no other run has just created it
                    raise
        if experiment.lifecycle_stage == "deleted":
            raise ValueError(
                f"tracking.experiment {name!r} was deleted in {self.uri}; restore it with "
                f"`mlflow experiments restore -x {experiment.experiment_id}` or set another name"
            )
        return experiment.experiment_id

    def _log_parameters(
        self, parameters: dict[str, object], recorded: dict[str, str], tags: dict[str, str]
    ) -> None:
        """Log parameters. One that changed since an earlier attempt becomes a tag: MLflow keeps
        the first value of a parameter for ever."""
        from mlflow.entities import Param, RunTag

        commit = git_commit()
        flat = flatten(parameters) | {"git_commit": commit}
        values = {name: str(value)[:PARAMETER_CHARACTERS] for name, value in flat.items()}
        new = [Param(name, value) for name, value in values.items() if name not in recorded]
        new_tags = {"mlflow.source.git.commit": commit} if commit else {}
        for name, value in values.items():
            tag = f"changed.{name}"
            earlier = tags.get(tag, recorded.get(name, value))
            if value != earlier:
                log.warning("%s was %s and is now %s (MLflow tag %s)", name, earlier, value, tag)
                new_tags[tag] = value
        run_tags = [RunTag(name, value) for name, value in new_tags.items()]
        self._client.log_batch(self.run_id, params=new, tags=run_tags)
        self._client.log_dict(self.run_id, parameters, "config.json")

    def _send(self, request: "_Request") -> None:
        late = self._queue.qsize()
        if late > BEHIND_RECORDS and not self._late:
            log.warning(
                "MLflow (%s) is slow or away: %d records wait for it, the last one it has is of "
                "step %d; training goes on",
                self.uri,
                late,
                self._sent_step,
            )
        self._late = late > (0 if self._late else BEHIND_RECORDS)
        if late < MAX_QUEUED:
            self._queue.put(request)
        else:
            self._lose(request)
            self._count_failure("too many records are queued")

    def _resend_missed(self) -> None:
        """Send what MLflow did not take from an earlier attempt."""
        if not self._unsent_path.exists():
            return
        note = read_json(self._unsent_path)
        after = note["after_step"]
        missed = [one for one in read_metrics(self._metrics_path) if after < one["step"]]
        if missed:
            log.info("sending %d records that MLflow missed after step %d", len(missed), after)
        self._sent_step = after
        for record in missed:
            step, unix_seconds = int(record.pop("step")), record.pop("unix_seconds")
            self._send_metrics(record, step, unix_seconds)
        for path, folder in note["files"]:
            self.log_file(Path(path), folder)

    def _send_queue(self) -> None:
        """Send requests in order, in the thread; one that is not taken holds up the others."""
        waiting: deque[_Request] = deque()
        while (request := self._queue.get()) is not None:
            waiting.append(request)
            while waiting:
                try:
                    if not self._connected:
                        self._connect()
                    waiting[0].call()
                except Exception as error:  # of MLflow, its database or its network library
                    self._count_failure(str(error))
                    self._note_unsent()
                    if (not self._connected or _is_transient(error)) and len(waiting) < MAX_QUEUED:
                        break
                    self._lose(waiting.popleft())
                else:
                    self._sent_step = waiting.popleft().step or self._sent_step
            if not waiting and not self._lost:
                self._unsent_path.unlink(missing_ok=True)
                self._noted_step = None
        for request in waiting:
            self._lose(request)

    def _lose(self, request: "_Request") -> None:
        """Leave a request to the next attempt: metrics by their step, files by their path."""
        self._lost = True
        if request.file:
            self._lost_files.append(request.file)
        self._note_unsent()

    def _note_unsent(self) -> None:
        """Note what MLflow lacks; a note that can't be written is only logged."""
        with self._lock:
            if self._noted_step is None:
                # A step's scores are a separate record, so its last one may be missing.
                self._noted_step = self._sent_step - 1
            note = {"after_step": self._noted_step, "files": self._lost_files}
            try:
                write_json(self._unsent_path, note)
            except OSError as error:
                if not self._note_fails:
                    log.warning("%s could not be written: %s", self._unsent_path, error)
                self._note_fails = True
            else:
                self._note_fails = False

    def _count_failure(self, reason: str) -> None:
        with self._lock:
            self.failures += 1
            if self.failures % FAILURES_PER_MESSAGE == 1:
                log.warning(
                    "MLflow (%s) did not take a record, %d so far; training continues and %s has "
                    "all metrics: %s",
                    self.uri,
                    self.failures,
                    self._metrics_path,
                    reason,
                )


class _Request(NamedTuple):
    """A call of MLflow, with the step whose metrics it sends, or the file and its folder."""

    call: Callable[[], object]
    step: int | None = None
    file: list[str | None] | None = None


def _is_transient(error: Exception) -> bool:
    """Whether the store is down, rather than refusing the request, or the file being gone."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    if not isinstance(error, MlflowException):
        gone = isinstance(error, FileNotFoundError)
        return isinstance(error, OSError | SQLAlchemyError) and not gone
    # MLflow turns any error of its database into BAD_REQUEST.
    transient = (
        "INTERNAL_ERROR",
        "TEMPORARILY_UNAVAILABLE",
        "REQUEST_LIMIT_EXCEEDED",
        "BAD_REQUEST",
    )
    return getattr(error, "error_code", "INTERNAL_ERROR") in transient


def log_files(record: dict[str, Any], name: str, files: Sequence[Path]) -> None:
    """Log files to a separate MLflow run, in the experiment of another run.

    Args:
        record: `run.json` of the other run.
        name: of the separate run, which is reused where it exists.
        files: to copy.

    Raises:
        ValueError: the store can't be reached.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    uri = record["tracking_uri"]
    try:
        client = MlflowClient(tracking_uri=uri)
        experiment = client.get_run(record["mlflow_run"]).info.experiment_id
        found = client.search_runs([experiment], f"attributes.run_name = '{name}'")
        run = found[0] if found else client.create_run(experiment, run_name=name)
        for file in files:
            client.log_artifact(run.info.run_id, str(file))
        client.set_terminated(run.info.run_id)
    except MlflowException as error:
        raise ValueError(f"tracking.uri is {uri}: {error}") from error


def check_store(uri: str) -> int:
    """Return the number of experiments in a store; writes nothing.

    Args:
        uri: MLflow tracking URI.

    Raises:
        ValueError: the store can't be reached.
    """
    _set_mlflow_defaults()
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        return len(MlflowClient(tracking_uri=uri).search_experiments())
    except (MlflowException, OSError) as error:
        raise ValueError(f"{uri}: {error}") from error


def _set_mlflow_defaults() -> None:
    """Set what MLflow reads from the environment when it is imported."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "true")
    # MLflow's own defaults wait many minutes for a server that is gone.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")


def flatten(values: dict[str, object], prefix: str = "") -> dict[str, object]:
    """Flatten nested dictionaries into one with dotted names."""
    flat: dict[str, object] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def create_store(uri: str) -> None:
    """Create the SQLite file of a store atomically, where it does not exist.

    MLflow creates its tables one by one, some through temporary ones. Two runs that start together,
    or one that is killed meanwhile, would leave a file that no run can open.
    """
    from mlflow import MlflowClient

    path = sqlite_file(uri)
    if path is None or path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            for leftover in path.parent.glob(f"{path.name}.*{TEMPORARY_SUFFIX}*"):
                leftover.unlink()  # of a killed run, with its journal
            with atomic_write(path) as temporary:
                MlflowClient(sqlite_uri(temporary)).search_experiments(max_results=1)
