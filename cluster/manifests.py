"""`cavmae cluster-files FOLDER`: the files that bring a run to Kubernetes, Slurm or a cloud.

All come from one description of the cluster, so that ranks, GPUs and memory agree. Every Ray node
asks for the cluster's token, nothing listens beyond the cluster's network, the head trains nothing,
and no file holds a secret: KubeRay makes the token, the other starters take it from
`~/.ray/auth_token`.
"""

import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from cavmae.command import exit_code
from cavmae.field_checks import CheckedFields, PositiveInt

# What failures are noticed by within seconds (docs/training/reliability.md).
_ENVIRONMENT = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "15",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",  # images are pulled meanwhile
}
_HEAD_CPUS, _HEAD_MEMORY_GB = 4, 16
_GRACE_SECONDS = 120
"""From SIGTERM to SIGKILL."""


@dataclass(frozen=True)
class ClusterFilesConfig(CheckedFields):
    """Write the files that bring a run to a cluster of GPU nodes.

    Raises:
        ValueError: a field out of its range, or a relative path in `run`.
    """

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Where they are written: raycluster.yaml, rayjob.yaml, ray-aws.yaml, slurm.sh."""
    run: str
    """What to train, as after `cavmae train`: a recipe and its fields, paths absolute or URLs."""
    image: str
    """Container image with cavmae, made from this repository's Dockerfile."""
    name: str = "cavmae"
    """Of the cluster and the job."""
    nodes: PositiveInt = 2
    """Nodes that train."""
    gpus_per_node: PositiveInt = 8
    """GPUs of a node, with a rank on each."""
    cpus_per_node: PositiveInt = 64
    """CPU cores of a node that ranks, readers and decoders share."""
    memory_gb_per_node: PositiveInt = 256
    """Memory of a node in GB that the job asks for."""
    volume_claim: str = ""
    """PersistentVolumeClaim that all pods mount at /shared: run folder, data. Empty: none, for data
    and run folder on other storage."""
    aws_region: str = "us-east-1"
    """Where `ray up` starts the machines."""
    aws_instance: str = "p5.48xlarge"
    """Of the nodes that train; the head is an m7i.2xlarge."""
    slurm_time: str = "2-00:00:00"
    """Time limit; the job is put in the queue again and goes on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cpus_per_node < self.gpus_per_node:
            raise ValueError(
                f"cpus_per_node is {self.cpus_per_node} for {self.gpus_per_node} GPUs; a rank "
                f"takes one core at least"
            )
        if not self.name.replace("-", "").isalnum() or self.name != self.name.lower():
            raise ValueError(f"name is {self.name!r}; use small letters, digits and `-`")
        if not self.run.split():
            raise ValueError("run is empty; give a recipe and its fields, as after `cavmae train`")

    @property
    def words(self) -> list[str]:
        """The command that trains, on a cluster that is there."""
        cluster = {
            "workers": self.nodes * self.gpus_per_node,
            "gpus-per-worker": 1,
            "cpus-per-worker": self.cpus_per_node // self.gpus_per_node,
            "address": "auto",
        }
        fields = [f"--{name}={value}" for name, value in cluster.items()]
        return ["cavmae", "train", *shlex.split(self.run), *fields]


def main(arguments: list[str]) -> int:
    """The command; returns its exit code."""
    config = tyro.cli(ClusterFilesConfig, prog="cavmae cluster-files", args=arguments)
    check_words(config)
    folder = Path(config.folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in FILES.items():
        path = folder / name
        path.write_text(make(config))
        if path.suffix == ".sh":
            path.chmod(0o755)
        Console().print(str(path), soft_wrap=True, highlight=False)
    return 0


def check_words(config: ClusterFilesConfig) -> None:
    """Find out now what the cluster would find out in an hour.

    Raises:
        ValueError: `run` is no run, or names a path that only this folder has.
    """
    from cavmae.cluster.config import RAY_KINDS
    from cavmae.cluster.train import check_run, with_absolute_paths
    from cavmae.trainer.config.parse import parse

    run = parse(config.words[2:], RAY_KINDS, "--run")
    check_run(run)
    with_absolute_paths(run, None)


# ------------------------------------------------------------------------------- Kubernetes


def _cluster_spec(config: ClusterFilesConfig) -> dict[str, Any]:
    """Of a RayCluster: a head that trains nothing, and nodes that are all there or none."""
    worker = _pod(
        config,
        "ray-worker",
        cpus=config.cpus_per_node,
        memory_gb=config.memory_gb_per_node,
        gpus=config.gpus_per_node,
    )
    return {
        "authOptions": {"mode": "token"},
        "headGroupSpec": {
            "serviceType": "ClusterIP",
            "rayStartParams": {"dashboard-host": "0.0.0.0", "num-cpus": "0"},
            "template": _pod(
                config, "ray-head", cpus=_HEAD_CPUS, memory_gb=_HEAD_MEMORY_GB, gpus=0
            ),
        },
        "workerGroupSpecs": [
            {
                "groupName": "gpu",
                "replicas": config.nodes,
                "minReplicas": config.nodes,
                "maxReplicas": config.nodes,
                "rayStartParams": {},
                "template": worker,
            }
        ],
    }


def _pod(
    config: ClusterFilesConfig, name: str, *, cpus: int, memory_gb: int, gpus: int
) -> dict[str, Any]:
    amounts: dict[str, Any] = {"cpu": str(cpus), "memory": f"{memory_gb}Gi"}
    if gpus:
        amounts["nvidia.com/gpu"] = gpus
    mounts = [{"name": "shm", "mountPath": "/dev/shm"}]
    volumes: list[dict[str, Any]] = [
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{memory_gb // 4}Gi"}}
    ]
    if config.volume_claim:
        mounts.append({"name": "shared", "mountPath": "/shared"})
        claim = {"claimName": config.volume_claim}
        volumes.append({"name": "shared", "persistentVolumeClaim": claim})
    container = {
        "name": name,
        "image": config.image,
        "env": [{"name": key, "value": value} for key, value in _ENVIRONMENT.items()],
        "resources": {"requests": amounts, "limits": amounts},
        "volumeMounts": mounts,
        "securityContext": {"allowPrivilegeEscalation": False, "runAsNonRoot": True},
    }
    return {
        "spec": {
            "containers": [container],
            "volumes": volumes,
            "terminationGracePeriodSeconds": _GRACE_SECONDS,
        }
    }


def ray_cluster(config: ClusterFilesConfig) -> str:
    """A KubeRay RayCluster, for runs by `ray job submit`."""
    return _yaml(
        {
            "apiVersion": "ray.io/v1",
            "kind": "RayCluster",
            "metadata": {"name": config.name},
            "spec": _cluster_spec(config),
        }
    )


def ray_job(config: ClusterFilesConfig) -> str:
    """A KubeRay RayJob: a cluster that lives as long as the run."""
    return _yaml(
        {
            "apiVersion": "ray.io/v1",
            "kind": "RayJob",
            "metadata": {"name": config.name},
            "spec": {
                "entrypoint": shlex.join(config.words),
                # A lost head is a new cluster, which goes on from the newest checkpoint.
                "backoffLimit": 10,
                "shutdownAfterJobFinishes": True,
                "ttlSecondsAfterFinished": 600,
                "rayClusterSpec": _cluster_spec(config),
            },
        }
    )


# ------------------------------------------------------------------------------------ cloud


def ray_aws(config: ClusterFilesConfig) -> str:
    """A cluster of `ray up` on AWS; other clouds differ in `provider` and `node_config`."""
    environment = _ENVIRONMENT | {"RAY_AUTH_MODE": "token"}
    exports = " ".join(f"{name}={value}" for name, value in environment.items())
    start = f"export {exports}; ulimit -n 65536; ray start"
    return _yaml(
        {
            "cluster_name": config.name,
            "max_workers": config.nodes,
            "provider": {"type": "aws", "region": config.aws_region, "cache_stopped_nodes": False},
            "auth": {"ssh_user": "ubuntu"},
            "docker": {
                "image": config.image,
                "container_name": "cavmae",
                "worker_run_options": ["--gpus=all", "--shm-size=64g", "--ulimit=nofile=65536"],
            },
            "head_node_type": "head",
            "available_node_types": {
                "head": {
                    "resources": {"CPU": 0},
                    "node_config": {"InstanceType": "m7i.2xlarge"},
                },
                "gpu": {
                    "min_workers": config.nodes,
                    "max_workers": config.nodes,
                    "resources": {"CPU": config.cpus_per_node, "GPU": config.gpus_per_node},
                    "node_config": {"InstanceType": config.aws_instance},
                },
            },
            "file_mounts": {"/home/ray/.ray/auth_token": "~/.ray/auth_token"},
            "head_start_ray_commands": [
                "ray stop",
                f"{start} --head --port=6379 --dashboard-host=127.0.0.1 "
                f"--autoscaling-config=~/ray_bootstrap_config.yaml",
            ],
            "worker_start_ray_commands": ["ray stop", f"{start} --address=$RAY_HEAD_IP:6379"],
        }
    )


# ------------------------------------------------------------------------------------ Slurm


def slurm(config: ClusterFilesConfig) -> str:
    """A batch script: Ray on all nodes of an allocation for as long as the run."""
    exports = "\n".join(f"export {name}={value}" for name, value in _ENVIRONMENT.items())
    return f"""#!/bin/bash
