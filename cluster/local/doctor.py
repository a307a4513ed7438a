"""`cavmae doctor`: whether this machine can train, and how to fix it if it cannot.

All checks run, whatever fails; nothing is changed, except that DeepSpeed's operator is compiled as
the first run would do.
"""

import dataclasses
import os
import re
import sys
import tomllib
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated

import torch
import tyro
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import cavmae
from cavmae.cluster.local import checks
from cavmae.cluster.local.checks import STATES, Finding, judge, show
from cavmae.console import JsonOption, plain_console, print_json
from cavmae.dataloaders.config import ClipShape, DataConfig
from cavmae.field_checks import CheckedFields

_RUN_BYTES = 20e9
"""Size of a run's folder: three checkpoints of the base model with optimizer state are 7 GB."""
_COMPILE_SECONDS = 600


@dataclass(frozen=True)
class DoctorConfig(CheckedFields, JsonOption):
    """Check versions, GPU, limits, disk, compiler, tracking store and shards of this machine.

    The exit code is 1 if a problem prevents training.
    """

    shards: str = ""
    """One tier of packed shards, a folder or a URL: its first clip is read and decoded."""
    run_dir: str = "runs"
    """Folder in which runs will be written."""
    cache_folder: str = DataConfig.cache_folder
    """`data.cache_folder` of a run."""
    cache_gigabytes: float = DataConfig.cache_gigabytes
    """`data.cache_gigabytes` of a run."""
    tracking_uri: str = ""
    """`tracking.uri` of a run; empty: `mlflow.db` in the folder of runs."""
    quick: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Do not compile DeepSpeed's operator, which takes a minute once."""


def examine(config: DoctorConfig) -> list[Finding]:
    """Run all checks."""
    findings = [python_version(), *packages(), checks.dali(), checks.gpu()]
    if torch.cuda.is_available():
        findings += [checks.driver(), checks.nccl(), checks.nvdec()]
    cache = Path(os.path.expanduser(config.cache_folder))
    findings += [
        *(checks.bf16(), checks.shared_memory(), *checks.limits()),
        checks.disk("disk of the shard cache", cache, config.cache_gigabytes * 1e9),
        checks.disk("disk of runs", Path(config.run_dir), _RUN_BYTES),
        *(checks.compiler(), checks.ninja()),
    ]
    if not config.quick:
        findings.append(operators())
    findings.append(tracking_store(config.tracking_uri, Path(config.run_dir)))
    if config.shards:
        data = DataConfig(cache_folder=config.cache_folder, cache_gigabytes=config.cache_gigabytes)
        findings.append(shard_access(config.shards, data))
    return findings


# ----------------------------------------------------------------------------------- versions


def _requirements() -> tuple[str, list[Requirement]]:
    """Return the Python and the packages that this tree, or the installed package, requires."""
    tree = Path(cavmae.__file__).resolve().parents[1] / "pyproject.toml"
    if tree.exists():
        project = tomllib.loads(tree.read_text())["project"]
        return project["requires-python"], list(map(Requirement, project["dependencies"]))
    required = map(Requirement, metadata.requires("cavmae") or [])
    needed = [one for one in required if one.marker is None or one.marker.evaluate({"extra": ""})]
    return metadata.metadata("cavmae")["Requires-Python"], needed


def python_version() -> Finding:
    """Check that the package supports this Python."""
    version, required = ".".join(map(str, sys.version_info[:3])), _requirements()[0]
    good = version in SpecifierSet(required)
    return judge("Python", good, version, f"create an environment with Python {required}")


def packages() -> list[Finding]:
    """List all packages of a required version in one finding, and each other one by itself."""
    installed = {canonicalize_name(one.name): one.version for one in metadata.distributions()}
    # DALI is a package for each version of CUDA; any of them will do.
    dali = next((name for name in installed if name.startswith("nvidia-dali-cuda")), None)
    fitting, wrong = [], []
    for required in _requirements()[1]:
        name = canonicalize_name(required.name)
        if dali is not None and name.startswith("nvidia-dali-cuda"):
            name = dali
        advice = f"pip install '{required}'"
        if name not in installed:
            wrong.append(Finding(required.name, "problem", "not installed", advice))
        elif not required.specifier.contains(installed[name], prereleases=True):
            wrong.append(Finding(name, "problem", f"{installed[name]} is too old", advice))
        else:
            fitting.append(f"{name} {installed[name]}")
    return [Finding("packages", "ok", ", ".join(fitting)), *wrong]


