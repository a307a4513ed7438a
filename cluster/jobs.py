"""Runs as jobs of a Ray cluster: `cavmae submit`, `status`, `logs` and `stop`.

The last three also take a run folder, of a run started in any way on storage that is seen here.
A job's state is read from the status lines of its driver (`status_relay.py`), as its run folder may
be on the cluster's storage alone. Ray's own status tells only whether the driver runs: Ray calls
drivers that were killed SUCCEEDED.
"""

import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPException
from ipaddress import ip_address
from pathlib import Path
from socket import getaddrinfo
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import urlopen

import tyro

from cavmae.cluster.connection import ANSWER_SECONDS, passed_on, source_tree
from cavmae.cluster.status_relay import VARIABLE
from cavmae.cluster.train import checked_job
from cavmae.console import JsonOption, print_json, print_rows
from cavmae.field_checks import CheckedFields
from cavmae.trainer.fault_tolerance.preemption import request_stop, requested_stop
from cavmae.trainer.run_status import last_line, read_status
from cavmae.trainer.tracking.code_snapshot import code_files, git_commit

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
_FOLLOW_SECONDS = 1.0
_STOPS = "stops"
"""Metadata of a job that does nothing but ask another one to stop."""


# ------------------------------------------------------------------------------------ submit


def submit(arguments: list[str]) -> int:
    """`cavmae submit RECIPE [--field value ...]`, with the words of `cavmae train`."""
    config = checked_job(arguments, "cavmae submit")
    if arguments[0].endswith(".json") and not Path(arguments[0]).is_absolute():
        raise ValueError(
            f"{arguments[0]} is relative to this folder; give a path that the cluster's head has"
        )
    if config.cluster.dry_run:
        from cavmae.cluster.dry_run import dry_run  # needs torch

        return dry_run(config, ask_cluster=False)  # a job server does not tell its nodes
    client = _client(config.cluster.address)
    for job in client.list_jobs():
        if (job.metadata or {}).get("run_dir") == config.run_dir and not job.status.is_terminal():
            raise ValueError(
                f"job {job.submission_id} already trains in run_dir {config.run_dir}; "
                f"`cavmae stop {job.submission_id}` first, or give another --run-dir"
            )
    status = read_status(Path(config.run_dir))
    if status and status.alive:
        raise ValueError(
            f"run_dir {config.run_dir} is in use: {status.describe()} at step {status.progress()}; "
            f"`cavmae stop {config.run_dir}` first, or give another --run-dir"
        )
    name = re.sub(r"[^\w-]+", "-", Path(config.run_dir).name)
    with _runtime_env() as runtime_env:
        job = client.submit_job(
            entrypoint=shlex.join(
                # The address is the job server's: a job finds its own cluster.
                ["python", "-m", "cavmae.cluster.train", *arguments, "--address="]
            ),
            submission_id=f"{name}-{time.strftime('%Y%m%d-%H%M%S')}",
            runtime_env=runtime_env,
            metadata={"run_dir": config.run_dir, "commit": git_commit() or "unknown"},
        )
    print(job)
    print(
        f"`cavmae status {job}`, `cavmae logs {job} --follow`, `cavmae stop {job}`; the ranks' "
        f"logs are in {config.run_dir}/logs",
        file=sys.stderr,
    )
    return 0


