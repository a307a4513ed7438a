"""Ranks that become fewer and more while nodes come and go, on real Ray nodes of this machine."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from launch import ROOT
from ray.train import ScalingConfig
from starts import Start, place_store
from tiny_run import losses, tiny_run

from cavmae.benchmarks.faults.observed_rank import Orders, give_orders
from cavmae.cluster import elastic
from cavmae.cluster.config import ClusterConfig
from cavmae.trainer.config.configs import CheckpointConfig, PretrainConfig
from cavmae.trainer.config.serialize import save_config
from cavmae.trainer.fault_tolerance.preemption import START_AGAIN_EXIT_CODE
from cavmae.trainer.run_status import read_status

LOOPBACK = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": "0123456789abcdef" * 4,
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def test_nodes_that_are_left_out_are_asked_for_and_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's reservation does not know that they are left out."""
    nodes: dict[str, Any] = {name: {"CPU": 2.0} for name in ("a", "b", "c")}
    listed = [{"NodeID": name, "Resources": has} for name, has in nodes.items()]
    monkeypatch.setattr(elastic.ray, "nodes", lambda: listed)
    scaling = ScalingConfig(num_workers=(1, 4), resources_per_worker={"CPU": 1})
    policy = elastic.StoppingScalingPolicy(scaling, tmp_path, ["b"])
    assert policy._get_num_workers_for_resource_request() == 4 + 2
    assert policy._count_possible_workers(nodes) == 4
    assert policy._count_possible_workers({"a": nodes["a"], "b": nodes["b"]}) == 2


def test_more_ranks_at_least_than_at_most_are_refused() -> None:
    with pytest.raises(ValueError, match=r"min_workers is 4 and workers 2"):
        ClusterConfig(workers=2, min_workers=4)


