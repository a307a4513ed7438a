"""What is shown of a job, and what is refused before it becomes one (the real thing is in
tests/trainer/test_launchers.py)."""

import json
import shlex
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_run import tiny_run

from cavmae.cluster import jobs, status_relay
from cavmae.cluster.config import RAY_KINDS
from cavmae.cluster.jobs import job_state, logs, run_state, status, stop, submit
from cavmae.trainer.config.parse import parse
from cavmae.trainer.config.serialize import save_config
from cavmae.trainer.fault_tolerance.preemption import requested_stop
from cavmae.trainer.run_status import RunStatus, last_line, write_status

RUN = RunStatus("running", step=20, steps=40, attempt=1, updated_at=time.time() + 3600)
WAITING = RunStatus("waiting", reason="8 GPUs (the cluster has 4)")


def log_of(*statuses: RunStatus) -> str:
    """The output of a driver, with messages whose words mean nothing to programs."""
    lines = [f"step 39/40  error: no\n{status.line()}\nleft at step 7" for status in statuses]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("ray_status", "log", "expected"),
    [
        ("PENDING", "", ("pending", "")),
        ("RUNNING", "", ("running", "")),
        ("RUNNING", log_of(WAITING), ("waiting: 8 GPUs (the cluster has 4)", "0")),
        ("RUNNING", log_of(WAITING, RUN), ("running", "20/40")),
        ("RUNNING", log_of(RUN) + RUN.line()[:-9], ("running", "20/40")),
        (
            "SUCCEEDED",
            log_of(RUN, replace(RUN, state="finished", step=40)),
            ("finished", "40/40"),
        ),
        (
            "SUCCEEDED",
            log_of(RUN),
            ("ended without finishing (succeeded); see `cavmae logs`", "20/40"),
        ),
        (
            "FAILED",
            log_of(RUN, replace(RUN, state="failed", last_error="disk full")),
            ("failed: disk full", "20/40"),
        ),
        (
            "FAILED",
            log_of(replace(RUN, state="stopped", step=21, reason="cavmae stop")),
            ("stopped: cavmae stop", "21/40"),
        ),
        ("FAILED", "error: no", ("ended without finishing (failed); see `cavmae logs`", "")),
    ],
)
def test_the_state_of_a_job_is_read_from_the_status_lines_of_its_driver(
    ray_status: str, log: str, expected: tuple[str, str]
) -> None:
    assert job_state(ray_status, log) == expected


def test_a_driver_in_a_job_repeats_each_state_as_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(status_relay, "_POLL_SECONDS", 0.01)
    write_status(tmp_path, state="stopped", step=3, steps=40)  # by a job before
    printed = ""

    def wait_for(state: str) -> RunStatus:
        nonlocal printed
        deadline = time.monotonic() + 30
        while (found := last_line(printed)) is None or found.state != state:
            assert time.monotonic() < deadline
            time.sleep(0.01)
            printed += capsys.readouterr().out
        return found

    monkeypatch.setenv(status_relay.VARIABLE, "1")
    with status_relay.StatusRelay(tmp_path):
        write_status(tmp_path, state="running", step=4)
        assert wait_for("running").step == 4
        write_status(tmp_path, step=5)  # is no other state
        write_status(tmp_path, state="finished", step=40)
    printed += capsys.readouterr().out
    assert wait_for("finished").step == 40
    assert '"step": 3' not in printed and '"step": 5' not in printed
    monkeypatch.delenv(status_relay.VARIABLE)
    with status_relay.StatusRelay(tmp_path):
        write_status(tmp_path, state="running")
    assert not capsys.readouterr().out, "the output of a driver at a terminal is for people"


def job(
    name: str, ray_status: str, entrypoint: str, start: int, **metadata: str
) -> SimpleNamespace:
    return SimpleNamespace(
        submission_id=name,
        status=SimpleNamespace(value=ray_status),
        entrypoint=entrypoint,
        start_time=start,
        metadata=metadata or None,
    )


@pytest.mark.field
def test_jobs_of_a_plain_submission_are_listed_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ray lists drivers without a submission as well; the job that stops another one is no run."""
    seen = tmp_path / "seen here"
    write_status(seen, state="finished", step=40, steps=40)
    train = "python -m cavmae.cluster.train demo"
    jobs_of_ray = [
        job("raysubmit_2", "FAILED", f"{train} --run-dir '{seen}'", 3),
        job("raysubmit_1", "RUNNING", f"{train} --run-dir=/not/here --steps 5", 2),
        job("run-1", "RUNNING", f"{train} --run-dir /r", 1, run_dir="/r", commit="c"),
        job("raysubmit_0", "SUCCEEDED", "python -m cavmae stop /r", 4, stops="run-1"),
        SimpleNamespace(submission_id=None, start_time=5, metadata={}),
    ]
    client = SimpleNamespace(list_jobs=lambda: jobs_of_ray, get_job_logs=lambda _: log_of(RUN))
    monkeypatch.setattr(jobs, "_client", lambda *_: client)
    assert status([]) == 0
    assert [line.split("\t") for line in capsys.readouterr().out.splitlines()[1:]] == [
        ["run-1", "running", "20/40", "/r"],
        ["raysubmit_1", "running, says Ray", "", f"{train} --run-dir=/not/here --steps 5"],
        ["raysubmit_2", "finished", "40/40", str(seen)],
    ]
    assert status(["--json"]) == 0
    first, *_ = json.loads(capsys.readouterr().out)
    assert first == {
        "name": "run-1", "state": "running", "step": "20/40", "run_dir_or_command": "/r",
    }  # fmt: skip


@pytest.mark.field
def test_an_error_with_brackets_is_shown_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_status(tmp_path, state="failed", steps=20, last_error="no [id] in [/data/x.mp4]")
    assert status([str(tmp_path)]) == 0
    assert "no [id] in [/data/x.mp4]" in capsys.readouterr().out


def test_a_run_that_trains_outside_of_the_cluster_is_not_submitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "_client", lambda _: SimpleNamespace(list_jobs=list))
    write_status(tmp_path, state="running", step=3, steps=40)
    with pytest.raises(ValueError, match=r"is in use: running at step 3/40; `cavmae stop"):
        submit(["demo", "--data.train", "/s", "--run-dir", str(tmp_path)])


def test_a_job_uses_its_own_cluster_and_not_the_address_of_the_job_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entrypoints: list[str] = []

    def submit_job(entrypoint: str, **_: object) -> str:
        entrypoints.append(entrypoint)
        return "job"

    client = SimpleNamespace(list_jobs=list, submit_job=submit_job)
    monkeypatch.setattr(jobs, "_client", lambda _: client)
    words = ["demo", "--data.train", "/s", "--run-dir", str(tmp_path), "--workers", "4"]
    for address in (["--address", "http://a:8265"], ["--address=http://b"]):
        submit([*words, *address])
        driver = shlex.split(entrypoints.pop())
        assert driver[:3] == ["python", "-m", "cavmae.cluster.train"]
        config = parse(driver[3:], RAY_KINDS, "cavmae train")
        assert (config.cluster.address, config.cluster.workers) == ("", 4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["demo"], "data.train is empty"),
        (["demo", "--data.train", "shards"], "relative to the copy of the code"),
        (
            ["demo", "--data.train", "/s", "--run-dir", "/r", "--workers", "129"],
            "there are 129 ranks and global_batch is 128",
        ),
        (
            ["demo", "--data.train", "/s", "--run-dir", "/r", "--address", "http://127.0.0.1:1"],
            "address http://127.0.0.1:1: no job server answers",
        ),
    ],
)
def test_what_could_not_start_is_not_submitted(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        submit(words)


@pytest.mark.field
@pytest.mark.parametrize("by_variable", [True, False])
def test_the_address_of_a_cluster_is_not_one_of_a_job_server(
    monkeypatch: pytest.MonkeyPatch, by_variable: bool
) -> None:
    words = ["demo", "--data.train", "/s", "--run-dir", "/r"]
    source = "RAY_ADDRESS" if by_variable else "--address"
    for address in ("127.0.0.1:6379", "auto", "ray://127.0.0.1:10001"):
        monkeypatch.setenv("RAY_ADDRESS", address if by_variable else "")
        with pytest.raises(ValueError, match=f"{source} is {address}.*give http://HOST:8265"):
            submit(words if by_variable else [*words, "--address", address])


@pytest.mark.field
def test_a_server_that_never_answers_is_no_job_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "ANSWER_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ValueError, match=f"address {address}: no job server answers"):
            status(["--address", address])


@pytest.mark.field
def test_only_the_code_is_sent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sent: dict[str, Path] = {}

    def submit_job(runtime_env: dict[str, str], **_: object) -> str:
        folder = Path(runtime_env["working_dir"])
        sent.update({str(path.relative_to(folder)): path for path in folder.rglob("*.*")})
        assert not [path for path in sent.values() if path.is_symlink()]
        return "job"

    client = SimpleNamespace(list_jobs=list, submit_job=submit_job)
    monkeypatch.setattr(jobs, "_client", lambda _: client)
    submit(["demo", "--data.train", "/s", "--run-dir", str(tmp_path)])
    assert {"cavmae/cli.py", "cavmae/cluster/train.py", "cavmae/trainer/run.py"} <= sent.keys()
    assert all(name.endswith(".py") for name in sent)
    assert not next(iter(sent.values())).exists(), "the copy is removed"


@pytest.mark.parametrize("command", [status, logs, stop])
def test_a_mistyped_run_folder_is_named_where_no_job_server_answers(
    command: Callable[[list[str]], int],
) -> None:
    message = "there is no folder runs/dmo, and at address http://127.0.0.1:1: no job server"
    with pytest.raises(ValueError, match=message):
        command(["runs/dmo", "--address", "http://127.0.0.1:1"])


def test_a_configuration_beside_the_user_is_not_one_of_the_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_config(tiny_run(tmp_path, tmp_path), tmp_path / "mine.json")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"mine\.json is relative to this folder"):
        submit(["mine.json"])


def test_a_run_folder_can_be_asked_without_a_cluster(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match="is not a run folder"):
        run_state(tmp_path)
    save_config(tiny_run(tmp_path, tmp_path), tmp_path / "config.json")
    with pytest.raises(ValueError, match=r"has no status\.json; use the version that wrote it"):
        run_state(tmp_path)
    write_status(tmp_path, state="running", steps=20)
    assert run_state(tmp_path) == ("running", "0/20")
    assert stop([str(tmp_path)]) == 0
    assert requested_stop(tmp_path) == "cavmae stop"
    assert status([str(tmp_path)]) == 0
    assert "0/20" in capsys.readouterr().out
    assert run_state(tmp_path) == ("stop requested: cavmae stop", "0/20")
    with pytest.raises(ValueError, match=r"rank-3\.log does not exist here"):
        logs([str(tmp_path), "--rank", "3"])
