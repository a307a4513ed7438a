"""Several machines on one: Ray nodes in namespaces, which can be killed and cut off.

A node has its own network, mounts, host name and processes: a virtual cable leads to a switch in
another namespace, which reaches nothing else, and killing its first process is a power cut. Needs
root, `ip` (package iproute2), `unshare`, `nsenter` and `setpriv` (util-linux). There is no packet
loss or bandwidth limit, as not every kernel has netem.
"""

import os
import secrets
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cavmae.benchmarks.harness.processes import PATIENCE_SECONDS, module_command, tree_environment

_PROGRAMS = ("ip", "unshare", "nsenter", "setpriv", "mount", "hostname")
_PORT = 6379
_OBJECT_STORE_BYTES = 100_000_000
_POLL_SECONDS = 0.2
HEALTH_CHECKS = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}
"""With these a cut link is noticed after 9 s, by default after 62 s."""


def unavailable() -> str:
    """Return why this machine can't have such nodes; empty: it can."""
    missing = [program for program in _PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"{', '.join(missing)} not found; install iproute2 and util-linux"
    if os.geteuid() != 0:
        return "network namespaces need root"
    probe = f"cavmae-probe-{secrets.token_hex(4)}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode:
        return f"no network namespace can be made: {made.stderr.strip()}"
    _ip("netns", "del", probe)
    return ""


@dataclass
class _Node:
    """Attributes: namespace; address; cable, its end in the switch's namespace; process, the first
    one of the node, seen from outside; log, of its last start; starts, how often it was started."""

    namespace: str
    address: str
    cable: str
    log: Path
    process: subprocess.Popen[Any] | None = None
    starts: int = 0


class Nodes:
    """A Ray head without cores, and workers with one core each. A context, which removes all that
    it has created, by name.

    Args:
        workers: nodes that can train.
        logs: folder for the nodes' logs.

    Attributes:
        namespaces: of the network: head, workers, switch.
        address: of the Ray cluster, for who is on one of its nodes.
        environment: variables that commands on its nodes need.

    Raises:
        RuntimeError: a command failed, or a node did not come up.
    """

    def __init__(self, workers: int, logs: Path) -> None:
        self._id = secrets.token_hex(3)
        self._switch = f"cavmae-{self._id}-switch"
        self._folder = Path(f"/tmp/cv{self._id}")  # paths of Ray's sockets end at 107 characters
        self._nodes = [
            _Node(
                namespace=f"cavmae-{self._id}-{number}",
                address=f"10.231.0.{number + 1}",
                cable=f"cv{self._id}s{number}",
                log=logs / f"node-{number}.log",
            )
            for number in range(workers + 1)
        ]
        self.namespaces = [*(node.namespace for node in self._nodes), self._switch]
        self.address = f"{self._nodes[0].address}:{_PORT}"
        self.environment = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "GLOO_SOCKET_IFNAME": "eth0",
            # Each node would count the memory of the whole machine as its own.
            "RAY_memory_monitor_refresh_ms": "0",
            **HEALTH_CHECKS,
        }

    def __enter__(self) -> "Nodes":
        try:
            self._folder.mkdir()
            _ip("netns", "add", self._switch)
            self._in_switch("link", "add", "name", "switch", "type", "bridge")
            self._in_switch("link", "set", "switch", "up")
            for node in self._nodes:
                self._connect(node)
                self._start(node)  # workers look for the head until it is up
            self._wait_until_up()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._remove()

    def on_head(self, command: list[str]) -> list[str]:
        """Wrap a command so that it runs on the head."""
        return self._on(self._nodes[0], command)

    def on_worker(self, worker: int, command: list[str]) -> list[str]:
        """Wrap a command so that it runs on a worker's node."""
        return self._on(self._nodes[worker + 1], ["env", f"RAY_ADDRESS={self.address}", *command])

    def has_rank(self, worker: int) -> bool:
        """Return whether a rank runs on a worker's node."""
        pids = _ip("netns", "pids", self._nodes[worker + 1].namespace).split()
        titles = [Path(f"/proc/{pid}/cmdline") for pid in pids]
        return any("RayTrainWorker" in one.read_text() for one in titles if one.exists())

    def kill(self, worker: int) -> None:
        """Kill all processes of a worker's node at once: the kernel sends each SIGKILL."""
        self._end(self._nodes[worker + 1])

    def cut(self, worker: int) -> None:
        """Cut the cable of a worker's node."""
        self._in_switch("link", "set", self._nodes[worker + 1].cable, "down")

    def mend(self, worker: int) -> None:
        """Restore the cable."""
        self._in_switch("link", "set", self._nodes[worker + 1].cable, "up")

    def supervise(self, worker: int) -> None:
        """Do a supervisor's work: wait until Ray, which gave the node up, has ended; restart it.

        Raises:
            RuntimeError: it did not end.
        """
        node = self._nodes[worker + 1]
        assert node.process is not None
        try:
            node.process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"Ray of {node.namespace} did not end") from error
        self._start(node)

    def _on(self, node: _Node, command: list[str]) -> list[str]:
        namespaces = ("--net", "--mount", "--uts", "--pid")
        return ["nsenter", f"--target={self._first_process(node)}", *namespaces, "--", *command]

    def _connect(self, node: _Node) -> None:
        inside = f"{node.cable}i"
        _ip("netns", "add", node.namespace)
        self._in_switch("link", "add", "name", node.cable, "type", "veth", "peer", "name", inside)
        self._in_switch("link", "set", inside, "netns", node.namespace, "name", "eth0")
        self._in_switch("link", "set", node.cable, "master", "switch", "up")
        own = ("-n", node.namespace)
        _ip(*own, "address", "add", f"{node.address}/24", "dev", "eth0")
        _ip(*own, "link", "set", "eth0", "up")
        _ip(*own, "link", "set", "lo", "up")

    def _start(self, node: _Node) -> None:
        """Run Ray on a node, as the only thing that it does."""
        number = self._nodes.index(node)
        node.starts += 1
        ray = module_command(
            "ray.scripts.scripts",
            *("start", "--block", "--disable-usage-stats"),
            f"--node-ip-address={node.address}",
            f"--temp-dir={self._folder_of(node)}",
            f"--object-store-memory={_OBJECT_STORE_BYTES}",
            f"--num-cpus={min(number, 1)}",
            *(
                ("--head", f"--port={_PORT}", "--include-dashboard=false")
                if number == 0
                else (f"--address={self.address}",)
            ),
        )
        script = 'hostname "$0" && mount -t tmpfs tmpfs /dev/shm && exec "$@"'
        with node.log.open("w") as log:
            node.process = subprocess.Popen(
                [
                    *("setpriv", "--pdeathsig=KILL"),  # with this process, however it ends
                    *("ip", "netns", "exec", node.namespace),
                    *("unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child"),
                    *("--mount-proc", "sh", "-c", script, f"node-{number}", *ray),
                ],
                env=os.environ | tree_environment() | self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _folder_of(self, node: _Node) -> Path:
        """Ray's files of a node's last start."""
        return self._folder / f"{self._nodes.index(node)}-{node.starts}"

    def _first_process(self, node: _Node) -> int:
        """Return the outside id of a node's process 1."""
        assert node.process is not None
        children = Path(f"/proc/{node.process.pid}/task/{node.process.pid}/children")
        return int(children.read_text().split()[0])

    def _wait_until_up(self) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        for node in self._nodes:
            assert node.process is not None
            while not any(self._folder_of(node).glob("session_*/sockets/raylet")):
                if node.process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{node.namespace} did not come up; see {node.log}")
                time.sleep(_POLL_SECONDS)

    def _in_switch(self, *words: str) -> None:
        _ip("-n", self._switch, *words)

    def _end(self, node: _Node) -> None:
        """Kill all that runs on a node, a driver on the head too; returns when it is gone."""
        if node.process is None:
            return
        node.process.kill()  # --kill-child: the kernel ends process 1, and with it all others
        node.process.wait(PATIENCE_SECONDS)
        while left := _ip("netns", "pids", node.namespace).split():
            for process in left:
                with suppress(ProcessLookupError):
                    os.kill(int(process), signal.SIGKILL)
            time.sleep(_POLL_SECONDS)

    def _remove(self) -> None:
        """Remove all that was created."""
        for node in self._nodes:
            self._end(node)
        made = {line.split()[0] for line in _ip("netns", "list").splitlines() if line}
        for namespace in self.namespaces:
            if namespace in made:
                _ip("netns", "del", namespace)  # and with it the cables
        shutil.rmtree(self._folder, ignore_errors=True)


def _ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout
