"""Runs as jobs of a Ray cluster: `cavmae submit`, `status`, `logs` and `stop`.

The last three take a run folder as well, of a run started in any way on storage that is seen here.
How a job ended is read from what its driver said, not from Ray's status: Ray calls drivers that
were killed SUCCEEDED.
"""

import os
import re
import shlex
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

import cavmae
from cavmae.atomic_write import read_json
from cavmae.cluster.config import RAY_KINDS
from cavmae.cluster.connection import passed_on
from cavmae.cluster.dry_run import dry_run
from cavmae.cluster.train import check_run, with_absolute_paths
from cavmae.trainer.config.parse import parse
from cavmae.trainer.fault_tolerance.preemption import request_stop, requested_stop
from cavmae.trainer.tracking.code_snapshot import git_commit

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
_FOLLOW_SECONDS = 1.0
_TABLE_WIDTH = 160
"""Nothing is cut off where the output goes to a file."""


# ------------------------------------------------------------------------------------ submit


def submit(arguments: list[str]) -> int:
    """`cavmae submit RECIPE [--field value ...]`, with the words of `cavmae train`."""
    config = parse(arguments, RAY_KINDS, "cavmae submit")
    check_run(config)
    with_absolute_paths(config, None)
    if arguments[0].endswith(".json") and not Path(arguments[0]).is_absolute():
        raise ValueError(
            f"{arguments[0]} is relative to this folder; give a path that the cluster's head has"
        )
    if config.cluster.dry_run:
        return dry_run(config)
    client = _client(config.cluster.address)
    for job in client.list_jobs():
        if (job.metadata or {}).get("run_dir") == config.run_dir and not job.status.is_terminal():
            raise ValueError(
                f"job {job.submission_id} already trains in run_dir {config.run_dir}; "
                f"`cavmae stop {job.submission_id}` first, or give another --run-dir"
            )
    name = re.sub(r"[^\w-]+", "-", Path(config.run_dir).name)
    job = client.submit_job(
        entrypoint=shlex.join(
            ["python", "-m", "cavmae.cluster.train", *_without_address(arguments)]
        ),
        submission_id=f"{name}-{time.strftime('%Y%m%d-%H%M%S')}",
        runtime_env=_runtime_env(),
        metadata={"run_dir": config.run_dir, "commit": git_commit() or "unknown"},
    )
    print(job)
    print(
        f"`cavmae status {job}`, `cavmae logs {job} --follow`, `cavmae stop {job}`; the ranks' "
        f"logs are in {config.run_dir}/logs",
        file=sys.stderr,
    )
    return 0


def _without_address(words: list[str]) -> list[str]:
    """A job finds its own cluster; the address is that of the job server."""
    kept, skip = [], False
    for word in words:
        if skip or word.startswith("--address="):
            skip = False
        elif word == "--address":
            skip = True
        else:
            kept.append(word)
    return kept


def _runtime_env() -> dict[str, Any]:
    """This tree's code, and the variables that ranks are to see. An installed wheel is not sent:
    the nodes have theirs."""
    environment = passed_on() | {"CAVMAE_COMMIT": git_commit() or ""}
    tree = Path(cavmae.__file__).resolve().parent.parent
    if tree == Path(sysconfig.get_path("purelib")).resolve():
        return {"env_vars": environment}
    return {"working_dir": str(tree), "env_vars": environment}


def _client(address: str) -> "JobSubmissionClient":
    from ray.job_submission import JobSubmissionClient

    address = address or os.environ.get("RAY_ADDRESS", "") or DEFAULT_ADDRESS
    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError) as error:
        raise ValueError(f"address {address}: no job server answers ({error})") from error


# ------------------------------------------------------------------------------------ status


@dataclass(frozen=True)
class StatusConfig:
    """How jobs and runs are.

    Raises:
        ValueError: no such job or run folder.
    """

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[JOB|RUN_FOLDER]")] = ""
    """Empty: all jobs of the cluster."""
    address: str = ""
    """Of the job server; empty: RAY_ADDRESS, else http://127.0.0.1:8265."""


