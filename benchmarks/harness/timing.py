"""Timers that wait for the device, and the peak rates of a machine: a large copy and a large
matrix product."""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any, Literal

import torch

Device = Literal["cpu", "cuda"]

MIN_SECONDS = 0.02
"""Back-to-back calls on a GPU take at least this: it has work while Python prepares the next."""
MAX_CALLS = 100


def default_device() -> Device:
    """Return `cuda` where there is a GPU, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def ceilings(device: torch.device, dtype: torch.dtype, repeats: int = 7) -> dict[str, float]:
    """Measure the bytes a second of a large copy (read and written) and the operations a second of
    a large matrix product.

    Args:
        device: device to measure.
        dtype: dtype of the product's square matrices.
        repeats: timed runs of each; the median counts.
    """
    gpu = device.type == "cuda"
    source = torch.zeros((1 << 30) if gpu else (1 << 26), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    side = 8192 if gpu else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    copy_seconds = median_seconds(lambda: target.copy_(source), device, repeats)
    return {
        "bytes_per_second": 2 * source.nbytes / copy_seconds,
        "flops_per_second": 2 * side**3 / median_seconds(lambda: a @ b, device, repeats),
    }


def median_seconds(run: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Return the median time of one call, after one that is not timed."""
    run()
    calls = calls_per_timing(run, device)
    return statistics.median(seconds_per_call(run, calls, device) for _ in range(repeats))


def calls_per_timing(run: Callable[[], Any], device: torch.device) -> int:
    """Return how many back-to-back calls make one timing: 1 on a CPU."""
    if device.type != "cuda":
        return 1
    once = min(seconds_per_call(run, 1, device) for _ in range(2))
    return min(MAX_CALLS, max(1, math.ceil(MIN_SECONDS / max(once, 1e-9))))


def seconds_per_call(run: Callable[[], Any], calls: int, device: torch.device) -> float:
    """Time back-to-back calls, by events on a GPU, and return the mean of one."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - start) / calls
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        run()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1000 / calls