class Nodes:
    """Ray nodes on loopback: `ray_nodes.py` in a process of its own."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("ray_nodes.py"))],
            env=os.environ | LOOPBACK,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.added = 0
        self.address = self._answer()

    def add_up_to(self, count: int) -> None:
        while self.added < count:
            self.order("add")

    def order(self, line: str) -> int:
        self.added += line == "add"
        assert self._process.stdin is not None
        print(line, file=self._process.stdin, flush=True)
        return int(self._answer())

    def _answer(self) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("= "):
                return line.split()[1]
        raise AssertionError("the nodes are gone")

    def ranks(self) -> list[str]:
        """Of all nodes, as their processes are called."""
        family = psutil.Process(self._process.pid).children(recursive=True)
        titles = [" ".join(process.cmdline()) for process in family]
        return [title for title in titles if "RayTrainWorker" in title]

    def close(self) -> None:
        family = psutil.Process(self._process.pid).children(recursive=True)
        for process in [*family, self._process]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.communicate()


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    """Of this test alone."""
    made = Nodes()
    yield made
    made.close()


@pytest.fixture(scope="module")
def lasting_nodes() -> Iterator[Nodes]:
    """For tests that take none away; after the first of them there are two."""
    made = Nodes()
    yield made
    made.close()


def wait_until(happened: Callable[[], Any], text: Callable[[], str]) -> Any:
    deadline = time.monotonic() + 300
    while not (answer := happened()):
        assert time.monotonic() < deadline, text()[-5000:]
        time.sleep(0.1)
    return answer


def start_on(
    nodes: Nodes, config: PretrainConfig, tmp_path: Path, *words: str
) -> "subprocess.Popen[bytes]":
    """`cavmae train` of two ranks that follow orders; what it says is in `log`."""
    save_config(config, tmp_path / "config.json")
    place_store(tmp_path)
    with (tmp_path / "log").open("w") as log:
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "cavmae.benchmarks.faults.observed_rank", "train"),
                *(str(tmp_path / "config.json"), "--workers=2"),
                *(f"--address={nodes.address}", *words),
            ],
            cwd=ROOT,
            env=os.environ | LOOPBACK | {"RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )


@pytest.mark.slow
def test_a_lost_node_shrinks_the_run_a_new_one_grows_it_and_a_drained_one_is_left_in_time(
    packed_synthetic: Path, tmp_path: Path, nodes: Nodes
) -> None:
    config = tiny_run(
        packed_synthetic,
        tmp_path / "run",
        steps=100_000,
        micro_batch=1,
        checkpoint=CheckpointConfig(every_steps=10),
    )
    _, second = nodes.order("add"), nodes.order("add")
    # Few steps while nodes come and go: each is trained again on one rank.
    give_orders(tmp_path / "run", Orders(pause_seconds=0.3))
    start = start_on(nodes, config, tmp_path, "--min-workers=1", "--resize-every-seconds=2")
    text = (tmp_path / "log").read_text

    def wait_until_said(pattern: str, times: int = 1) -> None:
        def said() -> bool:
            assert start.poll() is None, text()[-5000:]
            return len(re.findall(pattern, text())) >= times

        wait_until(said, text)

    try:
        wait_until(
            lambda: next((tmp_path / "run/checkpoints").glob("step-*/manifest.json"), None), text
        )
        nodes.order(f"cut {second}")
        wait_until_said("training on 1 of 2 ranks; no CPU is idle")
        wait_until_said("resuming from")
        third = nodes.order("add")
        wait_until_said("more ranks fit: 2 instead of 1")
        wait_until_said("resuming from", 2)
        nodes.order(f"drain {third} 60")
        wait_until_said(r"stop requested \(node preemption notice \(rank .\)\): saving")
        wait_until_said("resuming from", 3)
        start.send_signal(signal.SIGTERM)
        assert start.wait(timeout=120) == START_AGAIN_EXIT_CODE, text()[-5000:]
    finally:
        start.kill()
        start.wait()
    found = losses(tmp_path / "run")
    (tmp_path / "straight").mkdir()
    straight = dataclasses.replace(
        config,
        run_dir=str(tmp_path / "straight/run"),
        steps=len(found),
        checkpoint=CheckpointConfig(),  # hardly any: they take longer than the steps between them
    )
    Start(straight, 1, tmp_path).finish()
    assert found == pytest.approx(losses(tmp_path / "straight/run"), rel=1e-5)


@pytest.mark.long
@pytest.mark.slow
def test_a_node_that_fails_three_times_in_a_row_is_left_out(
    packed_synthetic: Path, tmp_path: Path, nodes: Nodes
) -> None:
    config = tiny_run(
        packed_synthetic,
        tmp_path / "run",
        steps=100_000,
        micro_batch=1,
        checkpoint=CheckpointConfig(every_steps=10),
    )
    bad, good = nodes.order("add"), nodes.order("add")
    text, run_dir = (tmp_path / "log").read_text, tmp_path / "run"
    start = start_on(nodes, config, tmp_path)

    def wait_for_training(attempt: int) -> None:
        def trains() -> bool:
            assert start.poll() is None, text()[-5000:]
            status = read_status(run_dir)
            return status is not None and status.attempt == attempt and status.last_step_at > 0

        wait_until(trains, text)

    try:
        for attempt in (1, 2):
            wait_for_training(attempt)
            nodes.order(f"strike {bad}")
        wait_for_training(3)
        spare = nodes.order("add")
        nodes.order(f"strike {bad}")
        wait_for_training(4)
        assert f"node node-{bad} failed 3 times in a row and is left out" in text()
        nodes.order(f"strike {spare}")  # waits for a rank there
        nodes.order(f"strike {good}")
        start.send_signal(signal.SIGTERM)
        assert start.wait(timeout=120) == START_AGAIN_EXIT_CODE, text()[-5000:]
    finally:
        start.kill()
        start.wait()


@pytest.mark.long
@pytest.mark.slow
def test_ranks_start_together_or_wait_together(
    packed_synthetic: Path, tmp_path: Path, lasting_nodes: Nodes
) -> None:
    config = tiny_run(packed_synthetic, tmp_path / "run", steps=3)
    text, nodes = (tmp_path / "log").read_text, lasting_nodes
    nodes.add_up_to(1)
    start = start_on(nodes, config, tmp_path)
    try:
        wait_until(lambda: "waiting for 2 CPUs (the cluster has 1)" in text(), text)
        time.sleep(8)  # a rank that did not wait would have begun
        assert not nodes.ranks()
        nodes.add_up_to(2)
        wait_until(lambda: len(nodes.ranks()) == 2, text)
        assert start.wait(timeout=200) == 0, text()[-5000:]
    finally:
        start.kill()
        start.wait()
    assert len(losses(tmp_path / "run")) == 3


@pytest.mark.slow
def test_a_dry_run_places_the_ranks_on_the_nodes_that_are_there(lasting_nodes: Nodes) -> None:
    lasting_nodes.add_up_to(2)
    address = lasting_nodes.address
    words = ["demo", "--workers=4", "--dry-run", f"--address={address}"]
    shown = subprocess.run(
        [sys.executable, "-m", "cavmae.cluster.train", *words],
        cwd=ROOT,
        env=os.environ | LOOPBACK,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert f"the nodes of {address}" in shown and ": rank 1\n" in shown
    assert "without a node: 2" in shown
