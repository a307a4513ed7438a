"""Training on Ray: what the command takes, what it says when it fails, and what it survives."""

import dataclasses
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from launch import ROOT
from starts import Start, place_store
from tiny_run import losses, tiny_run
from torch.distributed import DistNetworkError

from cavmae.cluster import train, worker
from cavmae.cluster.config import RAY_KINDS, ClusterConfig, RayFinetuneConfig, RayPretrainConfig
from cavmae.cluster.restarts import Failure, RestartPolicy
from cavmae.cluster.train import TrainingError, started_again, train_on_ray, with_absolute_paths
from cavmae.cluster.worker import FailureReport, RankError, RanksFailed, failure_of, reports
from cavmae.dataloaders.loading.quarantine import DataFaultError
from cavmae.dataloaders.sampling.step_shares import check_ranks
from cavmae.trainer.checkpoint.format import MANIFEST
from cavmae.trainer.config.configs import CheckpointConfig, PretrainConfig, TrackingConfig
from cavmae.trainer.config.parse import parse
from cavmae.trainer.config.recipes import demo
from cavmae.trainer.config.resolve import check_same_run
from cavmae.trainer.config.serialize import save_config
from cavmae.trainer.fault_tolerance.preemption import START_AGAIN_EXIT_CODE, request_stop
from cavmae.trainer.run_status import LauncherStatus, read_status, write_status
from cavmae.trainer.run_summary import RunSummary
from cavmae.trainer.trainer import NonFiniteError


def test_cluster_fields_are_given_beside_those_of_the_run() -> None:
    config = parse(
        ["demo", "--workers", "4", "--gpus-per-worker", "1", "--steps", "7"],
        RAY_KINDS,
        "cavmae train",
    )
    assert config.cluster == ClusterConfig(workers=4, gpus_per_worker=1)
    assert config.steps == 7
    assert config.model == demo().model


def test_the_recipe_decides_between_pretraining_and_fine_tuning(tmp_path: Path) -> None:
    words = ["vggsound", "--workers", "4", "--classifier.labels", "labels.csv"]
    config = parse(words, RAY_KINDS, "cavmae train")
    assert isinstance(config, RayFinetuneConfig) and config.cluster.workers == 4
    absolute = with_absolute_paths(config, tmp_path)
    assert isinstance(absolute, RayFinetuneConfig)
    assert absolute.classifier.labels == f"{tmp_path}/labels.csv"


def test_failed_ranks_are_started_again_unless_forbidden() -> None:
    assert ClusterConfig().max_failures > 0


@pytest.mark.parametrize(
    ("field", "value"), [("workers", 0), ("gpus_per_worker", 2), ("max_failures", -1)]
)
def test_a_cluster_field_out_of_range_is_named(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"^{field} is {value}"):
        ClusterConfig(**{field: value})  # pyright: ignore[reportArgumentType]


def test_more_ranks_than_samples_in_a_step_are_refused_before_ray_starts() -> None:
    config = RayPretrainConfig(global_batch=8, cluster=ClusterConfig(workers=9))
    with pytest.raises(ValueError, match="there are 9 ranks"):
        train_on_ray(config)


def test_data_that_are_not_there_are_missed_before_ray_starts(tmp_path: Path) -> None:
    config = parse(["demo", "--data.train", str(tmp_path / "nowhere")], RAY_KINDS, "train")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        train_on_ray(config)


def test_each_set_of_a_mixture_is_looked_for(tmp_path: Path, packed_synthetic: Path) -> None:
    sets = f"{packed_synthetic / 'frames'},{tmp_path / 'nowhere'}"
    config = parse(["demo", "--data.train", sets], RAY_KINDS, "cavmae train")
    nowhere = re.escape(str(tmp_path / "nowhere" / "index.json"))
    with pytest.raises(FileNotFoundError, match=f"^{nowhere}"):
        train_on_ray(config)


def test_ranks_get_absolute_paths(tmp_path: Path) -> None:
    config = parse(
        [
            *("demo", "--run-dir", "runs/mine", "--data.train", "/shards/video"),
            *("--data.validation", "val/video", "--tracking.uri", "sqlite:///runs/all.db"),
            *("--checkpoint.folder", "checkpoints/mine"),
        ],
        RAY_KINDS,
        "cavmae train",
    )
    absolute = with_absolute_paths(config, tmp_path)
    assert absolute.run_dir == f"{tmp_path}/runs/mine"
    assert absolute.data.train == "/shards/video"
    assert absolute.data.validation == f"{tmp_path}/val/video"
    assert absolute.tracking.uri == f"sqlite:///{tmp_path}/runs/all.db"
    assert absolute.checkpoint.folder == f"{tmp_path}/checkpoints/mine"
    assert absolute.initial_weights == "", "nothing was given, nothing is looked for"


@pytest.mark.parametrize("uri", ["", "http://tracker:5000", "sqlite:////runs/all.db"])
def test_tracking_uris_that_are_no_relative_paths_stay(uri: str, tmp_path: Path) -> None:
    config = RayPretrainConfig(tracking=TrackingConfig(uri=uri))
    assert with_absolute_paths(config, tmp_path).tracking.uri == uri


def test_a_ray_job_refuses_paths_into_its_own_copy_of_the_code() -> None:
    config = parse(["demo", "--run-dir", "runs/mine"], RAY_KINDS, "train")
    with pytest.raises(ValueError, match="run_dir is 'runs/mine', relative to the copy"):
        with_absolute_paths(config, None)


def start_on_ray(config: PretrainConfig, folder: Path, *words: str) -> "subprocess.Popen[str]":
    save_config(config, folder / "config.json")
    place_store(folder)
    return subprocess.Popen(
        [sys.executable, "-m", "cavmae.cluster.train", str(folder / "config.json"), *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


DONE = RunSummary("run", 60, 60, "", 0, 0, 1.0, 1.0)
DEAD = Failure("crash", "ActorDiedError", "the process is gone", rank=1)
AWAY = Failure("missing", "FileNotFoundError", "/data/index.json", rank=0)


class Driver(train._Driver):
    """Whose attempts end as they are told to."""

    def __init__(self, run_dir: Path, outcomes: list[Any]) -> None:
        policy = RestartPolicy(10, 3600, jitter=lambda: 0.0)
        config = RayPretrainConfig(run_dir=str(run_dir))
        super().__init__(config, None, policy, LauncherStatus(run_dir), [])
        self.outcomes, self.attempts = outcomes, 0

    def train(self) -> RunSummary:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "report_shortage", lambda cluster: "")
            return super().train()

    def _fit(self) -> Any:
        self.attempts += 1
        write_status(self._run_dir, attempt=self.attempts, step=self.attempts, last_step_at=1.0)
        (self._run_dir / "config.json").touch()
        return self.outcomes.pop(0)


def test_ranks_that_trained_are_started_again_whatever_is_missing_then(tmp_path: Path) -> None:
    driver = Driver(tmp_path, [DEAD, AWAY, None, AWAY, DONE])
    assert driver.train() == DONE
    status = read_status(tmp_path)
    assert status and status.state == "restarting"
    assert (status.last_error, status.error_type) == (
        "rank 0: /data/index.json",
        "FileNotFoundError",
    )


def test_a_failure_that_a_restart_cannot_mend_ends_the_driver(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^2 bad clips$"):
        Driver(tmp_path, [DEAD, Failure("lasting", "DataFaultError", "2 bad clips")]).train()
    with pytest.raises(TrainingError, match="2 failures without a new checkpoint"):
        driver = Driver(tmp_path, [DEAD, DEAD])
        driver._policy = RestartPolicy(1, 3600, jitter=lambda: 0.0)
        driver.train()


def test_a_run_folder_that_is_gone_is_waited_for_and_not_made_anew(tmp_path: Path) -> None:
    driver = Driver(tmp_path / "run", [DEAD])
    request_stop_later = iter([False, False, True])

    def jitter() -> float:
        if next(request_stop_later):
            driver._signals.append(signal.SIGTERM)
        return 0.0

    driver._policy = RestartPolicy(10, 3600, has_trained=True, jitter=jitter)
    stopped = driver.train()
    assert stopped.stopped == "SIGTERM" and driver.attempts == 0
    status = read_status(tmp_path / "run")
    assert status and "is its file system mounted?" in status.last_error


@pytest.mark.parametrize("reason", ["SIGTERM", "cavmae stop"])
def test_a_run_stops_while_it_waits_to_be_started_again(tmp_path: Path, reason: str) -> None:
    driver = Driver(tmp_path, [DEAD])

    def jitter() -> float:
        if reason == "SIGTERM":
            driver._signals.append(signal.SIGTERM)
        else:
            request_stop(tmp_path, reason)
        return 1000.0

    driver._policy = RestartPolicy(10, 3600, jitter=jitter)
    stopped = driver.train()
    assert (stopped.stopped, stopped.step) == (reason, 1)
    status = read_status(tmp_path)
    assert status and status.describe() == f"stopped: {reason}"


@pytest.mark.parametrize(
    ("in_job", "stopped", "code"),
    [
        (False, "", 0),
        (False, "cavmae stop", START_AGAIN_EXIT_CODE),
        (True, "cavmae stop", 0),
        (True, "SIGTERM", START_AGAIN_EXIT_CODE),
    ],
)
def test_a_job_that_a_person_stops_is_done_and_a_preempted_one_is_not(
    in_job: bool, stopped: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """KubeRay starts a job again that ends with another code than 0."""
    if in_job:
        monkeypatch.setenv(train.IN_RAY_JOB, "{}")
    summary = dataclasses.replace(DONE, stopped=stopped)
    monkeypatch.setattr(train, "train_on_ray", lambda *arguments: summary)
    assert train.main(["demo", "--run-dir", str(tmp_path)]) == code


@pytest.mark.parametrize(
    ("variables", "step", "again"),
    [
        ({}, 5, False),
        ({"SLURM_RESTART_COUNT": "0"}, 5, False),
        ({"SLURM_RESTART_COUNT": "1"}, 5, True),
        ({"SLURM_RESTART_COUNT": "1"}, 0, False),
        ({"SLURM_RESTART_COUNT": "1"}, None, True),
        ({train.RETRIED: "1"}, 5, True),
        ({train.RETRIED: "1"}, None, False),
    ],
)
def test_a_launcher_s_restart_of_a_run_that_trained_is_known(
    variables: dict[str, str],
    step: int | None,
    again: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if step is not None:
        write_status(tmp_path, state="failed", step=step)
    assert started_again(tmp_path) == again


def of_a_library() -> None:
    int("x")


def contradicting() -> None:
    check_same_run(PretrainConfig(seed=1), PretrainConfig(seed=2))


def raises(error: Exception) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


@pytest.mark.parametrize(
    ("work", "kind"),
    [
        (lambda: Path("/nowhere/at all").read_text(), "missing"),
        (raises(PermissionError(13, "403")), "missing"),
        (raises(ConnectionError("503")), "unreachable"),
        (raises(OSError(116, "stale file handle")), "unreachable"),
        (lambda: check_ranks(8, 16), "refused"),
        (contradicting, "lasting"),
        (raises(DataFaultError("5% of the clips")), "lasting"),
        (raises(NonFiniteError("up to step 7")), "not finite"),
        (raises(DistNetworkError("timed out")), "peer"),
        (lambda: json.loads("{"), "crash"),
        (raises(RuntimeError("CUDA error")), "crash"),
    ],
)
def test_what_a_rank_failed_of_is_told_by_its_error(work: Callable[[], Any], kind: str) -> None:
    with pytest.raises(Exception) as raised:
        work()
    assert worker.kind_of(raised.value) == kind


def test_a_rank_s_error_reaches_the_driver_whatever_its_class() -> None:
    error = RankError("crash", "SomeLibrarysError", "it takes\nthree arguments")
    again = pickle.loads(pickle.dumps(RanksFailed(failure_of({1: error}, ["a", "b"]))))
    assert again.failure == failure_of({1: error}, ["a", "b"])
    assert again.failure.line == "rank 1: it takes"


@pytest.mark.parametrize("missing", ["config.json", "checkpoints/step-000000010/manifest.json"])
def test_a_rank_does_not_begin_anew_where_nothing_is_mounted(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(worker, "run", lambda *arguments: DONE)
    files = [tmp_path / "config.json", tmp_path / "checkpoints/step-000000010/manifest.json"]
    for path in files:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    config = PretrainConfig(run_dir=str(tmp_path))
    settings = {
        "config": config,
        "make_hooks": None,
        "has_trained": True,
        "has_checkpoint": True,
        "owner": "",
        "command": "cavmae train demo",
    }
    assert worker.train_rank(settings) == DONE
    (tmp_path / missing).unlink()
    with pytest.raises(RankError, match="is its file system mounted") as raised:
        worker.train_rank(settings)
    assert raised.value.kind == "missing"


def test_the_rank_that_names_no_other_one_is_at_fault_and_its_node_with_it() -> None:
    errors: dict[int, Exception] = {
        0: RankError("peer", "DistBackendError", "rank 1 is gone"),
        1: RuntimeError("A worker died.\nIts exit code was 1."),
    }
    failure = failure_of(reports(errors), ["a", "b"])
    assert failure == Failure(
        "crash", "RuntimeError", "Its exit code was 1.", rank=1, nodes=frozenset({"b"})
    )
    assert failure_of(reports(errors), ["a", "a"]).nodes == frozenset(), "it is the only node"
    errors[1] = RankError("not finite", "NonFiniteError", "up to step 7")
    assert failure_of(reports(errors), ["a", "b"]).text == "up to step 7"


@pytest.mark.parametrize("everywhere", [True, False])
def test_a_node_is_at_fault_only_where_the_others_find_their_files(
    everywhere: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = RankError("missing", "FileNotFoundError", "/data/index.json")

    class Group:
        def get_workers(self) -> Any:
            return [SimpleNamespace(metadata=SimpleNamespace(node_id=one)) for one in ("1", "2")]

        def poll_status(self, timeout: float) -> Any:
            later = SimpleNamespace(errors={0: error, 1: error} if everywhere else {0: error})
            report.after_worker_group_poll_status(later)
            return later

    names = [{"NodeID": "1", "NodeName": "a"}, {"NodeID": "2", "NodeName": "b"}]
    monkeypatch.setattr(worker.ray, "nodes", lambda: names)
    monkeypatch.setattr(worker, "_GATHER_SECONDS", 0.0)
    report = FailureReport(tmp_path)
    report.after_worker_group_start(Group())
    with pytest.raises(RanksFailed) as raised:
        report.after_worker_group_poll_status(SimpleNamespace(errors={0: error}))
    assert raised.value.failure.nodes == ({"a", "b"} if everywhere else {"a"})
    status = read_status(tmp_path)
    assert status and status.last_error == "rank 0: /data/index.json"


@pytest.mark.slow
def test_a_users_error_in_a_rank_is_one_line_and_not_repeated(
    packed_synthetic: Path, tmp_path: Path
) -> None:
    config = tiny_run(
        packed_synthetic, tmp_path / "run", initial_weights=str(tmp_path / "nowhere.pth")
    )
    start = start_on_ray(config, tmp_path)
    text = start.communicate(timeout=300)[0]
    assert start.returncode == 1
    (line,) = text.splitlines()
    assert line.startswith("error: ") and "nowhere.pth" in line


@pytest.mark.slow
def test_a_killed_rank_is_started_again_and_the_run_ends_as_if_nothing_had_happened(
    packed_synthetic: Path, tmp_path: Path
) -> None:
    config = tiny_run(
        packed_synthetic,
        tmp_path / "run",
        steps=60,
        checkpoint=CheckpointConfig(every_steps=5),
    )
    start = start_on_ray(config, tmp_path)
    rank_to_kill = wait_for_rank(start, tmp_path / "run/checkpoints/step-000000005" / MANIFEST)
    os.kill(rank_to_kill.pid, signal.SIGKILL)
    family = psutil.Process(start.pid).children(recursive=True)
    text = start.communicate(timeout=500)[0]
    assert start.returncode == 0, text[-5000:]
    assert "(failure 1 of 10 without a new checkpoint): rank " in text
    status = read_status(tmp_path / "run")
    assert status and (status.state, status.step, status.attempt) == ("finished", 60, 2)
    assert status.resumed_from and status.last_error.startswith("rank ")
    assert not psutil.wait_procs(family, timeout=60)[1], "readers, ranks and Ray have ended"

    straight = dataclasses.replace(config, run_dir=str(tmp_path / "straight/run"))
    Start(straight, 2, tmp_path).finish()
    assert losses(tmp_path / "run") == losses(tmp_path / "straight/run")


@pytest.mark.slow
def test_a_controller_that_is_killed_is_one_more_failure_that_is_survived(
    packed_synthetic: Path, tmp_path: Path
) -> None:
    """As Ray's memory monitor does on a node that is short of memory."""
    config = tiny_run(
        packed_synthetic,
        tmp_path / "run",
        steps=60,
        checkpoint=CheckpointConfig(every_steps=5),
    )
    start = start_on_ray(config, tmp_path)
    wait_for_rank(start, tmp_path / "run/checkpoints/step-000000005" / MANIFEST)
    family = psutil.Process(start.pid).children(recursive=True)
    (controller,) = [one for one in family if one.cmdline()[0].startswith("ray::TrainController")]
    controller.kill()
    text = start.communicate(timeout=300)[0]
    assert start.returncode == 0, text[-5000:]
    assert "Ray Train's controller is gone" in text and "Traceback" not in text
    status = read_status(tmp_path / "run")
    assert status and (status.state, status.step, status.attempt) == ("finished", 60, 2)
    assert not psutil.wait_procs(family, timeout=60)[1], "readers, ranks and Ray have ended"


def wait_for_rank(start: "subprocess.Popen[str]", sign: Path) -> psutil.Process:
    """Process of a rank, as soon as `sign` is there."""
    deadline = time.monotonic() + 300
    while not sign.exists():
        assert start.poll() is None, start.communicate()[0]
        assert time.monotonic() < deadline, f"{sign} did not appear"
        time.sleep(0.01)
    ranks = [
        process
        for process in psutil.Process(start.pid).children(recursive=True)
        if "RayTrainWorker" in " ".join(process.cmdline())
    ]
    assert len(ranks) == 2
    return ranks[1]
