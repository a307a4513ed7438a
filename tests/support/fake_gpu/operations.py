"""Small things done on the device that computes nothing; see `cavmae.benchmarks.fake_cuda`."""

import os
from typing import Any

import torch
import triton
import triton.language as tl

from cavmae.benchmarks.fake_cuda.device import DEVICE
from cavmae.benchmarks.fake_cuda.trace import Trace, traced


@triton.jit
def _nothing_kernel(x, count: tl.constexpr):
    pass


def launch(device: str, grid: tuple[int, ...]) -> Trace:
    """Launch a kernel on 100 values on a device."""
    kernel: Any = _nothing_kernel
    with traced() as trace:
        kernel[grid](torch.zeros(100, device=device), count=1)
    return trace


def reads() -> Trace:
    """Read values in all ways, each in a phase that names it."""
    with traced() as trace:
        x = torch.zeros(3, device=DEVICE)
        here = torch.zeros(3)
        ways = {
            "item": x[0].item,
            "bool": lambda: bool((x > 0).any()),
            "tolist": x.tolist,
            "cpu": x.cpu,
            "nonzero": x.nonzero,
            "pageable": lambda: here.to(DEVICE, non_blocking=True),
            "blocking": lambda: here.pin_memory().to(DEVICE),
            "synchronize": torch.cuda.synchronize,
            "pinned": lambda: here.pin_memory().to(DEVICE, non_blocking=True),
            "compute": lambda: (x * 2).sum(),
        }
        for name, read in ways.items():
            with trace.phase(name):
                read()
    return trace


def round_trip() -> tuple[list[int], int, float]:
    """Numbers of the host after a computation on the device; a number that it computes itself."""
    with traced():
        counts = torch.tensor([3, 1, 2], device=DEVICE)
        return (
            (counts * 10).sort()[0].tolist(),
            int(counts.max()),
            float(torch.rand((), device=DEVICE)),
        )


def products() -> Trace:
    """A batched product, and an update of 403 tensors in one call."""
    with traced() as trace:
        a, b = torch.zeros(4, 8, 16, device=DEVICE), torch.zeros(4, 16, 32, device=DEVICE)
        torch.bmm(a, b)
        many = [torch.zeros(10, device=DEVICE) for _ in range(403)]
        torch._foreach_add_(many, many)  # pyright: ignore[reportPrivateImportUsage]
    return trace


def device_facts() -> tuple[str, tuple[int, int], int]:
    properties = torch.cuda.get_device_properties(DEVICE)
    target: Any = triton.runtime.driver.active.get_current_target()
    return properties.name, torch.cuda.get_device_capability(), target.arch


def mixed_devices() -> None:
    with traced():
        torch.add(torch.zeros(3, device=DEVICE), torch.zeros(3))


def end(code: int) -> None:
    os._exit(code)