def status(arguments: list[str]) -> int:
    """`cavmae status [JOB|RUN_FOLDER]`."""
    config = tyro.cli(StatusConfig, prog="cavmae status", args=arguments)
    table = Table("job or run", "state", "step", "run folder")
    if config.name and Path(config.name).is_dir():
        folder = Path(config.name)
        state, step = run_state(folder)
        table.add_row(folder.name, state, step, str(folder))
    else:
        client = _client(config.address)
        jobs = [_job(client, config.name)] if config.name else client.list_jobs()
        for job in sorted(jobs, key=lambda job: job.start_time or 0):
            if job.submission_id is None or "run_dir" not in (job.metadata or {}):
                continue
            assert job.metadata is not None
            text = client.get_job_logs(job.submission_id)
            state, step = job_state(str(job.status.value), text)
            table.add_row(job.submission_id, state, step, job.metadata["run_dir"])
    Console(width=_TABLE_WIDTH, highlight=False).print(table)
    return 0


def run_state(folder: Path) -> tuple[str, str]:
    """State and step of a run folder.

    Raises:
        ValueError: it is none.
    """
    from cavmae.trainer.tracking.metrics_file import read_metrics

    _check_run_folder(folder)
    steps = read_json(folder / "config.json")["steps"]  # of any version
    if (folder / "summary.json").exists():
        return "finished", f"{read_json(folder / 'summary.json')['step']}/{steps}"
    path = folder / "metrics.jsonl"
    records = list(read_metrics(path)) if path.exists() else []
    last = records[-1] if records else {"step": 0, "unix_seconds": 0.0}
    ago = f"last step told {time.time() - last['unix_seconds']:.0f} s ago" if records else "no step"
    asked = requested_stop(folder)
    return (f"asked to leave ({asked}), {ago}" if asked else ago), f"{int(last['step'])}/{steps}"


def _check_run_folder(folder: Path) -> None:
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} is no run folder: it has no config.json")


def job_state(ray_status: str, text: str) -> tuple[str, str]:
    """State and step of a job, from Ray's status and what its driver has said."""
    steps = re.findall(r"^step (\d+)/(\d+) ", text, re.MULTILINE)
    step = "/".join(steps[-1]) if steps else ""
    end = re.search(r": step (\d+) of (\d+)\s*$", text)
    if end:
        step = f"{end[1]}/{end[2]}"
        if end[1] == end[2]:
            return "finished", step
        left = re.findall(r"left at step \d+ of \d+ \((.*)\); the same", text)
        return f"left ({left[-1] if left else 'asked to'})", step
    if ray_status in ("PENDING", "RUNNING"):
        waits = re.findall(r"^waiting for .*$", text, re.MULTILINE)
        return (waits[-1] if waits and not steps else ray_status.lower()), step
    error = re.findall(r"^error: .*$", text, re.MULTILINE)
    return (error[-1] if error else f"ended without finishing ({ray_status.lower()})"), step


def _job(client: "JobSubmissionClient", name: str) -> Any:
    try:
        return client.get_job_info(name)
    except RuntimeError as error:
        known = ", ".join(job.submission_id for job in client.list_jobs() if job.submission_id)
        raise ValueError(f"{name!r} is no job and no run folder; jobs: {known or None}") from error


def _run_dir(job: Any) -> Path:
    """The run folder of a job."""
    if "run_dir" not in (job.metadata or {}):
        raise ValueError(
            f"job {job.submission_id} was not started by `cavmae submit`; give its run folder"
        )
    return Path(job.metadata["run_dir"])


# -------------------------------------------------------------------------------------- logs


