"""What this machine has for training, each part with what to do where it is absent.

Libraries are tried by loading them, and DALI in a process of its own: a broken
driver fails far from its cause and can end a process.
"""

import ctypes
import os
import resource
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.cuda.nccl
from rich.console import Console
from rich.markup import escape

from cavmae.trainer.config.resolve import native_dtype

STATES = {"ok": "green", "warning": "yellow", "problem": "red"}
"""Of findings, with their colours."""
_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
_OPEN_FILES, _PROCESSES = 4096, 4096
"""Below this Ray and readers of many shards may run out."""
_SHARED_MEMORY_BYTES = 1 << 30
_FIRST_BF16_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Finding:
    """Something that was looked at.

    Attributes:
        name: of it.
        state: `warning`: training works, but slower or not in all ways; `problem`: it does not.
        found: a version, a size, or what is wrong.
        advice: what to do about it; empty where all is well.
    """

    name: str
    state: Literal["ok", "warning", "problem"]
    found: str
    advice: str = ""


def show(findings: list[Finding], console: Console) -> None:
    """A line for each, and one below it that says what to do."""
    width = max(len(one.name) for one in findings)
    for one in findings:
        state = f"[{STATES[one.state]}]{one.state:>7}[/]"
        console.print(f"{state}  {escape(f'{one.name:<{width}}  {one.found}')}", soft_wrap=True)
        if one.advice:
            console.print(f"{'':>{width + 11}}{escape(one.advice)}", soft_wrap=True)


def gpu() -> Finding:
    """Whether torch sees a CUDA device."""
    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(n) for n in range(torch.cuda.device_count())]
        named = ", ".join(f"{card.name} ({card.total_memory / 1e9:.0f} GB)" for card in cards)
        return Finding("GPU", "ok", named)
    build = torch.version.cuda or "no CUDA"
    found = f"torch {torch.__version__} (built for {build}) sees none"
    if _NVIDIA_DRIVER.exists():
        return Finding(
            "GPU",
            "problem",
            f"there is an NVIDIA driver, but {found}",
            "install a CUDA build of torch that suits the driver (docs/start/install.md); in a "
            "container, pass the GPU in",
        )
    return Finding(
        "GPU",
        "warning",
        found,
        "nothing for a small model on the CPU; otherwise install the driver and a CUDA build of "
        "torch, and in a container pass the GPU in",
    )


def driver() -> Finding:
    """The driver, and whether it is new enough for torch's CUDA; only where torch sees a GPU."""
    version = ctypes.c_int()
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    supported = (version.value // 1000, version.value % 1000 // 10)
    name = _NVIDIA_DRIVER.read_text().splitlines()[0] if _NVIDIA_DRIVER.exists() else "a driver"
    found = f"{name}; it has CUDA {supported[0]}.{supported[1]}, torch {torch.version.cuda}"
    needed = int(str(torch.version.cuda).partition(".")[0])
    if supported[0] < needed:
        return Finding("driver", "problem", found, "update the driver, or install an older torch")
    return Finding("driver", "ok", found)


def nccl() -> Finding:
    """With which GPUs exchange tensors; only where torch sees a GPU."""
    if not torch.distributed.is_nccl_available():
        return Finding("NCCL", "problem", "torch was built without it", "install another torch")
    return Finding("NCCL", "ok", ".".join(map(str, torch.cuda.nccl.version())))


def bf16() -> Finding:
    """Whether the hardware multiplies bf16, which `engine.dtype auto` depends on."""
    if torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        if capability < _FIRST_BF16_CAPABILITY:
            return Finding(
                "bf16",
                "warning",
                f"the GPU has compute capability {capability[0]}.{capability[1]}, which has none",
                "train with --engine.dtype fp32",
            )
        return Finding("bf16", "ok", "by the GPU")
    if native_dtype(gpu=False) == "bf16":
        return Finding("bf16", "ok", "by the CPU")
    return Finding(
        "bf16", "warning", "not by this CPU", "nothing: runs train in fp32 here unless told not to"
    )


def library(name: str, advice: str) -> Finding:
    """Whether the dynamic linker finds a shared library."""
    try:
        ctypes.CDLL(name)
    except OSError as error:
        return Finding(name, "problem", str(error), advice)
    return Finding(name, "ok", "loads")


def nvdec() -> Finding:
    """The library by which GPUs decode video."""
    return library(
        "libnvcuvid.so.1",
        "install the driver's video libraries; in a container, set "
        "NVIDIA_DRIVER_CAPABILITIES=compute,utility,video",
    )


def dali() -> Finding:
    """Whether DALI imports."""
    code = "import nvidia.dali as dali; print(dali.__version__)"
    advice = "pip install nvidia-dali-cuda130 (or -cuda120 for CUDA 12)"
    try:
        result = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
        )
    except subprocess.TimeoutExpired:
        return Finding("DALI", "problem", "does not import within 120 s", "look at the driver")
    if result.returncode == 0:
        return Finding("DALI", "ok", f"version {result.stdout.split()[-1]}")
    lines = result.stderr.strip().splitlines() or [f"exit code {result.returncode}"]
    return Finding("DALI", "problem", lines[-1], advice)