#SBATCH --job-name={config.name}
#SBATCH --nodes={config.nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={config.gpus_per_node}
#SBATCH --cpus-per-task={config.cpus_per_node}
#SBATCH --mem={config.memory_gb_per_node}G
#SBATCH --exclusive
#SBATCH --time={config.slurm_time}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
# From an environment in which cavmae is installed on every node: sbatch slurm.sh
set -euo pipefail

# A Ray port without a token runs anyone's code. Made once, in the home that all nodes share.
export RAY_AUTH_MODE=token
[ -s "$HOME/.ray/auth_token" ] || ray get-auth-token --generate > /dev/null
{exports}

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{{print $1}}')

# Two minutes before the time limit the job goes back into the queue; the run then goes on from its
# newest checkpoint, as it does after a lost node.
trap 'scontrol requeue "$SLURM_JOB_ID"' USR1
srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" \\
    ray symmetric-run --address "$address:6379" --min-nodes "$SLURM_NNODES" \\
    --num-cpus={config.cpus_per_node} --num-gpus={config.gpus_per_node} \\
    -- {shlex.join(config.words)} &
step=$!
wait $step
"""


def _yaml(document: dict[str, Any]) -> str:
    import yaml

    return yaml.dump(document, Dumper=_plain_dumper(), sort_keys=False, width=100)


def _plain_dumper() -> Any:
    """Of YAML without references: a block that is used twice stands there twice."""
    import yaml

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    return Dumper


FILES: dict[str, Callable[[ClusterFilesConfig], str]] = {
    "raycluster.yaml": ray_cluster,
    "rayjob.yaml": ray_job,
    "ray-aws.yaml": ray_aws,
    "slurm.sh": slurm,
}


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
