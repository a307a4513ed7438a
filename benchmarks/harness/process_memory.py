"""Memory of a process, or of the GPU in its hands: now, and at its most (Linux)."""

from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
"""To that file: the peak begins anew from what is resident now (proc(5))."""


def resident_bytes() -> int:
    """In memory now."""
    return _status("VmRSS")


def reset_peak() -> None:
    """The peak of this process begins anew.

    Raises:
        OSError: the system does not let it.
    """
    _CLEAR.write_text(_RESET_PEAK)


def peak_bytes(device: torch.device) -> int:
    """At most: of tensors on a GPU; on a CPU of the process, with its program and libraries."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM")


def _status(name: str) -> int:
    line = next(one for one in _STATUS.read_text().splitlines() if one.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])
