"""Checks of this machine's hardware, libraries and limits, each with a fix for what is missing.

Libraries are checked by loading them, and DALI in a subprocess: a broken driver fails far from its
cause and can kill a process.
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
from typing import Any, Literal

import torch
import torch.cuda.nccl
from rich.console import Console
from rich.text import Text

import cavmae
from cavmae.trainer.config.resolve import native_dtype
from cavmae.trainer.cost_model.gpus import find_gpu

State = Literal["ok", "warning", "problem"]
STATES = {"ok": "green", "warning": "yellow", "problem": "red"}
"""States of findings, with their colours."""
_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
_MIN_OPEN_FILES, _MIN_PROCESSES = 4096, 4096
"""With less, Ray and readers of many shards may fail."""
_MIN_SHARED_MEMORY_BYTES = 1 << 30
_FIRST_BF16_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Finding:
    """Result of one check.

    Attributes:
        name: name of the check.
        state: `warning`: training works, but slower or with less; `problem`: it does not work.
        found: a version, a size, or what is wrong.
        advice: how to fix it; empty if all is well.
    """

    name: str
    state: State
    found: str
    advice: str = ""


def judge(name: str, good: bool, found: str, advice: str, bad: State = "problem") -> Finding:
    """Return a finding that is ok, or `bad` with the advice."""
    return Finding(name, "ok", found) if good else Finding(name, bad, found, advice)


def show(findings: list[Finding], console: Console) -> None:
    """Print a line for each finding, and one below it with the advice."""
    width = max(len(one.name) for one in findings)
    for one in findings:
        line = Text.assemble(
            (f"{one.state:>7}", STATES[one.state]), f"  {one.name:<{width}}  {one.found}"
        )
        console.print(line, soft_wrap=True)
        if one.advice:
            console.print(Text(f"{'':>{width + 11}}{one.advice}"), soft_wrap=True)


def gpu() -> Finding:
    """Check that torch sees a CUDA device."""
    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(n) for n in range(torch.cuda.device_count())]
        return Finding("GPU", "ok", ", ".join(map(_described, cards)))
    found = f"torch {torch.__version__} (built for {torch.version.cuda or 'CPU'}) finds no GPU"
    install = "install a CUDA build of torch (docs/start/install.md); expose the GPU to a container"
    if _NVIDIA_DRIVER.exists():
        found = f"an NVIDIA driver is installed, but {found}"
        return Finding("GPU", "problem", found, f"for this driver, {install}")
    advice = f"none needed for a small model on the CPU; else install a driver, then {install}"
    return Finding("GPU", "warning", found, advice)


def _described(card: Any) -> str:
    """Describe a GPU; a known one with the rate that the MFU of runs is relative to."""
    known = find_gpu(card.name)
    rate = f", {known.bf16 / 1e12:g} TFLOP/s in bf16 by its data sheet" if known else ""
    return f"{card.name} ({card.total_memory / 1e9:.0f} GB{rate})"


def driver() -> Finding:
    """Check that the driver supports torch's CUDA; call it only where torch sees a GPU."""
    version = ctypes.c_int()
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    major, minor = version.value // 1000, version.value % 1000 // 10
    name = _NVIDIA_DRIVER.read_text().splitlines()[0] if _NVIDIA_DRIVER.exists() else "a driver"
    cuda = str(torch.version.cuda)
    found = f"{name}; it supports CUDA {major}.{minor}, torch needs {cuda}"
    advice = "update the driver, or install an older torch"
    return judge("driver", major >= int(cuda.partition(".")[0]), found, advice)


def nccl() -> Finding:
    """Check that torch has NCCL; call it only where torch sees a GPU."""
    if not torch.distributed.is_nccl_available():
        return Finding("NCCL", "problem", "torch was built without it", "install another torch")
    return Finding("NCCL", "ok", ".".join(map(str, torch.cuda.nccl.version())))


def bf16() -> Finding:
    """Check for hardware support of bf16, on which `engine.dtype auto` depends."""
    if torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        found = f"GPU of compute capability {capability[0]}.{capability[1]}"
        advice = "train with --engine.dtype fp32"
        return judge("bf16", capability >= _FIRST_BF16_CAPABILITY, found, advice, "warning")
    if native_dtype(gpu=False) == "bf16":
        return Finding("bf16", "ok", "supported by the CPU")
    advice = "none needed: runs train in fp32 here by default"
    return Finding("bf16", "warning", "not supported by this CPU", advice)


def library(name: str, advice: str) -> Finding:
    """Check that the dynamic linker finds a shared library."""
    try:
        ctypes.CDLL(name)
    except OSError as error:
        return Finding(name, "problem", str(error), advice)
    return Finding(name, "ok", "loads")


