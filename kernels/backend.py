"""Which implementation of an operation runs, and the checks that all of them share.

`backend=None` means Triton for CUDA tensors and the torch reference for CPU ones. Nothing else is
chosen silently: an explicit choice that can't be met is an error.
"""

from typing import Any, Literal

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensor
from triton import knobs

Backend = Literal["torch", "triton"]

jit: Any = triton.jit
"""Without a type, because the launch `kernel[grid](...)` has none that checkers know."""
INTERPRETED: bool = knobs.runtime.interpret
"""Triton's interpreter runs the kernels on CPU tensors (TRITON_INTERPRET=1 at import)."""
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that the kernels compute with; they accumulate in float32."""


def default_backend(device: torch.device) -> Backend:
    """Return the backend that `backend=None` means for tensors on `device`."""
    return "triton" if device.type == "cuda" else "torch"


def choose_backend(backend: Backend | None, **tensors: torch.Tensor) -> Backend:
    """Return the implementation for these arguments.

    Args:
        backend: the caller's choice.
        tensors: the tensor arguments by name.

    Raises:
        ValueError: tensors on different devices, an unknown name, Triton for CPU tensors or for a
            GPU that is not the current one.
    """
    (first, reference), *others = tensors.items()
    for name, tensor in others:
        if tensor.device != reference.device:
            raise ValueError(
                f"{name} is on {tensor.device} and {first} on {reference.device}; "
                f"move {name} to {reference.device}"
            )
    if backend is None:
        backend = default_backend(reference.device)
    if backend not in ("torch", "triton"):
        raise ValueError(f"backend is {backend!r}; use 'torch', 'triton' or None")
    if backend == "triton" and reference.device.type == "cuda":
        _check_current(first, reference.device)
    if backend == "triton" and reference.device.type != "cuda" and not INTERPRETED:
        raise ValueError(
            f"backend is 'triton' and {first} is on {reference.device}; move it to a GPU, or set "
            "TRITON_INTERPRET=1 before cavmae.kernels is imported"
        )
    return backend


def _check_current(name: str, device: torch.device) -> None:
    """Triton launches on the current device, whatever device its arguments are on."""
    current = torch.cuda.current_device()
    if device.index != current:
        raise ValueError(
            f"{name} is on {device} and the current device is cuda:{current}; call "
            f"torch.cuda.set_device({device.index}), or use `with torch.cuda.device(...)`"
        )


def check_floats(**tensors: torch.Tensor) -> None:
    """Refuse dtypes that the kernels do not support.

    Raises:
        ValueError: names the argument, its dtype and those that work.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise ValueError(
                f"{name} is {tensor.dtype}; the Triton kernels take float32, bfloat16 and float16 "
                "(backend='torch' takes float64 as well)"
            )


def has_values(tensor: torch.Tensor) -> bool:
    """Return whether a check may read the values of a tensor.

    On a GPU that would stop the stream. While a graph is compiled or exported, or memory is counted
    on fake tensors, there are none.
    """
    on_cpu = tensor.device.type == "cpu" and tensor.numel() > 0
    return on_cpu and not isinstance(tensor, FakeTensor) and not torch.compiler.is_compiling()


def check_ids(name: str, ids: torch.Tensor, batch: int, limit: int) -> None:
    """Refuse ids that can't be ids of `limit` patches.

    Values are looked at where `has_values` finds some. On a GPU the kernels give NaN for an id out
    of range, which no update gets past.

    Raises:
        ValueError: names the argument and what is wrong with it.
    """
    if ids.ndim != 2 or ids.shape[0] != batch:
        raise ValueError(f"{name} has shape {tuple(ids.shape)}; it has to be ({batch}, count)")
    if ids.dtype != torch.int64:
        raise ValueError(f"{name} is {ids.dtype}; it has to be int64")
    if has_values(ids):
        low, high = (int(value) for value in ids.aminmax())
        if low < 0 or high >= limit:
            raise ValueError(
                f"{name} holds {low if low < 0 else high}; ids go from 0 to {limit - 1}"
            )