@dataclass(frozen=True)
class LogsConfig:
    """What a run has said: the driver of a job, or one rank.

    Raises:
        ValueError: no such job, run folder or rank.
    """

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="JOB|RUN_FOLDER")]
    """The job, or the folder of a run."""
    rank: int = -1
    """Of this rank, from the run folder; -1: of a job's driver, which has rank 0's lines and the
    others' warnings; of a folder, rank 0."""
    follow: bool = False
    """Go on until the job ends."""
    address: str = ""
    """Of the job server; empty: RAY_ADDRESS, else http://127.0.0.1:8265."""


def logs(arguments: list[str]) -> int:
    """`cavmae logs JOB|RUN_FOLDER`."""
    config = tyro.cli(LogsConfig, prog="cavmae logs", args=arguments)
    if Path(config.name).is_dir():
        print(_rank_log(Path(config.name), max(config.rank, 0)), end="")
        return 0
    client = _client(config.address)
    job = _job(client, config.name)
    if config.rank >= 0:
        print(_rank_log(_run_dir(job), config.rank), end="")
        return 0
    told = 0
    while True:
        ended = client.get_job_status(config.name).is_terminal()
        text = client.get_job_logs(config.name)
        print(text[told:], end="", flush=True)
        told = len(text)
        if ended or not config.follow:
            return 0
        time.sleep(_FOLLOW_SECONDS)


def _rank_log(run_dir: Path, rank: int) -> str:
    path = run_dir / "logs" / f"rank-{rank}.log"
    if not path.exists():
        there = sorted(one.stem for one in path.parent.glob("rank-*.log"))
        raise ValueError(
            f"{path} is not here; "
            + (f"there are {', '.join(there)}" if there else "look for it on the cluster's storage")
        )
    return path.read_text()


# -------------------------------------------------------------------------------------- stop


@dataclass(frozen=True)
class StopConfig:
    """Ask a run to save and leave. The same command that started it goes on.

    Raises:
        ValueError: no such job or run folder.
    """

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="JOB|RUN_FOLDER")]
    """The job, or the folder of a run."""
    wait_seconds: float = 150.0
    """A job that is still there after this is ended without being saved."""
    address: str = ""
    """Of the job server; empty: RAY_ADDRESS, else http://127.0.0.1:8265."""


def stop(arguments: list[str]) -> int:
    """`cavmae stop JOB|RUN_FOLDER`."""
    config = tyro.cli(StopConfig, prog="cavmae stop", args=arguments)
    if Path(config.name).is_dir():
        _check_run_folder(Path(config.name))
        request_stop(Path(config.name), "cavmae stop")
        print(f"{config.name}: asked to save and leave", file=sys.stderr)
        return 0
    client = _client(config.address)
    job = _job(client, config.name)
    if not job.status.is_terminal():
        # The run folder may be on storage of the cluster alone.
        asking = client.submit_job(
            entrypoint=shlex.join(["python", "-m", "cavmae", "stop", str(_run_dir(job))]),
            runtime_env=_runtime_env(),
        )
        _wait_for_end(client, config, asking)
    state, step = job_state("STOPPED", client.get_job_logs(config.name))
    print(f"{config.name}: {state}, step {step}", file=sys.stderr)
    return 0


def _wait_for_end(client: "JobSubmissionClient", config: StopConfig, asking: str) -> None:
    """Until the job has left; ends it where it does not, or has nothing to save."""
    deadline = time.monotonic() + config.wait_seconds
    while not client.get_job_status(config.name).is_terminal():
        if str(client.get_job_status(asking).value) == "FAILED":
            said = client.get_job_logs(asking).strip()
            if job_state("RUNNING", client.get_job_logs(config.name))[1]:
                raise ValueError(f"{config.name} could not be asked to leave: {said}")
            client.stop_job(config.name)  # it has not begun: there is no run folder
            return
        if time.monotonic() > deadline:
            client.stop_job(config.name)
            print(
                f"{config.name} did not leave within {config.wait_seconds:g} s and was ended; "
                "it goes on from its newest checkpoint",
                file=sys.stderr,
            )
            return
        time.sleep(_FOLLOW_SECONDS)
