"""Ray nodes in namespaces: apart, cut off, killed, and gone without a trace."""

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cavmae.benchmarks.faults import netns_nodes, node_faults
from cavmae.benchmarks.faults.netns_nodes import Nodes, unavailable
from cavmae.benchmarks.faults.outcome import Skipped
from cavmae.benchmarks.faults.runs import Bench

CONNECT = """
import errno, socket
probe = socket.socket()
probe.settimeout(5)
print(errno.errorcode[probe.connect_ex(("10.231.0.2", 1))])
"""


@pytest.mark.slow
@pytest.mark.skipif(bool(unavailable()), reason=unavailable() or "nodes can be made")
def test_a_node_is_cut_off_killed_and_started_again_and_nothing_is_left(tmp_path: Path) -> None:
    others = set(psutil.Process().children(recursive=True))
    with Nodes(1, tmp_path) as made:
        # Nobody listens there: refused where there is a way, and no answer where there is none.
        assert answer(made) == "ECONNREFUSED"
        made.cut(0)
        assert answer(made) in ("EAGAIN", "EHOSTUNREACH")
        made.mend(0)
        assert answer(made) == "ECONNREFUSED"
        _, worker, _ = made.namespaces
        assert processes_in(worker)
        made.kill(0)
        assert not processes_in(worker)
        made.supervise(0)
        deadline = time.monotonic() + 60
        while not processes_in(worker):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        family = set(psutil.Process().children(recursive=True)) - others
    assert family
    assert not set(made.namespaces) & listed_namespaces()
    _, alive = psutil.wait_procs(family, timeout=10)
    assert alive == []
    assert "10.231.0" not in subprocess.run(["ip", "route"], capture_output=True, text=True).stdout


def answer(made: Nodes) -> str:
    """What a connection to the worker comes to."""
    command = made.on_head([sys.executable, "-c", CONNECT])
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def listed_namespaces() -> set[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    return {line.split()[0] for line in listed.splitlines() if line}


def processes_in(namespace: str) -> str:
    asked = ["ip", "netns", "pids", namespace]
    return subprocess.run(asked, capture_output=True, text=True).stdout


def test_a_machine_without_iproute2_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        netns_nodes.shutil, "which", lambda name: None if name == "ip" else f"/bin/{name}"
    )
    assert unavailable() == "ip not found; install iproute2 and util-linux"


def test_a_user_without_rights_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(netns_nodes.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(netns_nodes.os, "geteuid", lambda: 1000)
    assert unavailable() == "network namespaces need root"


def test_a_row_that_cannot_be_measured_is_skipped_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(node_faults, "unavailable", lambda: "network namespaces need root")
    bench = object.__new__(Bench)  # no data is made for a row that is skipped
    assert node_faults.node_cut(bench, "cut") == Skipped("network namespaces need root")