def nvdec() -> Finding:
    """Check for the library with which GPUs decode video."""
    container = "in a container, set NVIDIA_DRIVER_CAPABILITIES=compute,utility,video"
    return library("libnvcuvid.so.1", f"install the driver's video libraries; {container}")


def dali() -> Finding:
    """Check that DALI can be imported."""
    result = run_python("import nvidia.dali as dali; print(dali.__version__)", seconds=120)
    if result is None:
        return Finding("DALI", "problem", "not imported within 120 s", "check the driver")
    lines = result.stderr.strip().splitlines() or [f"exit code {result.returncode}"]
    good = result.returncode == 0
    found = f"version {result.stdout.split()[-1]}" if good else lines[-1]
    return judge("DALI", good, found, "pip install nvidia-dali-cuda130 (or -cuda120 for CUDA 12)")


def run_python(code: str, seconds: float) -> "subprocess.CompletedProcess[str] | None":
    """Run code in a subprocess that imports this tree; returns None after a timeout."""
    tree = str(Path(cavmae.__file__).resolve().parents[1])
    path = os.pathsep.join([tree, *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        return subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=seconds,
            env=os.environ | {"PYTHONPATH": path},
        )
    except subprocess.TimeoutExpired:
        return None


def shared_memory(folder: Path = Path("/dev/shm")) -> Finding:
    """Check the shared memory of Ray and NCCL; containers have 64 MB by default."""
    if not folder.is_dir():
        return Finding("shared memory", "problem", f"no {folder}", "mount a tmpfs there")
    usage = shutil.disk_usage(folder)
    found = f"{folder} has {usage.free / 1e9:.1f} of {usage.total / 1e9:.1f} GB free"
    advice = "in a container, start it with --shm-size=16g; elsewhere, mount a larger tmpfs"
    good = usage.free >= _MIN_SHARED_MEMORY_BYTES
    return judge("shared memory", good, found, advice, "warning")


def limits() -> list[Finding]:
    """Check the limits that this process inherits from its shell."""
    findings = []
    for name, which, minimum, flag in (
        ("open files", resource.RLIMIT_NOFILE, _MIN_OPEN_FILES, "-n"),
        ("processes", resource.RLIMIT_NPROC, _MIN_PROCESSES, "-u"),
    ):
        soft, hard = (
            sys.maxsize if limit == resource.RLIM_INFINITY else limit
            for limit in resource.getrlimit(which)
        )
        found = f"at most {soft:,}" if soft < sys.maxsize else "unlimited"
        advice = f"ulimit {flag} {max(minimum, min(hard, 16 * minimum))}"
        if hard < minimum:
            advice = f"raise the hard limit in /etc/security/limits.conf, then {advice}"
        findings.append(judge(name, soft >= minimum, found, advice, "warning"))
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    unlimited = locked == resource.RLIM_INFINITY
    # The driver pins host memory for copies to a GPU, which this limit does not affect; it does
    # affect InfiniBand.
    found = "unlimited" if unlimited else f"at most {locked:,} bytes"
    advice = "with InfiniBand: ulimit -l unlimited (docker: --ulimit memlock=-1)"
    good = unlimited or not torch.cuda.is_available()
    return [*findings, judge("locked memory", good, found, advice, "warning")]


def disk(name: str, folder: Path, needed_bytes: float) -> Finding:
    """Check that a folder, or its nearest existing parent, is writable and has space.

    Args:
        name: name of the finding.
        folder: folder of this machine.
        needed_bytes: space that should be free.
    """
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        advice = "choose another folder, or get write permission"
        return Finding(name, "problem", f"{existing} is not writable", advice)
    free = shutil.disk_usage(existing).free
    found = f"{folder}: {free / 1e9:.1f} GB free"
    advice = (
        f"free space ({needed_bytes / 1e9:.0f} GB are needed), or choose another folder or size"
    )
    return judge(name, free >= needed_bytes, found, advice, "warning")


def compiler() -> Finding:
    """Check for the C++ compiler with which DeepSpeed compiles its CPU operators."""
    state = "warning" if torch.cuda.is_available() else "problem"
    command = os.environ.get("CXX", "g++")
    return _program("C++ compiler", command, None, "apt-get install g++, or set CXX", state)


def ninja() -> Finding:
    """Check for ninja, which DeepSpeed compiles with, in PATH or this environment's scripts."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    return _program("ninja", "ninja", path, "pip install ninja", "problem")


def _program(name: str, command: str, path: str | None, advice: str, bad: State) -> Finding:
    """Look for a program in `path`, or PATH, and for its version."""
    program = shutil.which(command, path=path)
    if program is None:
        return Finding(name, bad, f"{command} not found", advice)
    output = subprocess.run([program, "--version"], capture_output=True, text=True).stdout
    return Finding(name, "ok", (output.splitlines() or [program])[0])
