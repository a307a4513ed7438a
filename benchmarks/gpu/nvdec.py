"""`cavmae bench nvdec`: whether this machine can decode video on its GPU, and what is missing.

NVDEC needs a driver library that containers lack unless it is requested, and DALI; both fail far
from their cause, so each is probed by name here.
"""

from dataclasses import asdict, dataclass

import torch
import tyro
from rich.console import Console

from cavmae.benchmarks.harness.records import RecordedConfig, write_record
from cavmae.benchmarks.harness.timing import default_device
from cavmae.cluster.local.checks import Finding, dali, gpu, library, nvdec, show


@dataclass(frozen=True)
class NvdecConfig(RecordedConfig):
    """Check video decoding on this GPU (NVDEC)."""


def findings() -> list[Finding]:
    """Probe everything that decoding on the GPU needs."""
    driver = "install the NVIDIA driver; in a container, pass the GPU in"
    return [gpu(), library("libcuda.so.1", driver), nvdec(), dali()]


def main(arguments: list[str]) -> int:
    """Print each probe, write a record; returns 0 where video decodes on the GPU, else 1."""
    config = tyro.cli(NvdecConfig, prog="cavmae bench nvdec", args=arguments)
    found = findings()
    show(found, Console(highlight=False))
    absent = ", ".join(one.name for one in found if one.state != "ok")
    print(
        f"no video decoding on a GPU: without {absent}" if absent else "video decodes on this GPU"
    )
    results = {"ready": not absent, "probes": [asdict(one) for one in found]}
    device = torch.device(default_device())
    print(f"record: {write_record(config.out, 'nvdec', device, {}, results)}")
    return 1 if absent else 0
