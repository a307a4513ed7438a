"""Memory of a process (Linux) or of its GPU: now, and at its peak."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cavmae.trainer.cost_model.run_rates import status_bytes

_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
"""Written to that file, the peak begins anew from what is resident now (proc(5))."""


def resident_bytes() -> int:
    """Return the resident memory of this process."""
    return status_bytes("VmRSS")


def reset_peak() -> None:
    """Reset the peak of this process.

    Raises:
        OSError: the system does not allow it.
    """
    _CLEAR.write_text(_RESET_PEAK)


def gpu_peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Return the peak of tensors on a GPU during a call, beyond those that were there before."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def no_memory_left(error: RuntimeError) -> bool:
    """Return whether a GPU had no memory left, for torch's allocator or for a library's own."""
    failed = ("out of memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in failed)