# --------------------------------------------------------------- what has to be tried out


def operators() -> Finding:
    """Check that DeepSpeed's operator compiles, in a subprocess."""
    name = "DeepSpeed's operator"
    if torch.cuda.is_available():
        return Finding(name, "ok", "not needed with a GPU")
    done = checks.run_python(
        "from cavmae.trainer.distributed.process_group import compile_operators;"
        "print(compile_operators(cuda=False))",
        _COMPILE_SECONDS,
    )
    if done is None:
        found = f"not compiled within {_COMPILE_SECONDS} s"
        return Finding(name, "problem", found, "check that no other process compiles, then retry")
    if done.returncode == 0:
        return Finding(name, "ok", f"compiled, in {done.stdout.split()[-1]}")
    lines = [one for one in (done.stdout + "\n" + done.stderr).splitlines() if one.strip()]
    errors = [line for line in lines if re.search(r"\berror\b|Error", line)]
    advice = "install a C++ compiler, version 9 or newer, and the headers of this Python"
    return Finding(name, "problem", (errors or lines or ["no output"])[0].strip(), advice)


def tracking_store(uri: str, run_dir: Path) -> Finding:
    """Check that MLflow's store answers; the first run creates one in a file."""
    from cavmae.trainer.tracking.sqlite_uri import sqlite_file, sqlite_uri
    from cavmae.trainer.tracking.tracker import check_store

    name = "tracking store"
    uri = uri or sqlite_uri(run_dir.absolute() / "mlflow.db")
    file = sqlite_file(uri)
    if file and not file.exists():
        disk = checks.disk(name, file.parent, 0)
        if disk.state != "ok":
            return disk
        return Finding(name, "ok", f"the first run will create {file}")
    try:
        return Finding(name, "ok", f"{uri}: {check_store(uri)} experiments")
    except ValueError as error:
        advice = "start the server, or set tracking.uri to a store that can be reached"
        return Finding(name, "problem", " ".join(str(error).split()), advice)


def shard_access(folder: str, data: DataConfig) -> Finding:
    """Check that the first clip of a set can be read, and decoded by DALI."""
    from cavmae.dataloaders.loading.quarantine import DecoderFaultError, find_culprits
    from cavmae.dataloaders.loading.reader import ReaderSettings, ReadTask
    from cavmae.dataloaders.shards.shard_set import ShardSet

    name = "shards"
    gpu = 0 if torch.cuda.is_available() else None
    try:
        shards = ShardSet(folder, data.cache)
        data = dataclasses.replace(data, modality=shards.modality)
        settings = ReaderSettings(shards, data, ClipShape(1024, 128, 224), 0, False, gpu)
        bad = find_culprits(settings, [ReadTask(0, 0, 0, 0)])
    except (OSError, ValueError, ImportError) as error:
        advice = "check path, network and credentials; docs/training/data.md lists the URLs"
        return Finding(name, "problem", " ".join(str(error).split()), advice)
    except DecoderFaultError as error:
        return Finding(name, "problem", str(error), "see DALI and NVDEC above")
    if bad:
        found = f"{bad[0].sample_id}: {bad[0].reason}, {bad[0].detail}"
        return Finding(name, "problem", found, f"cavmae verify {folder}; see DALI and NVDEC above")
    device = "GPU" if gpu == 0 else "CPU"
    found = f"{folder}: {shards.samples} clips; the first one was read and decoded on the {device}"
    return Finding(name, "ok", found)


# -------------------------------------------------------------------------------- the command


def main(arguments: list[str]) -> int:
    """Run the command; returns 1 if there is a problem."""
    config = tyro.cli(DoctorConfig, prog="cavmae doctor", args=arguments)
    findings = examine(config)
    counts = {state: sum(one.state == state for one in findings) for state in STATES}
    if config.json:
        print_json([asdict(one) for one in findings])
    else:
        show(findings, plain_console(highlight=False))
        print(", ".join(f"{state}: {count}" for state, count in counts.items()))
    return 1 if counts["problem"] else 0
