"""`cavmae bench video-check`: whether this machine can decode video on its GPU, and what it lacks.

NVDEC needs a driver library that containers leave out unless asked for, and DALI; both fail far
from their cause, so they are looked for by name here.
"""

import argparse
import ctypes
import subprocess
import sys
from dataclasses import asdict, dataclass

import torch

from cavmae.benchmarks.records import write_record


@dataclass(frozen=True)
class Probe:
    """Attributes: name; present; detail, a version or what is wrong; fix, empty if present."""

    name: str
    present: bool
    detail: str
    fix: str = ""


def library(name: str, fix: str) -> Probe:
    """Whether the dynamic linker finds a shared library."""
    try:
        ctypes.CDLL(name)
    except OSError as error:
        return Probe(name, False, str(error), fix)
    return Probe(name, True, "loads")


def dali() -> Probe:
    """Whether DALI imports, in a process of its own: a broken driver can end that process."""
    code = "import nvidia.dali as dali; print(dali.__version__)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    if result.returncode == 0:
        return Probe("DALI", True, f"version {result.stdout.split()[-1]}")
    lines = result.stderr.strip().splitlines() or [f"exit code {result.returncode}"]
    return Probe(
        "DALI", False, lines[-1], "pip install nvidia-dali-cuda130 (or -cuda120 for CUDA 12)"
    )


def gpu() -> Probe:
    """Whether torch sees a CUDA device."""
    if torch.cuda.is_available():
        return Probe("GPU", True, torch.cuda.get_device_name())
    build = torch.version.cuda or "no CUDA"
    return Probe(
        "GPU",
        False,
        f"torch {torch.__version__} (built for {build}) sees none",
        "install the driver and a CUDA build of torch; in a container, pass the GPU in",
    )


def probes() -> list[Probe]:
    """Everything that decoding on the GPU needs."""
    return [
        gpu(),
        library("libcuda.so.1", "install the NVIDIA driver; in a container, pass the GPU in"),
        library(
            "libnvcuvid.so.1",
            "install the driver's video libraries; in a container, set "
            "NVIDIA_DRIVER_CAPABILITIES=compute,utility,video",
        ),
        dali(),
    ]


def main(argv: list[str]) -> int:
    """Print each probe, write a record; returns 0 where video decodes on the GPU, else 1."""
    parser = argparse.ArgumentParser(
        prog="cavmae bench video-check", description="Check video decoding on this GPU (NVDEC)."
    )
    parser.add_argument("--out", default="benchmarks/results", help="folder of the record")
    flags = parser.parse_args(argv)
    found = probes()
    for probe in found:
        print(f"{probe.name}: {'present' if probe.present else 'ABSENT'}, {probe.detail}")
        if probe.fix:
            print(f"  to have it: {probe.fix}")
    ready = all(probe.present for probe in found)
    absent = ", ".join(probe.name for probe in found if not probe.present)
    print("video decodes on this GPU" if ready else f"no video decoding on a GPU: without {absent}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = {"ready": ready, "probes": [asdict(probe) for probe in found]}
    print(f"record: {write_record(flags.out, 'video-check', device, {}, results)}")
    return 0 if ready else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