@contextmanager
def _runtime_env() -> Iterator[dict[str, Any]]:
    """Yield what Ray sends to the job: a copy of the running Python files alone, and variables for
    driver and ranks. An installed wheel is not sent: the nodes have theirs."""
    environment = passed_on() | {"CAVMAE_COMMIT": git_commit() or "", VARIABLE: "1"}
    if source_tree() is None:
        yield {"env_vars": environment}
        return
    with TemporaryDirectory() as folder:
        # Ray would send all that lies in the checkout, follow links, and end at 100 MiB.
        for name, path in code_files().items():
            target = Path(folder, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        yield {"env_vars": environment, "working_dir": folder}


def _client(address: str, name: str = "") -> "JobSubmissionClient":
    """Connect to a job server, which a name that is no folder is looked up at."""
    source = "--address" if address else "RAY_ADDRESS"
    address = address or os.environ.get("RAY_ADDRESS", "") or DEFAULT_ADDRESS
    if not address.startswith(("http://", "https://")):
        raise ValueError(
            f"{source} is {address}, and jobs go to the head's job server: give http://HOST:8265 "
            "(HOST:6379 and auto are for `cavmae train`)"
        )
    _check_token_stays_inside(source, address)
    try:
        with suppress(HTTPError):  # Ray's client would wait for an answer without end
            urlopen(f"{address.rstrip('/')}/api/version", timeout=ANSWER_SECONDS).close()
        from ray.job_submission import JobSubmissionClient

        return JobSubmissionClient(address)
    # What answers may be no job server, or no HTTP server.
    except (OSError, RuntimeError, ValueError, LookupError, HTTPException) as error:
        no_folder = f"there is no folder {name}, and at " if name else ""
        raise ValueError(
            f"{no_folder}address {address}: no job server answers ({error})"
        ) from error


def _check_token_stays_inside(source: str, address: str) -> None:
    """Refuse to send the cluster's token unencrypted beyond networks that are private.

    Raises:
        ValueError: the job server is there; names the fix.
    """
    where = urlsplit(address)
    if os.environ.get("RAY_AUTH_MODE") != "token" or where.scheme == "https":
        return
    try:
        hosts = {found[4][0] for found in getaddrinfo(where.hostname, where.port)}
    except (OSError, ValueError):  # nothing is sent to it
        return
    public = sorted(host for host in hosts if ip_address(str(host).partition("%")[0]).is_global)
    if public:
        raise ValueError(
            f"{source} is {address}, a public address ({public[0]}), and http:// would show the "
            "cluster's token to every network on the way; give https://, or forward the port "
            "(`kubectl port-forward`, `ssh -L`) and give http://127.0.0.1:8265"
        )


# ------------------------------------------------------------------------------------ status


@dataclass(frozen=True)
class StatusConfig(CheckedFields, JsonOption):
    """Show the state of jobs and runs.

    Raises:
        ValueError: no such job or run folder.
    """

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[JOB|RUN_FOLDER]")] = ""
    """The job, or the folder of a run; empty: all jobs of the cluster."""
    address: str = ""
    """Address of the job server; empty: RAY_ADDRESS, else http://127.0.0.1:8265."""


def status(arguments: list[str]) -> int:
    """`cavmae status [JOB|RUN_FOLDER]`."""
    config = tyro.cli(StatusConfig, prog="cavmae status", args=arguments)
    if config.name and Path(config.name).is_dir():
        folder = Path(config.name)
        rows = [(folder.name, *run_state(folder), str(folder))]
    else:
        client = _client(config.address, config.name)
        jobs = [_job(client, config.name)] if config.name else client.list_jobs()
        rows = [
            _row(client, job)
            for job in sorted(jobs, key=lambda job: job.start_time or 0)
            if job.submission_id is not None and _STOPS not in (job.metadata or {})
        ]
    columns = ("job or run", "state", "step", "run folder or command")
    if config.json:
        names = ("name", "state", "step", "run_dir_or_command")
        print_json([dict(zip(names, row, strict=True)) for row in rows])
    else:
        print_rows(columns, rows, paths=columns[3:], whole=columns[:1])
    return 0


def _row(client: "JobSubmissionClient", job: Any) -> tuple[str, str, str, str]:
    """Return name, state, step and run folder of a job; of one by plain `ray job submit`, Ray's
    state and its command, unless the run folder that the command names is seen here."""
    name, ray_status = job.submission_id, str(job.status.value)
    if run_dir := (job.metadata or {}).get("run_dir"):
        return name, *job_state(ray_status, client.get_job_logs(name)), run_dir
    folder = _folder_in(job.entrypoint)
    if folder and (status := read_status(folder)) is not None:
        return name, status.describe(), status.progress(), str(folder)
    return name, f"{ray_status.lower()}, says Ray", "", job.entrypoint


def _folder_in(command: str) -> Path | None:
    """Return the run folder that a command names by an absolute path; None where it names none."""
    found = re.search(r"--run[-_]dir[= ](.+)", command)
    try:
        folder = Path(shlex.split(found[1])[0]) if found else None
    except ValueError:  # a quote that is not closed
        return None
    return folder if folder and folder.is_absolute() else None


def run_state(folder: Path) -> tuple[str, str]:
    """Return state and step of a run folder.

    Raises:
        ValueError: it is none, or was written by a version that kept no status.
    """
    status = read_status(folder)
    if status is None:
        _check_run_folder(folder)
        raise ValueError(
            f"{folder} has no status.json; use the version that wrote it (the commits are in "
            "run.json), or rerun its command with this one"
        )
    requested = requested_stop(folder) if status.alive else ""
    state = f"stop requested: {requested}" if requested else status.describe()
    return state, status.progress()


def _check_run_folder(folder: Path) -> None:
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} is not a run folder: it has no config.json")


def job_state(ray_status: str, log: str) -> tuple[str, str]:
    """Return state and step of a job.

    Args:
        ray_status: Ray's status of the driver.
        log: the driver's output, of which only status lines are read.
    """
    status = last_line(log)
    step = status.progress() if status else ""
    if ray_status in ("PENDING", "RUNNING"):
        return (status.describe() if status else ray_status.lower()), step
    if status and status.state in ("finished", "stopped", "failed"):
        return status.describe(), step
    return f"ended without finishing ({ray_status.lower()}); see `cavmae logs`", step


