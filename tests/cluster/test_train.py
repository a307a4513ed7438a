"""Training on Ray: what the command takes, what it says when it fails, and what it survives."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from launch import ROOT
from starts import Start, place_store
from tiny_run import losses, tiny_run

from cavmae.cluster.config import RAY_KINDS, ClusterConfig, RayFinetuneConfig, RayPretrainConfig
from cavmae.cluster.train import train_on_ray, with_absolute_paths
from cavmae.cluster.worker import FailureReport, PermanentError
from cavmae.trainer.checkpoint.format import MANIFEST
from cavmae.trainer.config.configs import CheckpointConfig, PretrainConfig, TrackingConfig
from cavmae.trainer.config.parse import parse
from cavmae.trainer.config.recipes import demo
from cavmae.trainer.config.serialize import save_config
from cavmae.trainer.run_status import read_status
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


def test_updates_that_are_not_finite_send_the_run_back_once(tmp_path: Path) -> None:
    """To its newest checkpoint, as any failure does; the same again is the user's to mend."""
    report = FailureReport(3, tmp_path)
    report.after_exception(None, {0: NonFiniteError("up to step 7"), 1: OSError("gone")})
    status = read_status(tmp_path)
    assert status and status.state == "restarting"
    assert (status.last_error, status.error_type) == ("rank 0: up to step 7", "NonFiniteError")
    report.after_exception(None, {1: NonFiniteError("up to step 9")})
    with pytest.raises(PermanentError, match=r"repeated after .* up to step 9"):
        report.after_exception(None, {0: NonFiniteError("up to step 9")})


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
    assert "restarting all ranks from the newest checkpoint (1 of 3)" in text
    status = read_status(tmp_path / "run")
    assert status and (status.state, status.step, status.attempt) == ("finished", 60, 2)
    assert status.resumed_from and status.last_error.startswith("rank ")
    assert not psutil.wait_procs(family, timeout=60)[1], "readers, ranks and Ray have ended"

    straight = dataclasses.replace(config, run_dir=str(tmp_path / "straight/run"))
    Start(straight, 2, tmp_path).finish()
    assert losses(tmp_path / "run") == losses(tmp_path / "straight/run")


@pytest.mark.slow
def test_a_controller_that_is_killed_ends_the_driver_with_one_line(
    packed_synthetic: Path, tmp_path: Path
) -> None:
    """As Ray's memory monitor does on a node that is short of memory."""
    config = tiny_run(
        packed_synthetic,
        tmp_path / "run",
        steps=100_000,
        checkpoint=CheckpointConfig(every_steps=5),
    )
    start = start_on_ray(config, tmp_path)
    wait_for_rank(start, tmp_path / "run/checkpoints/step-000000005" / MANIFEST)
    family = psutil.Process(start.pid).children(recursive=True)
    (controller,) = [one for one in family if one.cmdline()[0].startswith("ray::TrainController")]
    controller.kill()
    text = start.communicate(timeout=120)[0]
    assert start.returncode == 1, text[-5000:]
    assert "error: Ray Train's controller, the process that starts the ranks, is gone" in text
    assert "rerun the same command to resume from the newest checkpoint" in text
    assert "Traceback" not in text
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
