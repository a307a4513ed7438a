"""One JSON record a benchmark run: what was measured, on what, with which code.

A number without its hardware, versions and spread cannot be compared with the next one.
"""

import datetime
import json
import os
import platform
import statistics
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from cavmae.atomic_write import write_text

RECORD_SCHEMA = 1
_PACKAGES = ("torch", "triton", "numpy", "flash-attn", "deepspeed", "nvidia-dali-cuda130")


def timing(seconds: list[float]) -> dict[str, Any]:
    """Median, spread and every single time.

    Args:
        seconds: at least one time.
    """
    quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
    return {
        "median_seconds": statistics.median(seconds),
        "lower_quartile_seconds": quartiles[0],
        "upper_quartile_seconds": quartiles[2],
        "minimum_seconds": min(seconds),
        "maximum_seconds": max(seconds),
        "all_seconds": seconds,
    }


def hardware(device: torch.device) -> dict[str, Any]:
    """Processor, memory and, for a CUDA device, GPU and driver side."""
    found: dict[str, Any] = {
        "device": device.type,
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": gpu.name,
            "gpu_memory_bytes": gpu.total_memory,
            "gpu_capability": f"{gpu.major}.{gpu.minor}",
            "gpu_count": torch.cuda.device_count(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return found


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str | None]:
    """Python and the packages that matter to a step; None where one is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def commit() -> str:
    """Short git commit of this tree, `-dirty` if changed; `unknown` outside a repository."""
    folder = Path(__file__).resolve().parent
    try:
        described = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=10"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (FileNotFoundError, subprocess.CalledProcessError):
        return "unknown"
    return described.stdout.strip()


def _portable(value: Any) -> Any:
    """A path of this machine as its last name, which is what others can know of it."""
    is_path = isinstance(value, str) and Path(value).is_absolute()
    return Path(value).name if is_path else value


def write_record(
    folder: str | Path,
    suite: str,
    device: torch.device,
    configuration: dict[str, Any],
    results: dict[str, Any],
) -> Path:
    """Write `<suite>-<date>-<commit>.json` and return its path.

    A second record of one suite, second and commit replaces the first.

    Args:
        folder: made where it is missing.
        suite: name of the benchmark.
        configuration: every flag and size that the results depend on.
        results: JSON values.
    """
    now, code = datetime.datetime.now(datetime.UTC), commit()
    record = {
        "schema": RECORD_SCHEMA,
        "suite": suite,
        "time": now.isoformat(timespec="seconds"),
        "commit": code,
        "hardware": hardware(device),
        "versions": versions(),
        "configuration": {name: _portable(value) for name, value in configuration.items()},
        "results": results,
    }
    path = Path(folder) / f"{suite}-{now:%Y%m%dT%H%M%S}-{code}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(record, indent=2) + "\n")
    return path


@dataclass(frozen=True)
class Record:
    """A record that was read back.

    Attributes:
        path: of its file.
        suite: name of the benchmark.
        time: when it was written, ISO 8601; of a record put together by hand, the day.
        commit: of the code.
        hardware, versions: of the machine.
        configuration: that the results depend on.
        results: JSON values; what a record put together by hand has beside them is among them.
    """

    path: Path
    suite: str
    time: str
    commit: str
    hardware: dict[str, Any]
    versions: dict[str, str | None]
    configuration: dict[str, Any]
    results: dict[str, Any]


def read_record(path: str | Path) -> Record:
    """Read what `write_record` wrote.

    Raises:
        OSError: there is no such file.
        ValueError: it is no record, or one of a later version.
    """
    path = Path(path)
    try:
        document = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); give a record of `cavmae bench`") from None
    if not isinstance(document, dict):
        raise ValueError(f"{path} is no record of `cavmae bench`")
    schema = document.pop("schema", RECORD_SCHEMA)
    if schema != RECORD_SCHEMA:
        raise ValueError(f"{path} has schema {schema}, this version reads {RECORD_SCHEMA}")
    texts = {name: document.pop(name, None) for name in ("suite", "commit")}
    texts["time"] = document.pop("time", None) or document.pop("date", None)
    parts = {
        name: document.pop(name, None)
        for name in ("hardware", "versions", "configuration", "results")
    }
    absent = [name for name, value in texts.items() if not isinstance(value, str)]
    absent += [name for name, value in parts.items() if not isinstance(value, dict)]
    if absent:
        raise ValueError(f"{path} is no record of `cavmae bench`: it has no {', '.join(absent)}")
    parts["results"] = document | parts["results"]
    return Record(path=path, **texts, **parts)