def _job(client: "JobSubmissionClient", name: str) -> Any:
    try:
        return client.get_job_info(name)
    except RuntimeError as error:
        known = ", ".join(job.submission_id for job in client.list_jobs() if job.submission_id)
        raise ValueError(
            f"{name!r} is neither a job nor a run folder; jobs: {known or None}"
        ) from error


def _run_dir(job: Any) -> Path:
    """Return the run folder of a job."""
    if "run_dir" not in (job.metadata or {}):
        raise ValueError(
            f"job {job.submission_id} was not started by `cavmae submit`; give its run folder"
        )
    return Path(job.metadata["run_dir"])


# -------------------------------------------------------------------------------------- logs


@dataclass(frozen=True)
class LogsConfig(CheckedFields):
    """Print the log of a run: of a job's driver, or of one rank.

    Raises:
        ValueError: no such job, run folder or rank.
    """

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="JOB|RUN_FOLDER")]
    """The job, or the folder of a run."""
    rank: int = -1
    """Print this rank's log, from the run folder; -1: the log of a job's driver, which has rank 0's
    lines and the others' warnings, or of a folder's rank 0."""
    follow: bool = False
    """Continue until the job ends."""
    address: str = ""
    """Address of the job server; empty: RAY_ADDRESS, else http://127.0.0.1:8265."""


def logs(arguments: list[str]) -> int:
    """`cavmae logs JOB|RUN_FOLDER`."""
    config = tyro.cli(LogsConfig, prog="cavmae logs", args=arguments)
    if Path(config.name).is_dir():
        print(_rank_log(Path(config.name), max(config.rank, 0)), end="")
        return 0
    client = _client(config.address, config.name)
    job = _job(client, config.name)
    if config.rank >= 0:
        print(_rank_log(_run_dir(job), config.rank), end="")
        return 0
    printed = 0
    while True:
        ended = client.get_job_status(config.name).is_terminal()
        text = client.get_job_logs(config.name)
        print(text[printed:], end="", flush=True)
        printed = len(text)
        if ended or not config.follow:
            return 0
        time.sleep(_FOLLOW_SECONDS)


def _rank_log(run_dir: Path, rank: int) -> str:
    path = run_dir / "logs" / f"rank-{rank}.log"
    if not path.exists():
        present = sorted(one.stem for one in path.parent.glob("rank-*.log"))
        raise ValueError(
            f"{path} does not exist here; "
            + (f"found {', '.join(present)}" if present else "look on the cluster's storage")
        )
    return path.read_text()


# -------------------------------------------------------------------------------------- stop


@dataclass(frozen=True)
class StopConfig(CheckedFields):
    """Have a run save a checkpoint and stop. Rerun the command that started it to resume.

    Raises:
        ValueError: no such job or run folder.
    """

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="JOB|RUN_FOLDER")]
    """The job, or the folder of a run."""
    wait_seconds: float = 150.0
    """A job that still runs after this is killed without being saved."""
    address: str = ""
    """Address of the job server; empty: RAY_ADDRESS, else http://127.0.0.1:8265."""


def stop(arguments: list[str]) -> int:
    """`cavmae stop JOB|RUN_FOLDER`."""
    config = tyro.cli(StopConfig, prog="cavmae stop", args=arguments)
    if Path(config.name).is_dir():
        _check_run_folder(Path(config.name))
        request_stop(Path(config.name), "cavmae stop")
        print(f"{config.name}: stop requested; it saves a checkpoint first", file=sys.stderr)
        return 0
    client = _client(config.address, config.name)
    job = _job(client, config.name)
    if not job.status.is_terminal():
        # The run folder may be on the cluster's storage alone.
        with _runtime_env() as runtime_env:
            request = client.submit_job(
                entrypoint=shlex.join(["python", "-m", "cavmae", "stop", str(_run_dir(job))]),
                runtime_env=runtime_env,
                metadata={_STOPS: config.name},
            )
        _wait_for_end(client, config, request)
    state, step = job_state("STOPPED", client.get_job_logs(config.name))
    print(f"{config.name}: {state}, step {step}", file=sys.stderr)
    return 0


def _wait_for_end(client: "JobSubmissionClient", config: StopConfig, request: str) -> None:
    """Wait until the job has stopped; kill it if it does not, or has nothing to save."""
    deadline = time.monotonic() + config.wait_seconds
    while not client.get_job_status(config.name).is_terminal():
        if str(client.get_job_status(request).value) == "FAILED":
            said = client.get_job_logs(request).strip()
            status = last_line(client.get_job_logs(config.name))
            if status and status.step:
                raise ValueError(f"{config.name} could not be stopped: {said}")
            client.stop_job(config.name)  # there is no run yet, and nothing to save
            return
        if time.monotonic() > deadline:
            client.stop_job(config.name)
            print(
                f"{config.name} did not stop within {config.wait_seconds:g} s and was killed; "
                "rerun its command to resume from the newest checkpoint",
                file=sys.stderr,
            )
            return
        time.sleep(_FOLLOW_SECONDS)
