"""Every kernel against its torch reference in float64, on the device at hand, and against itself.

The tests compare more, at small sizes; this is for a GPU that is lent for minutes.
"""

from collections.abc import Callable

import torch

from cavmae.benchmarks.kernels.timing import relative_difference
from cavmae.kernels import (
    Backend,
    contrastive_loss,
    gather_patches,
    gather_tokens,
    masked_reconstruction_loss,
    random_mask,
    restore_tokens,
)

# Twice the spacing of values near 1, or more; weights of the contrastive gradient are bf16.
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}

Operation = Callable[[Backend], list[torch.Tensor]]


def disagreements(device: torch.device, batch: int) -> tuple[dict[str, float], list[str]]:
    """Compare outputs and gradients of every kernel with its reference.

    Args:
        device: where the kernels run.
        batch: samples of the masked operations; embeddings are eight times as many.

    Returns:
        Largest difference over the largest reference value of each operation and dtype; what is
        beyond its limit, or differs between two runs, as messages.
    """
    torch.manual_seed(0)
    found: dict[str, float] = {}
    beyond = []
    for dtype, limit in LIMITS.items():
        for name, operation in _operations(device, batch, dtype).items():
            label = f"{name} {str(dtype).removeprefix('torch.')}"
            first, second = operation("triton"), operation("triton")
            if not all(torch.equal(a, b) for a, b in zip(first, second, strict=True)):
                beyond.append(f"{label}: two runs differ")
            found[label] = max(
                relative_difference(ours, reference)
                for ours, reference in zip(first, operation("torch"), strict=True)
            )
            bound = 0.0 if name.startswith("random_mask") else limit
            if not found[label] <= bound:
                beyond.append(f"{label}: {found[label]:.2e} (limit {bound:.0e})")
    return found, beyond


def _with_gradients(run: Callable[..., torch.Tensor], leaves: list[torch.Tensor]) -> Operation:
    def operation(backend: Backend) -> list[torch.Tensor]:
        # The references are the truth here: float64, of the same rounded inputs.
        inputs = [leaf.double() if backend == "torch" else leaf for leaf in leaves]
        inputs = [leaf.detach().requires_grad_() for leaf in inputs]
        output = run(backend, *inputs)
        upstream = torch.arange(1, output.numel() + 1, device=output.device).sin()
        upstream = upstream.reshape(output.shape).to(leaves[0].dtype).to(output.dtype)
        return [output.detach(), *torch.autograd.grad(output, inputs, upstream)]

    return operation


def _operations(device: torch.device, batch: int, dtype: torch.dtype) -> dict[str, Operation]:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    def shuffle(tokens: int) -> torch.Tensor:
        return torch.rand(batch, tokens, device=device).argsort(1)

    ids, pixels = shuffle(24), torch.randn(batch, 3, 64, 96, device=device)
    kept, removed = ids[:, :6], ids[:, 6:]
    positions = torch.arange(batch, device=device)
    temperature = torch.full((), 0.05, device=device, dtype=dtype)
    operations: dict[str, Operation] = {
        "gather_tokens": _with_gradients(
            lambda backend, x: gather_tokens(x, kept, backend=backend), [normal(batch, 24, 192)]
        ),
        "restore_tokens": _with_gradients(
            lambda backend, x, mask_token, position, modality: restore_tokens(
                x, ids, mask_token, position, modality, backend=backend
            ),
            [normal(batch, 6, 192), normal(1, 1, 192), normal(1, 24, 192), normal(1, 1, 192)],
        ),
        "masked_reconstruction_loss": _with_gradients(
            lambda backend, x: masked_reconstruction_loss(
                x, pixels, removed, True, backend=backend
            ),
            [normal(batch, 18, 768)],
        ),
        "gather_patches": lambda backend: [
            gather_patches(pixels, kept, 16, dtype=dtype, backend=backend)
        ],
    }
    sizes = {"": (8 * batch, 192)}
    if device.type == "cuda":
        # The larger tiles, several row blocks, neither a whole number.
        sizes[" large"] = (5000, 768)
    for name, shape in sizes.items():
        operations[f"contrastive_loss{name}"] = _with_gradients(
            lambda backend, a, v, t: contrastive_loss(a, v, t, True, backend=backend).loss,
            [normal(*shape), normal(*shape), temperature],
        )
    for mode in ("unstructured", "tf"):
        operations[f"random_mask {mode}"] = lambda backend, mode=mode: list(
            random_mask(
                positions,
                seed=0,
                stream="mask_audio",
                grid=(4, 6),
                ratio=0.75,
                mode=mode,
                backend=backend,
            )
        )
    return operations
