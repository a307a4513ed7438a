"""`cavmae bench video-check`: whether this machine can decode video on its GPU, and what it lacks.

NVDEC needs a driver library that containers leave out unless asked for, and DALI; both fail far
from their cause, so they are looked for by name here.
"""

import argparse
import sys
from dataclasses import asdict

import torch
from rich.console import Console

from cavmae.benchmarks.harness.records import write_record
from cavmae.cluster.local.checks import Finding, dali, gpu, library, nvdec, show


def findings() -> list[Finding]:
    """Everything that decoding on the GPU needs."""
    driver = "install the NVIDIA driver; in a container, pass the GPU in"
    return [gpu(), library("libcuda.so.1", driver), nvdec(), dali()]


def main(argv: list[str]) -> int:
    """Print each probe, write a record; returns 0 where video decodes on the GPU, else 1."""
    parser = argparse.ArgumentParser(
        prog="cavmae bench video-check", description="Check video decoding on this GPU (NVDEC)."
    )
    parser.add_argument("--out", default="benchmarks/results", help="folder of the record")
    flags = parser.parse_args(argv)
    found = findings()
    show(found, Console(highlight=False))
    absent = ", ".join(one.name for one in found if one.state != "ok")
    ready = not absent
    print("video decodes on this GPU" if ready else f"no video decoding on a GPU: without {absent}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = {"ready": ready, "probes": [asdict(one) for one in found]}
    print(f"record: {write_record(flags.out, 'video-check', device, {}, results)}")
    return 0 if ready else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
