"""`cavmae cluster-files FOLDER`: the files that bring a run to Kubernetes, Slurm or a cloud.

`templates/` holds them, and this fills in one description of the cluster, so that ranks, GPUs and
memory agree in all of them. Every Ray node requires the cluster's token, nothing listens beyond the
cluster's network, the head trains nothing, and no file holds a secret: KubeRay creates the token,
the other launchers read it from `~/.ray/auth_token`. Pods keep to Kubernetes' "restricted"
standard.
"""

import json
import re
import shlex
import string
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from cavmae.atomic_write import atomic_write
from cavmae.cluster.config import RAY_KINDS
from cavmae.console import plain_console
from cavmae.field_checks import CheckedFields, PositiveInt
from cavmae.trainer.config.parse import parse

FILES = ("ray-cluster.yaml", "ray-job.yaml", "network-policy.yaml", "ray-aws.yaml", "slurm.sh")
_TEMPLATES = Path(__file__).with_name("templates")
_GRACE_SECONDS = 100
"""All of them give a run two minutes to save."""


class _Template(string.Template):
    """Text with `%{placeholders}`; `$` belongs to the shell."""

    delimiter = "%"


@dataclass(frozen=True)
class ClusterFilesConfig(CheckedFields):
    """Write the files that bring a run to a cluster of GPU nodes.

    Raises:
        ValueError: a field is out of range, or `run` has a relative path.
    """

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Where to write ray-cluster.yaml, ray-job.yaml, network-policy.yaml, ray-aws.yaml and
    slurm.sh."""
    run: str
    """What to train, as after `cavmae train`: a recipe and its fields, paths absolute or URLs."""
    image: str
    """Container image with cavmae, built from this repository's Dockerfile."""
    name: str = "cavmae"
    """Name of the cluster and the job."""
    nodes: PositiveInt = 2
    """Nodes that train."""
    gpus_per_node: PositiveInt = 8
    """GPUs of a node, with one rank on each."""
    cpus_per_node: PositiveInt = 64
    """CPU cores of a node, shared by ranks, readers and decoders."""
    memory_gb_per_node: PositiveInt = 256
    """Memory in GB that the job requests on each node."""
    disk_gb_per_node: PositiveInt = 200
    """Disk in GB of each node that a pod may fill: the cache of remote shards
    (`data.cache_gigabytes`), copies of checkpoints while a run resumes, and Ray's logs."""
    volume_claim: str = ""
    """PersistentVolumeClaim that all pods mount at /shared, for run folder and data. Empty: none;
    data and run folder are on other storage."""
    aws_region: str = "us-east-1"
    """Region in which `ray up` starts the machines."""
    aws_instance: str = "p5.48xlarge"
    """Instance type of the nodes that train; the head is an m7i.2xlarge."""
    slurm_time: str = "2-00:00:00"
    """Time limit of a Slurm job; it is requeued before that, and the run resumes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cpus_per_node < self.gpus_per_node:
            raise ValueError(
                f"cpus_per_node is {self.cpus_per_node} for {self.gpus_per_node} GPUs; a rank "
                f"takes one core at least"
            )
        if not re.fullmatch("[a-z0-9]([a-z0-9-]*[a-z0-9])?", self.name):
            raise ValueError(
                f"name is {self.name!r}; use lower-case letters, digits and `-` between them"
            )
        if not re.fullmatch("[0-9:-]+", self.slurm_time):
            raise ValueError(f"slurm_time is {self.slurm_time!r}; use DAYS-HOURS:MINUTES:SECONDS")
        if not self.run.split():
            raise ValueError("run is empty; give a recipe and its fields, as after `cavmae train`")

    @property
    def run_dir(self) -> str:
        """The run folder."""
        return parse(self.words[2:], RAY_KINDS, "--run").run_dir

    @property
    def check_period_ms(self) -> int:
        """Time between two checks of a node: the head makes at most 250 checks a second. From 750
        nodes on it is Ray's own period, 3 s, with which Ray was tested on 2,000 nodes (tips for
        large clusters in Ray's documentation)."""
        return min(max(1000, 4 * self.nodes), 3000)

    @property
    def words(self) -> list[str]:
        """The command that trains on a running cluster."""
        cluster = {
            "workers": self.nodes * self.gpus_per_node,
            "gpus-per-worker": 1,
            "cpus-per-worker": self.cpus_per_node // self.gpus_per_node,
            "address": "auto",
        }
        fields = [f"--{name}={value}" for name, value in cluster.items()]
        run = shlex.split(self.run)
        if not any(re.match(r"--checkpoint\.grace[-_]seconds", word) for word in run):
            fields.append(f"--checkpoint.grace-seconds={_GRACE_SECONDS}")
        return ["cavmae", "train", *run, *fields]


def main(arguments: list[str]) -> int:
    """Run the command; returns its exit code."""
    config = tyro.cli(ClusterFilesConfig, prog="cavmae cluster-files", args=arguments)
    from cavmae.cluster.train import checked_job  # `--help` does without torch

    job = checked_job(config.words[2:], "--run")
    if "://" in job.data.train and config.disk_gb_per_node <= job.data.cache_gigabytes:
        raise ValueError(
            f"disk_gb_per_node is {config.disk_gb_per_node} and data.cache_gigabytes "
            f"{job.data.cache_gigabytes:g}, which does not fit beside logs; raise the former or "
            "set the latter in --run"
        )
    folder = Path(config.folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        path = folder / name
        with atomic_write(path) as temporary:
            temporary.write_text(render(name, config))
            if path.suffix == ".sh":
                temporary.chmod(0o755)
        plain_console().print(str(path), soft_wrap=True, highlight=False)
    return 0


def render(name: str, config: ClusterFilesConfig) -> str:
    """Fill in a template. Lines marked `# volume_claim` are dropped where there is no claim."""
    values: dict[str, Any] = vars(config) | {
        "command": shlex.join(config.words),
        "run_dir": shlex.quote(config.run_dir),
        "check_period_ms": config.check_period_ms,
        "check_timeout_ms": 2 * config.check_period_ms,
        "shm_gb": config.memory_gb_per_node // 4,
    }
    if not name.endswith(".sh"):  # a JSON string is a YAML string, whatever is in it
        values = {
            key: json.dumps(value, ensure_ascii=False) if isinstance(value, str) else value
            for key, value in values.items()
        }
    text = _read_template(name)
    if not config.volume_claim:
        text = re.sub(r".*# volume_claim\n", "", text)
    return _Template(text).substitute(values)


def _read_template(name: str) -> str:
    """Read a template, with each `%include FILE` replaced by that file as deep as it stands."""
    return re.sub(
        r"( *)%include (\S+)\n",
        lambda found: textwrap.indent(_read_template(found[2]), found[1]),
        (_TEMPLATES / name).read_text(),
    )