def shared_memory(folder: Path = Path("/dev/shm")) -> Finding:
    """Room for what Ray and NCCL share between processes; a container has 64 MB unless told."""
    if not folder.is_dir():
        return Finding("shared memory", "problem", f"no {folder}", "mount a tmpfs there")
    usage = shutil.disk_usage(folder)
    found = f"{folder} has {usage.free / 1e9:.1f} of {usage.total / 1e9:.1f} GB free"
    if usage.free < _SHARED_MEMORY_BYTES:
        advice = "in a container, start it with --shm-size=16g; elsewhere, mount a larger tmpfs"
        return Finding("shared memory", "warning", found, advice)
    return Finding("shared memory", "ok", found)


def limits() -> list[Finding]:
    """Of this process and its children, by the shell that it was started from."""
    findings = []
    for name, which, least, flag in (
        ("open files", resource.RLIMIT_NOFILE, _OPEN_FILES, "-n"),
        ("processes", resource.RLIMIT_NPROC, _PROCESSES, "-u"),
    ):
        soft, hard = resource.getrlimit(which)
        enough = soft == resource.RLIM_INFINITY or soft >= least
        reach = least if hard == resource.RLIM_INFINITY else min(hard, 16 * least)
        advice = f"ulimit {flag} {reach}"
        if hard != resource.RLIM_INFINITY and hard < least:
            advice = (
                f"raise the hard limit in /etc/security/limits.conf, then ulimit {flag} {least}"
            )
        findings.append(
            Finding(name, "ok", _limit(soft))
            if enough
            else Finding(name, "warning", f"{_limit(soft)} at most", advice)
        )
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    # Host memory for copies to a GPU is pinned by the driver, which this limit does not bind;
    # InfiniBand's is bound.
    few = torch.cuda.is_available() and locked != resource.RLIM_INFINITY
    advice = "with InfiniBand: ulimit -l unlimited (docker: --ulimit memlock=-1)" if few else ""
    amount = _limit(locked) + ("" if locked == resource.RLIM_INFINITY else " bytes")
    findings.append(Finding("locked memory", "warning" if few else "ok", amount, advice))
    return findings


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else f"{value:,}"


def disk(name: str, folder: Path, wanted_bytes: float) -> Finding:
    """Whether a folder, or the first above it that exists, can be written to and has room.

    Args:
        name: what it is for.
        folder: of this machine.
        wanted_bytes: that should be free.
    """
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        advice = "choose another folder, or give yourself the right to write"
        return Finding(name, "problem", f"{there} can't be written to", advice)
    free = shutil.disk_usage(there).free
    found = f"{folder}: {free / 1e9:.1f} GB free"
    if free < wanted_bytes:
        advice = (
            f"make room: {wanted_bytes / 1e9:.0f} GB are wanted there, or set less or elsewhere"
        )
        return Finding(name, "warning", found, advice)
    return Finding(name, "ok", found)


def compiler() -> Finding:
    """What DeepSpeed compiles its CPU operators with."""
    wanted = os.environ.get("CXX", "g++")
    path = shutil.which(wanted)
    if path is None:
        state = "warning" if torch.cuda.is_available() else "problem"
        return Finding("C++ compiler", state, f"no {wanted}", "apt-get install g++, or set CXX")
    said = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    return Finding("C++ compiler", "ok", (said.stdout.splitlines() or [path])[0])


def ninja() -> Finding:
    """What DeepSpeed's compiling is driven by: of this environment, also where it isn't active."""
    places = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    path = shutil.which("ninja", path=places)
    if path is None:
        return Finding("ninja", "problem", "absent", "pip install ninja")
    said = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    return Finding("ninja", "ok", said.stdout.strip())
