"""`cavmae doctor`: whether this machine can train, and what to do where it can't.

Everything is looked at, whatever is wrong before; nothing is changed but for DeepSpeed's operator,
which is compiled as the first run would.
"""

import os
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated

import torch
import tyro
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich.console import Console

import cavmae
from cavmae.cluster.local import checks
from cavmae.cluster.local.checks import STATES, Finding, show
from cavmae.command import exit_code
from cavmae.dataloaders.config import DataConfig

_RUN_BYTES = 20e9
"""Of a run's folder: three checkpoints of the base model with optimizer state are 7 GB."""
_COMPILE_SECONDS = 600


@dataclass(frozen=True)
class DoctorConfig:
    """Check versions, GPU, limits, disk, compiler, tracking store and shards of this machine.

    Exit code 1 where something stands in the way of training.
    """

    shards: str = ""
    """One tier of packed shards, a folder or a URL: its first clip is read and decoded."""
    run_dir: str = "runs"
    """Where runs will be written."""
    cache_folder: str = DataConfig.cache_folder
    """As `data.cache_folder` of a run."""
    cache_gigabytes: float = DataConfig.cache_gigabytes
    """As `data.cache_gigabytes` of a run."""
    tracking_uri: str = ""
    """As `tracking.uri` of a run; empty: `mlflow.db` in the folder of runs."""
    quick: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Don't compile DeepSpeed's operator, which takes a minute once."""


def examine(config: DoctorConfig) -> list[Finding]:
    """Look at everything."""
    findings = [python_version(), *packages(), checks.dali(), checks.gpu()]
    if torch.cuda.is_available():
        findings += [checks.driver(), checks.nccl(), checks.nvdec()]
    findings += [checks.bf16(), checks.shared_memory(), *checks.limits()]
    cache = Path(os.path.expanduser(config.cache_folder))
    findings += [
        checks.disk("disk of the shard cache", cache, config.cache_gigabytes * 1e9),
        checks.disk("disk of runs", Path(config.run_dir), _RUN_BYTES),
        checks.compiler(),
        checks.ninja(),
    ]
    if not config.quick:
        findings.append(operators())
    findings.append(tracking_store(config.tracking_uri, Path(config.run_dir)))
    if config.shards:
        findings.append(shard_access(config.shards, DataConfig(
            cache_folder=config.cache_folder, cache_gigabytes=config.cache_gigabytes
        )))  # fmt: skip
    return findings


# ----------------------------------------------------------------------------------- versions


def _asked() -> tuple[str, list[Requirement]]:
    """Python and packages that this tree, or the installed package, asks for."""
    tree = Path(cavmae.__file__).resolve().parents[1] / "pyproject.toml"
    if tree.exists():
        project = tomllib.loads(tree.read_text())["project"]
        return project["requires-python"], list(map(Requirement, project["dependencies"]))
    installed = metadata.metadata("cavmae")
    asked = map(Requirement, metadata.requires("cavmae") or [])
    needed = [one for one in asked if one.marker is None or one.marker.evaluate({"extra": ""})]
    return installed["Requires-Python"], needed


def python_version() -> Finding:
    """Whether this Python is one that the package is for."""
    version, asked = ".".join(map(str, sys.version_info[:3])), _asked()[0]
    if version in SpecifierSet(asked):
        return Finding("Python", "ok", version)
    return Finding("Python", "problem", version, f"make an environment with Python {asked}")


def packages() -> list[Finding]:
    """All that are there in a version asked for, in one finding; one for each other."""
    fitting, wrong = [], []
    for asked in _asked()[1]:
        names = [asked.name]
        if asked.name.startswith("nvidia-dali-cuda"):  # There is one for each CUDA.
            names += [f"nvidia-dali-cuda{version}" for version in (120, 130)]
        found = _installed(names)
        if found is None:
            wrong.append(Finding(asked.name, "problem", "absent", f"pip install '{asked}'"))
        elif not asked.specifier.contains(found[1], prereleases=True):
            advice = f"pip install '{asked}'"
            wrong.append(Finding(asked.name, "problem", f"{found[1]} is too old", advice))
        else:
            fitting.append(" ".join(found))
    return [Finding("packages", "ok", ", ".join(fitting)), *wrong]


def _installed(names: list[str]) -> tuple[str, str] | None:
    """The first that is there, with its version."""
    for name in names:
        try:
            return name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


# ----------------------------------------------------------------- what has to be tried to know


def operators() -> Finding:
    """Whether DeepSpeed's operator compiles, in a process of its own."""
    name = "DeepSpeed's operator"
    if torch.cuda.is_available():
        return Finding(name, "ok", "not needed with a GPU")
    code = (
        "from cavmae.trainer.distributed.process_group import compile_operators;"
        "print(compile_operators(cuda=False))"
    )
    tree = str(Path(cavmae.__file__).resolve().parents[1])
    path = os.pathsep.join([tree, *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=False,
            timeout=_COMPILE_SECONDS,
            env=os.environ | {"PYTHONPATH": path},
        )
    except subprocess.TimeoutExpired:
        found = f"not compiled in {_COMPILE_SECONDS} s"
        return Finding(name, "problem", found, "see that no other process compiles, then try again")
    if done.returncode == 0:
        return Finding(name, "ok", f"compiled, in {done.stdout.split()[-1]}")
    said = [line for line in done.stdout.splitlines() + done.stderr.splitlines() if line.strip()]
    errors = [line for line in said if re.search(r"\berror\b|Error", line)]
    advice = "install a C++ compiler that is not older than 9, and the headers of this Python"
    return Finding(name, "problem", (errors or said or ["nothing was said"])[0].strip(), advice)


def tracking_store(uri: str, run_dir: Path) -> Finding:
    """Whether MLflow's store answers; one in a file is made by the first run."""
    from cavmae.trainer.tracking.tracker import check_store

    name = "tracking store"
    uri = uri or f"sqlite:///{run_dir.absolute() / 'mlflow.db'}"
    file = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:///") and not file.exists():
        place = checks.disk(name, file.parent, 0)
        if place.state != "ok":
            return place
        return Finding(name, "ok", f"{file} will be made by the first run")
    try:
        return Finding(name, "ok", f"{uri}: {check_store(uri)} experiments")
    except ValueError as error:
        advice = "start the server, or set tracking.uri to a store that can be reached"
        return Finding(name, "problem", " ".join(str(error).split()), advice)


def shard_access(folder: str, data: DataConfig) -> Finding:
    """Whether the first clip of a set can be read, and decoded by DALI."""
    from cavmae.dataloaders.loading.quarantine import ClipTrial, find_culprits
    from cavmae.dataloaders.loading.reader import ReaderSettings, ReadTask
    from cavmae.dataloaders.media.log_mel import HOP_SAMPLES, WINDOW_SAMPLES
    from cavmae.dataloaders.shards.shard_set import ShardSet

    name = "shards"
    samples = 1023 * HOP_SAMPLES + WINDOW_SAMPLES  # of 10 s
    gpu = 0 if torch.cuda.is_available() else None
    try:
        shards = ShardSet(folder, data.cache)
        settings = ReaderSettings(shards, 0, data.frame_choice, 224, samples, False, gpu)
        damages = find_culprits(ClipTrial(settings), shards, [ReadTask(0, 0, 0, 0)])
    except (OSError, ValueError, ImportError) as error:
        advice = (
            "check the name, the network and the credentials; docs/training/data.md has the URLs"
        )
        return Finding(name, "problem", " ".join(str(error).split()), advice)
    if damages:
        found = f"{damages[0].sample_id}: {damages[0].reason}, {damages[0].detail}"
        return Finding(name, "problem", found, f"cavmae verify {folder}; see DALI and NVDEC above")
    where = "on the GPU" if gpu == 0 else "on the CPU"
    found = f"{folder}: {shards.samples} clips, the first is read and decoded {where}"
    return Finding(name, "ok", found)


# -------------------------------------------------------------------------------- the command


def main(arguments: list[str]) -> int:
    """The command; returns 1 where there is a problem."""
    findings = examine(tyro.cli(DoctorConfig, prog="cavmae doctor", args=arguments))
    show(findings, Console(highlight=False))
    counts = {state: sum(one.state == state for one in findings) for state in STATES}
    print(", ".join(f"{state}: {count}" for state, count in counts.items()))
    return 1 if counts["problem"] else 0


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
