"""Metrics, pictures and parameters of a run: first in the run folder, then in MLflow.

`metrics.jsonl` is the truth and is written before anything else. MLflow is fed by a thread of its
own, because a tracking server that hangs must not hold up a training step, and one that is gone
must not end the run: what it missed waits for it, in memory and, over the end of the process, as a
note of the last step that it has. The only file that imports MLflow, and only once a Tracker is
built: ranks other than the first never pay for it.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cavmae.trainer.config.configs import TrackingConfig
from cavmae.trainer.config.serialize import read_json, write_json
from cavmae.trainer.tracking.code_snapshot import git_commit

log = logging.getLogger(__name__)

PARAMETER_CHARACTERS = 6000  # MLflow cuts longer values
WAITING_RECORDS = 10_000
FAILURES_PER_MESSAGE = 100
CLOSE_SECONDS = 60
UNSENT = "mlflow_unsent.json"
"""File of a run folder; present while MLflow lacks records of the run."""


class Tracker:
    """One run's record. Build it on rank 0 only.

    Args:
        config: Where MLflow is.
        run_dir: Folder of the run. `metrics.jsonl` is written here; the default store is
            `mlflow.db` beside this folder, with its files in `mlartifacts`.
        parameters: The resolved configuration; nested dictionaries become dotted names.
        run_id: MLflow run to go on with; None starts one.
        start_step: Step that the run goes on from. Later lines of `metrics.jsonl` are dropped:
            those steps are run again. (MLflow can't forget; it shows such steps twice.)

    Attributes:
        run_id: MLflow run.
        uri: MLflow tracking URI, for `mlflow ui --backend-store-uri URI`.
        failures: Times that MLflow did not take a record.

    Raises:
        ValueError: the store can't be reached, or doesn't have the run or the experiment.
    """

    def __init__(
        self,
        config: TrackingConfig,
        run_dir: Path,
        parameters: dict[str, object],
        run_id: str | None = None,
        start_step: int = 0,
    ) -> None:
        self._metrics_path = run_dir / "metrics.jsonl"
        run_dir.mkdir(parents=True, exist_ok=True)
        drop_metrics_after(self._metrics_path, start_step)

        _quiet_and_impatient()
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        self._mlflow_errors = (MlflowException, OSError)
        default_uri = f"sqlite:///{run_dir.resolve().parent / 'mlflow.db'}"
        self.uri = config.uri or default_uri
        try:
            _make_store(self.uri)
            self._client = MlflowClient(tracking_uri=self.uri)
            if run_id is None:
                experiment_id = self._experiment(config.experiment)
                run = self._client.create_run(experiment_id, run_name=run_dir.resolve().name)
            else:
                run = self._client.get_run(run_id)
                self._client.update_run(run_id, status="RUNNING")
            self.run_id: str = run.info.run_id
            self._log_parameters(parameters, run.data.params, run.data.tags)
        except MlflowException as error:
            raise ValueError(
                f"tracking.uri is {self.uri}: {error}\n"
                + (f"MLflow run {run_id} is looked for there. " if run_id else "")
                + "Set tracking.uri to a store that can be reached, such as the default "
                + default_uri
            ) from error

        self.failures = 0
        self._failures_lock = threading.Lock()
        self._unsent_path = run_dir / UNSENT
        self._waiting: queue.SimpleQueue[_Record | None] = queue.SimpleQueue()
        self._sent_step = start_step
        self._send_what_was_missed(start_step)
        self._sender = threading.Thread(target=self._send_waiting, name="mlflow", daemon=True)
        self._sender.start()
        self._metrics_file = self._metrics_path.open("a")
        self._system_metrics = SystemMetricsMonitor(
            self.run_id, resume_logging=run_id is not None, tracking_uri=self.uri
        )
        self._system_metrics.start()

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Record numbers of one step: at once in `metrics.jsonl`, a little later in MLflow."""
        now_seconds = time.time()
        values = {  # JSON has no NaN
            name: value if math.isfinite(value) else str(value) for name, value in metrics.items()
        }
        record = {"step": step, "unix_seconds": round(now_seconds, 3), **values}
        self._metrics_file.write(json.dumps(record) + "\n")
        self._metrics_file.flush()
        self._send_metrics(metrics, step, now_seconds)

    def _send_metrics(self, metrics: dict[str, float], step: int, unix_seconds: float) -> None:
        from mlflow.entities import Metric

        entities = [
            Metric(name, float(value), int(unix_seconds * 1000), step)
            for name, value in metrics.items()
        ]
        self._send(lambda: self._client.log_batch(self.run_id, metrics=entities), step)

    def log_picture(self, path: Path) -> None:
        """Copy a picture of the run folder to MLflow's `pictures`; don't change the file after."""
        self._send(lambda: self._client.log_artifact(self.run_id, str(path), "pictures"))

    def log_file(self, path: Path) -> None:
        """Copy a file of the run folder to MLflow; don't change the file after."""
        self._send(lambda: self._client.log_artifact(self.run_id, str(path)))

    def close(self, status: Literal["FINISHED", "FAILED", "KILLED"] = "FINISHED") -> None:
        """End the record. Waits a minute at most for what is still on its way to MLflow."""
        self._metrics_file.close()
        self._send(self._system_metrics.finish)
        self._send(lambda: self._client.set_terminated(self.run_id, status))
        self._waiting.put(None)
        self._sender.join(CLOSE_SECONDS)
        if self._unsent_path.exists() or self._sender.is_alive():
            log.warning(
                "metrics after step %d are not in MLflow (%s); %s has them, and the next start of "
                "this run sends them",
                self._sent_step,
                self.uri,
                self._metrics_path,
            )

    def _experiment(self, name: str) -> str:
        """Id of the experiment, created where it doesn't exist."""
        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            database = self.uri.removeprefix("sqlite:///")
            artifacts = Path(database).resolve().parent / "mlartifacts"
            # A server places artifacts itself; SQLite would put them into the current folder.
            location = artifacts.as_uri() if database != self.uri else None
            try:
                return self._client.create_experiment(name, artifact_location=location)
            except self._mlflow_errors:
                experiment = self._client.get_experiment_by_name(name)
                if experiment is None:  # not one that another run has just created
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
        """Log parameters. One that changed since an earlier start becomes a tag: MLflow keeps the
        first value of a parameter for ever."""
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

    def _send(self, call: Callable[[], object], step: int | None = None) -> None:
        if self._waiting.qsize() < WAITING_RECORDS:
            self._waiting.put(_Record(call, step))
        else:
            self._note_unsent()
            self._count_failure("too many records are waiting")

    def _send_what_was_missed(self, start_step: int) -> None:
        """Metrics that MLflow did not take from an earlier start of the run."""
        if not self._unsent_path.exists():
            return
        after = read_json(self._unsent_path)["after_step"]
        missed = [one for one in read_metrics(self._metrics_path) if after < one["step"]]
        log.info("sending %d records that MLflow missed after step %d", len(missed), after)
        self._sent_step = after
        for record in missed:
            step, unix_seconds = int(record.pop("step")), record.pop("unix_seconds")
            self._send_metrics(record, step, unix_seconds)

    def _send_waiting(self) -> None:
        """In the thread: records in their order; one that is not taken keeps the others waiting."""
        unsent: deque[_Record] = deque()
        refused = False
        while (record := self._waiting.get()) is not None:
            unsent.append(record)
            while unsent:
                try:
                    unsent[0].call()
                except self._mlflow_errors as error:
                    self._count_failure(str(error))
                    self._note_unsent()
                    if _may_pass(error) and len(unsent) < WAITING_RECORDS:
                        break
                    refused = True
                else:
                    self._sent_step = unsent[0].step or self._sent_step
                unsent.popleft()
            if not unsent and not refused:
                self._unsent_path.unlink(missing_ok=True)

    def _note_unsent(self) -> None:
        if not self._unsent_path.exists():
            # A step's scores are a record of their own, so its last one may not be there.
            write_json(self._unsent_path, {"after_step": self._sent_step - 1})

    def _count_failure(self, reason: str) -> None:
        with self._failures_lock:
            self.failures += 1
            if self.failures % FAILURES_PER_MESSAGE == 1:
                log.warning(
                    "MLflow (%s) did not take a record, %d so far; training goes on and %s has all "
                    "metrics: %s",
                    self.uri,
                    self.failures,
                    self._metrics_path,
                    reason,
                )


@dataclass(frozen=True)
class _Record:
    """Something to tell MLflow; of a step's metrics, the step."""

    call: Callable[[], object]
    step: int | None


def _may_pass(error: Exception) -> bool:
    """Whether the store is away, rather than refusing what it was told."""
    # BAD_REQUEST is what MLflow makes of any error of its database.
    passing = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "BAD_REQUEST")
    return getattr(error, "error_code", "INTERNAL_ERROR") in passing


