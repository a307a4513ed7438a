"""A kernel against the truth in float64 and against torch at the same dtype.

A kernel may be as far from the truth as torch is at the same dtype, plus a stated tolerance: the
rounding of its result, or of what it stores on the way.
"""

from collections.abc import Callable, Sequence

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
"""Twice the spacing of values near 1, or more."""

Operation = Callable[..., torch.Tensor]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    """Standard normal float64 numbers on the device of the tests."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE)


def shuffles(batch: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """(batch, tokens) int64, a permutation in each row."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(tokens, generator=generator) for _ in range(batch)]
    return torch.stack(rows).to(DEVICE)


def results(
    operation: Operation, backend: str, inputs: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Output of `operation(backend, *inputs)` and its gradients for a fixed upstream gradient."""
    leaves = [
        x.detach().as_strided(x.shape, x.stride()).requires_grad_() if x.is_floating_point() else x
        for x in inputs
    ]
    output = operation(backend, *leaves)
    wanted = [x for x in leaves if x.requires_grad]
    gradients = torch.autograd.grad(output, wanted, upstream_of(output))
    return [output.detach(), *gradients]


def upstream_of(output: torch.Tensor) -> torch.Tensor:
    """A gradient for `output` that is neither 0 nor the same everywhere."""
    count = torch.arange(1, output.numel() + 1, device=output.device)
    return count.sin().reshape(output.shape).to(output.dtype)


def error(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest difference over the largest true value."""
    assert found.shape == truth.shape
    scale = max(float(truth.abs().max()), 1e-30)
    return float((found.double() - truth).abs().max()) / scale


def check_three_way(
    operation: Operation,
    inputs: Sequence[torch.Tensor],
    dtype: torch.dtype,
    tolerance: float | None = None,
) -> None:
    """Compare output and every gradient; `operation(backend, *inputs)` is called three times.

    Args:
        operation: the op with everything but backend and tensors filled in.
        inputs: float64 tensors, cast to `dtype` here, and ids.
        dtype: of kernel and torch.
        tolerance: relative to the largest true value; None: the rounding of `dtype`.
    """
    tolerance = ROUNDING[dtype] if tolerance is None else tolerance
    cast = [_cast(x, dtype) if x.dtype == torch.float64 else x for x in inputs]
    exact = [_cast(x, torch.float64) if x.is_floating_point() else x for x in cast]
    truths = results(operation, "torch", exact)
    plain = results(operation, "torch", cast)
    kernel = results(operation, "triton", cast)
    for place, (truth, by_torch, by_kernel) in enumerate(zip(truths, plain, kernel, strict=True)):
        name = "output" if place == 0 else f"gradient {place}"
        assert by_kernel.dtype == by_torch.dtype, name
        bound = error(by_torch, truth) + tolerance
        assert error(by_kernel, truth) <= bound, (name, error(by_kernel, truth), bound)


def _cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The same strides in another dtype; `Tensor.to` would make an expanded one dense."""
    once = x[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in x.stride())]
    storage = torch.empty_strided(once.shape, x.stride(), dtype=dtype, device=x.device)
    cast = storage.copy_(once).expand(x.shape)
    assert cast.stride() == x.stride()
    return cast


def check_repeats(operation: Operation, inputs: Sequence[torch.Tensor]) -> None:
    """Two runs of the kernel give the same bits, forward and backward."""
    first, second = (results(operation, "triton", inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
