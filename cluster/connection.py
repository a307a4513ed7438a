"""The Ray cluster of a command: a running one, or one that is started and stopped with it."""

import logging
import os
import secrets
import socket
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import cavmae
from cavmae.atomic_write import temporary_path
from cavmae.cluster.config import ClusterConfig

# Ray reads these when it is imported or started.
_RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",  # progress lines look alike
    "RAY_DISABLE_WORKER_LOG_PREFIX": "1",
    "RAY_COLOR_PREFIX": "0",
    "RAY_OVERRIDE_JOB_RUNTIME_ENV": "1",  # a job sets some of them too
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # it prints every line twice
}
_PASSED_ON = ("NCCL_", "TORCH_NCCL_", "GLOO_", "UCX_", "FI_", "DS_", "RAY_TRAIN_")
"""Prefixes of the environment variables that are forwarded to the ranks."""
_OWN_CLUSTER_ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",  # without it, whoever reaches a Ray port can run any code
    # Named after other systems; on Linux too, 0 makes Ray listen on loopback alone.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # It would start a Python process for each core, which fits no actor with a runtime environment.
    "RAY_prestart_worker_first_driver": "0",
    # A cluster that lives as long as the run gets no preemption notices.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
_OBJECT_STORE_BYTES = 100_000_000
"""Ray's shared memory on a cluster started by us: only configurations pass through it."""


ANSWER_SECONDS = 10.0
"""Who does not answer within this time is taken not to be there; Ray itself waits for minutes."""
_HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\4" + bytes(5)
"""What a gRPC client says first: the preface and an empty SETTINGS frame (RFC 9113, 3.4)."""
_SETTINGS = 4
"""Type of the frame that a gRPC server answers with, in the fourth byte."""


def address_of(cluster: ClusterConfig) -> str:
    """Return the address of the cluster to use; empty: start one."""
    named = os.environ.get("RAY_ADDRESS", "")  # as in Ray, it says which one `auto` is
    return named or cluster.address if cluster.address in ("", "auto") else cluster.address


def check_address(cluster: ClusterConfig) -> None:
    """Check that the address is one of a cluster, and that a cluster answers there.

    Raises:
        ValueError: it is of another kind.
        ConnectionError: nothing answers, or something else than Ray's head.
    """
    address = address_of(cluster)
    if address in ("", "local"):
        return
    source = f"{'--address' if address == cluster.address else 'RAY_ADDRESS'} is {address}"
    if address != "auto" and ("/" in address or not address.rpartition(":")[2].isdecimal()):
        raise ValueError(
            f"{source}, and this command joins a cluster: give HOST:6379 or auto "
            "(http://HOST:8265 is for `cavmae submit`, status, logs and stop)"
        )
    from ray._private.services import canonicalize_bootstrap_address

    try:
        head = canonicalize_bootstrap_address(address)  # Ray takes another for `auto` and loopback
        assert head is not None
        host, _, port = head.rpartition(":")
        with socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS) as connection:
            connection.sendall(_HTTP2_PREFACE)
            answer = connection.recv(4) if os.environ.get("RAY_USE_TLS") != "1" else None
    except (OSError, OverflowError) as error:
        raise ConnectionError(
            f"{source}, where no Ray cluster answers ({error}); start its head (`ray start "
            "--head`), correct the address, or omit it to start a cluster here"
        ) from error
    if answer is not None and answer[3:] != bytes([_SETTINGS]):
        raise ConnectionError(
            f"{source}, where something else than the head of a Ray cluster answers; give the "
            "port of `ray start --head`, usually 6379"
        )


@contextmanager
def connected(cluster: ClusterConfig, threads: int) -> Iterator[Path | None]:
    """Connect to the cluster, or start one; yield the folder that paths are relative to, or None in
    a Ray job, whose folder is a temporary copy.

    Args:
        cluster: address; workers and their cores size a cluster that is started.
        threads: OMP threads in each of Ray's processes.

    Raises:
        ValueError: the address is of another kind.
        ConnectionError: no cluster answers there.
    """
    address, environment = address_of(cluster), _RAY_ENVIRONMENT
    options: dict[str, Any] = {"address": address}
    if not address:
        environment = environment | _OWN_CLUSTER_ENVIRONMENT
        options = {
            "address": "local",
            "num_cpus": cluster.workers * cluster.cpus_per_worker,
            "object_store_memory": _OBJECT_STORE_BYTES,
            "include_dashboard": False,
        }
    for name, value in environment.items():
        os.environ.setdefault(name, value)
    check_address(cluster)
    if not address and os.environ["RAY_AUTH_MODE"] == "token":
        make_token(Path.home() / ".ray" / "auth_token")
    import ray

    ray.init(
        **options,
        runtime_env={
            "env_vars": _worker_environment(threads),
            "worker_process_setup_hook": "cavmae.cluster.process_setup.setup",
        },
        logging_level=logging.WARNING,
    )
    try:
        in_job = "working_dir" in ray.get_runtime_context().runtime_env
        yield None if in_job else Path.cwd()
    finally:
        ray.shutdown()


