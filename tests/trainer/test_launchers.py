"""The same run is the same, whoever starts its two ranks."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from launch import ROOT, free_port, rank_environment
from tiny_run import losses, tiny_run

from cavmae.trainer.config.serialize import save_config
from cavmae.trainer.tracking.code_snapshot import git_commit

pytestmark = pytest.mark.slow

STEPS = 5
PROGRAMS = Path(sys.executable).parent


@pytest.fixture(scope="module")
def by_hand(packed_synthetic: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of two plain Python processes with rank variables set by hand."""
    folder = tmp_path_factory.mktemp("by_hand")
    config = saved_run(packed_synthetic, folder)
    port = free_port()
    starts = [
        subprocess.Popen(
            [sys.executable, "-m", "cavmae.trainer.pretrain", str(config)],
            cwd=ROOT,
            env=rank_environment(rank, 2, port),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for start in starts:
        text = start.communicate(timeout=300)[1]
        assert start.returncode == 0, text[-5000:]
    found = losses(folder / "run")
    assert len(found) == STEPS
    return found


def saved_run(shards: Path, folder: Path) -> Path:
    """A tiny run in `folder/run`, as the `config.json` to start it from."""
    save_config(tiny_run(shards, folder / "run", steps=STEPS), folder / "config.json")
    return folder / "config.json"


def start(command: list[str], **environment: str) -> str:
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    return done.stdout + done.stderr


def test_the_deepspeed_launcher_gives_the_same_losses(
    packed_synthetic: Path, by_hand: list[float], tmp_path: Path
) -> None:
    config = saved_run(packed_synthetic, tmp_path)
    start(
        [
            *(str(PROGRAMS / "deepspeed"), "--num_accelerators", "2"),
            *("--master_port", str(free_port()), "--module", "cavmae.trainer.pretrain"),
            str(config),
        ],
        PATH=f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}",
    )
    assert losses(tmp_path / "run") == by_hand


def test_torchrun_gives_the_same_losses(
    packed_synthetic: Path, by_hand: list[float], tmp_path: Path
) -> None:
    config = saved_run(packed_synthetic, tmp_path)
    start(
        [
            *(str(PROGRAMS / "torchrun"), "--nproc-per-node", "2"),
            *("--master-port", str(free_port()), "-m", "cavmae.trainer.pretrain"),
            str(config),
        ]
    )
    assert losses(tmp_path / "run") == by_hand


@pytest.fixture
def ray_head(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A Ray head on loopback that asks for a token; yields the environment of its clients."""
    (tmp_path / "token").write_text("0123456789abcdef" * 4)
    (tmp_path / "token").chmod(0o600)
    port, dashboard = free_port(), free_port()
    environment = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token"),
        "RAY_ADDRESS": f"http://127.0.0.1:{dashboard}",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on Linux too: loopback alone
    }
    session = tempfile.mkdtemp(prefix="cavmae-", dir="/tmp")  # its socket paths must be short
    with open(tmp_path / "head.log", "w") as log:
        head = subprocess.Popen(
            [
                *(str(PROGRAMS / "ray"), "start", "--head", "--block", "--disable-usage-stats"),
                *("--node-ip-address", "127.0.0.1", "--port", str(port)),
                *("--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard)),
                *("--dashboard-agent-listen-port", str(free_port())),
                *("--ray-client-server-port", str(free_port())),
                *("--num-cpus", "2", "--object-store-memory", "100000000"),
                *("--temp-dir", session),
            ],
            # A program of another test must not be told where this head is.
            env={k: v for k, v in (os.environ | environment).items() if k != "RAY_ADDRESS"}
            | {"PATH": f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        yield environment
    finally:
        # By process id, never `ray stop`. Asked politely, the head takes half a minute.
        family = [*psutil.Process(head.pid).children(recursive=True), psutil.Process(head.pid)]
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        assert not psutil.wait_procs(family, timeout=60)[1]
        shutil.rmtree(session, ignore_errors=True)


def cavmae(*words: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "cavmae", *words],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_job_is_submitted_watched_stopped_and_gone_on_with_by_ray_job_submit(
    packed_synthetic: Path, by_hand: list[float], tmp_path: Path, ray_head: dict[str, str]
) -> None:
    config, run_dir = str(saved_run(packed_synthetic, tmp_path)), tmp_path / "run"
    submit = ("submit", config, "--workers", "2", "--steps", "100000")
    deadline = time.monotonic() + 400
    while (job := cavmae(*submit, **ray_head)).returncode:  # the head takes jobs a while later
        assert time.monotonic() < deadline, job.stderr + (tmp_path / "head.log").read_text()
        time.sleep(1)
    name = job.stdout.strip()
    while not (run_dir / "checkpoints/step-000000020/manifest.json").exists():
        assert time.monotonic() < deadline, cavmae("logs", name, **ray_head).stdout
        time.sleep(0.2)

    again = cavmae(*submit, **ray_head)
    assert again.returncode == 1 and f"job {name} already trains in run_dir" in again.stderr
    running = rf"{name}\trunning, last step .*\t\d+/100000\t"
    while not re.search(running, listed := cavmae("status", **ray_head).stdout):
        assert time.monotonic() < deadline, listed  # a status is at most some seconds old
    assert "samples/s" in cavmae("logs", name, **ray_head).stdout
    assert "clips (frames tier)" in cavmae("logs", name, "--rank", "1", **ray_head).stdout

    stopped = cavmae("stop", name, **ray_head)
    assert re.search(r"stopped: cavmae stop, step \d+/100000", stopped.stderr), stopped.stderr
    step = len(losses(run_dir))
    assert (run_dir / f"checkpoints/step-{step:09d}").exists(), "no step is lost"
    run = json.loads((run_dir / "run.json").read_text())
    assert run["git_commits"] == [git_commit()], "the job has no repository"
    with tarfile.open(run_dir / f"code/{run['code'][0]}.tar.gz") as code:
        kept = code.extractfile("cavmae/trainer/trainer.py")
        assert kept and kept.read() == (ROOT / "trainer/trainer.py").read_bytes()

    plain = [
        *(str(PROGRAMS / "ray"), "job", "submit", "--working-dir", "."),
        *("--", sys.executable, "-m", "cavmae.cluster.train", config, "--steps", str(step + 2)),
    ]
    assert "succeeded" in start(plain, **ray_head)
    assert losses(run_dir)[:STEPS] == by_hand
    assert len(losses(run_dir)) == step + 2
    shown = cavmae("status", str(run_dir))
    assert f"finished\t{step + 2}/{step + 2}" in shown.stdout, shown