def log_files(record: dict[str, Any], name: str, files: Sequence[Path]) -> None:
    """Put files into an MLflow run of their own, in the experiment of another run.

    Args:
        record: `run.json` of the other run.
        name: of the run; one of this name is used again.
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
    """Number of experiments in a store; nothing is written.

    Args:
        uri: MLflow tracking URI.

    Raises:
        ValueError: the store can't be reached.
    """
    _quiet_and_impatient()
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        return len(MlflowClient(tracking_uri=uri).search_experiments())
    except (MlflowException, OSError) as error:
        raise ValueError(f"{uri}: {error}") from error


def _quiet_and_impatient() -> None:
    """Settings of MLflow that it reads when it is imported."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "true")
    # MLflow's own defaults wait many minutes for a server that is gone.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")


def flatten(values: dict[str, object], prefix: str = "") -> dict[str, object]:
    """Nested dictionaries as one, with dotted names."""
    flat: dict[str, object] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Records of a `metrics.jsonl`: `step`, `unix_seconds` and the metrics, non-finite ones too.

    A last line without an end, as a power cut leaves it, is left out.

    Raises:
        ValueError: a whole line that is not a record.
    """
    return [
        {name: float(value) for name, value in record.items()} for record in _read_records(path)
    ]


def _make_store(uri: str) -> None:
    """Make the SQLite file of a store that is not there yet: whole, or not at all.

    MLflow makes its tables one by one, some through temporary ones. Two runs that start together,
    or one that is killed meanwhile, would leave a file that no run can open.
    """
    from mlflow import MlflowClient

    if not uri.startswith("sqlite:///"):
        return
    path = Path(uri.removeprefix("sqlite:///"))
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            partial = path.with_name(f"{path.name}.partial")
            # With its journal, which SQLite would else roll back into the new file.
            for left in path.parent.glob(f"{partial.name}*"):
                left.unlink()
            MlflowClient(tracking_uri=f"sqlite:///{partial}").search_experiments(max_results=1)
            partial.replace(path)


def drop_metrics_after(path: Path, step: int) -> None:
    """Leave out the records after `step`, which the run is about to repeat.

    Raises:
        ValueError: a whole line that is not a record.
    """
    if not path.exists():
        return
    kept = [json.dumps(record) + "\n" for record in _read_records(path) if record["step"] <= step]
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(kept))
    partial.replace(path)


def _read_records(path: Path) -> list[dict[str, Any]]:
    records = []
    for number, line in enumerate(path.read_text().splitlines(keepends=True), start=1):
        if not line.endswith("\n"):
            break
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} line {number} is not JSON: {error}") from error
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise ValueError(f"{path} line {number} is not a record with a step: {line.strip()}")
        records.append(record)
    return records