def make_token(path: Path) -> None:
    """Make the token of a cluster's owner where there is none; Ray would let everyone read it.

    Raises:
        OSError: it could not be written.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_path(path)
        with open(temporary, "x", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.write(secrets.token_hex(32))
        with suppress(FileExistsError):  # another start has just made it
            os.link(temporary, path)
        temporary.unlink()
    path.chmod(0o600)


def absolute_path(name: str, path: str, folder: Path | None) -> str:
    """Make a path absolute, as Ray's processes have another working directory. URLs and empty paths
    are returned unchanged.

    Args:
        name: the field's name, for the error.
        path: relative to `folder`, or absolute.
        folder: the one that `connected` yielded.

    Raises:
        ValueError: a relative path in a Ray job.
    """
    if not path or "://" in path or Path(path).is_absolute():
        return path
    if folder is None:
        raise ValueError(
            f"{name} is {path!r}, relative to the copy of the code that Ray made for this job "
            "and throws away; give an absolute path"
        )
    return str(folder / path)


def report_shortage(cluster: ClusterConfig) -> str:
    """Print and return what the cluster lacks; empty if nothing. Ray waits for it without end, as
    an autoscaler may add it."""
    import ray

    resources = ray.cluster_resources()
    needed = {"CPU": cluster.cpus_per_worker, "GPU": cluster.gpus_per_worker}
    wanted = {name: each * cluster.workers for name, each in needed.items()}
    shortage = ", ".join(
        f"{total} {name}s (the cluster has {present})"
        for name, total in wanted.items()
        if (present := int(resources.get(name, 0))) < total
    )
    if shortage:
        print(f"waiting for {shortage}", file=sys.stderr)
    if resources.get("GPU", 0) and not cluster.gpus_per_worker:
        print(
            f"on CPUs: gpus_per_worker is 0 (the cluster has {resources['GPU']:g} GPUs)",
            file=sys.stderr,
        )
    return shortage


def node_slots(cluster: ClusterConfig) -> list[tuple[str, int]]:
    """Return the name of each live node of the connected cluster, and how many ranks it could hold
    if it were idle."""
    import ray

    needed = {"CPU": cluster.cpus_per_worker, "GPU": cluster.gpus_per_worker}
    return [
        (
            node["NodeName"],
            min(
                int(node["Resources"].get(kind, 0) // each) for kind, each in needed.items() if each
            ),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def release_reservations() -> None:
    """Remove the placement groups of this driver, which a dead controller of Ray Train leaves: its
    cleaner needs a dashboard. Their ids end with that of the job."""
    import ray
    from ray.util.placement_group import (
        PlacementGroup,
        placement_group_table,
        remove_placement_group,
    )

    job = ray.get_runtime_context().get_job_id()
    for name, group in placement_group_table().items():
        if name.endswith(job) and group["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(name))))


def passed_on() -> dict[str, str]:
    """Return the variables that are forwarded to the ranks: networks and timeouts, no secrets."""
    return {name: value for name, value in os.environ.items() if name.startswith(_PASSED_ON)}


def source_tree() -> Path | None:
    """Return the folder of the package's code; None where it is an installed wheel."""
    tree = Path(cavmae.__file__).resolve().parent.parent
    return None if tree == Path(sysconfig.get_path("purelib")).resolve() else tree


def _worker_environment(threads: int) -> dict[str, str]:
    """Return the workers' environment, which is set before a worker imports anything."""
    environment = passed_on() | _RAY_ENVIRONMENT | {"OMP_NUM_THREADS": str(threads)}
    if tree := source_tree():  # the workers must run it, whatever else is installed
        path = [str(tree), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        environment["PYTHONPATH"] = os.pathsep.join(path)
    return environment
