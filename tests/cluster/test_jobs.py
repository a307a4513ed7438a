"""What is told of a job, and what is refused before it becomes one (the real thing is in
tests/trainer/test_launchers.py)."""

from pathlib import Path

import pytest
from tiny_run import tiny_run

from cavmae.cluster.jobs import _without_address, job_state, logs, run_state, status, stop, submit
from cavmae.trainer.config.serialize import save_config
from cavmae.trainer.fault_tolerance.preemption import requested_stop

STEPS = "step 10/40  loss 1.2  3.0 samples/s\nstep 20/40  loss 1.1  3.0 samples/s\n"


@pytest.mark.parametrize(
    ("ray_status", "text", "expected"),
    [
        ("PENDING", "", ("pending", "")),
        ("RUNNING", "waiting for 8 GPUs\n", ("waiting for 8 GPUs", "")),
        ("RUNNING", "waiting for 8 GPUs\n" + STEPS, ("running", "20/40")),
        ("SUCCEEDED", STEPS + "/runs/a: step 40 of 40\n", ("finished", "40/40")),
        ("SUCCEEDED", STEPS, ("ended without finishing (succeeded)", "20/40")),
        ("FAILED", STEPS + "error: disk full\n", ("error: disk full", "20/40")),
        (
            "FAILED",
            STEPS + "left at step 21 of 40 (cavmae stop); the same command goes on\n"
            "/runs/a: step 21 of 40\n",
            ("left (cavmae stop)", "21/40"),
        ),
    ],
)
def test_how_a_job_is_comes_from_what_its_driver_said(
    ray_status: str, text: str, expected: tuple[str, str]
) -> None:
    assert job_state(ray_status, text) == expected


def test_a_job_is_not_told_the_address_of_the_job_server() -> None:
    words = ["demo", "--address", "http://a:8265", "--workers", "8", "--address=http://b", "x"]
    assert _without_address(words) == ["demo", "--workers", "8", "x"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["demo"], "data.train is empty"),
        (["demo", "--data.train", "shards"], "relative to the copy of the code"),
        (
            ["demo", "--data.train", "/s", "--run-dir", "/r", "--workers", "3"],
            "world_size is 3, which does not divide",
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
    with pytest.raises(ValueError, match="is no run folder"):
        run_state(tmp_path)
    save_config(tiny_run(tmp_path, tmp_path), tmp_path / "config.json")
    assert run_state(tmp_path) == ("no step", "0/20")
    assert stop([str(tmp_path)]) == 0
    assert requested_stop(tmp_path) == "cavmae stop"
    assert status([str(tmp_path)]) == 0
    assert "0/20" in capsys.readouterr().out
    assert run_state(tmp_path) == ("asked to leave (cavmae stop), no step", "0/20")
    with pytest.raises(ValueError, match=r"rank-3\.log is not here"):
        logs([str(tmp_path), "--rank", "3"])
