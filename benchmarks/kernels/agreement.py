"""Every kernel against its torch reference in float64, on the device at hand, and against itself.

The tests compare more, at small sizes; this is for a GPU that is lent for minutes. Compiling takes
most of them, so the comparisons are shared out among as many processes as there are cores.
"""

import itertools
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from cavmae.benchmarks.kernels.timing import relative_difference
from cavmae.kernels import (
    Backend,
    contrastive_loss,
    gather_patches,
    gather_tokens,
    gelu_backward,
    layer_norm,
    layer_norm_backward,
    masked_reconstruction_loss,
    pack_rows,
    random_mask,
    restore_tokens,
)
from cavmae.kernels.backend import INTERPRETED

# Twice the spacing of values near 1, or more; of 16-bit inputs, the weights of the contrastive
# gradient are bf16.
LIMITS = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 1e-2}
NORM_EPSILON = 1e-5
_LOOK_EVERY_SECONDS = 0.5

Operation = Callable[[Backend], list[torch.Tensor]]


@dataclass(frozen=True)
class Sizes:
    """Attributes: batch; grid of patches; kept of them; width of tokens and embeddings; pairs of
    the contrastive loss; sound, which has one channel, time before frequency."""

    batch: int
    grid: tuple[int, int]
    kept: int
    width: int
    pairs: int
    sound: bool = False


SIZES = {
    "odd": Sizes(2, (3, 5), 4, 40, 21),
    "uneven": Sizes(3, (5, 7), 9, 100, 77),
    # The published base model, and the larger tiles in several row blocks, not a whole number.
    "sound": Sizes(16, (8, 64), 128, 768, 512, sound=True),
    "picture": Sizes(32, (14, 14), 49, 768, 5000),
}
SMALL = ("odd",)
"""For the interpreter, which takes seconds for each program."""


def comparisons(small: bool) -> list[str]:
    """Return the names of all comparisons: an operation at sizes, in all dtypes."""
    return [
        f"{operation} {name}"
        for name in (SMALL if small else SIZES)
        for operation in _operations(torch.device("meta"), SIZES[name], torch.float32)
    ]


def compared(device: torch.device, name: str) -> tuple[dict[str, float], list[str]]:
    """Compare outputs and gradients of a kernel with its reference.

    Args:
        device: where the kernel runs.
        name: one of `comparisons`.

    Returns:
        Largest difference over the largest reference value in each dtype; what is beyond its limit,
        or differs between two runs, as messages.
    """
    operation, _, sizes = name.rpartition(" ")
    # The interpreter takes seconds for each.
    limits = {torch.bfloat16: LIMITS[torch.bfloat16]} if INTERPRETED else LIMITS
    if operation.startswith("random_mask"):
        limits = {torch.float32: 0.0}  # whatever the dtype of the model, and exact
    found: dict[str, float] = {}
    beyond = []
    for dtype, limit in limits.items():
        torch.manual_seed(0)
        run = _operations(device, SIZES[sizes], dtype)[operation]
        label = f"{name} {str(dtype).removeprefix('torch.')}"
        first, second = run("triton"), run("triton")
        if not all(torch.equal(a, b) for a, b in zip(first, second, strict=True)):
            beyond.append(f"{label}: two runs differ")
        found[label] = max(
            relative_difference(ours, reference)
            for ours, reference in zip(first, run("torch"), strict=True)
        )
        if not found[label] <= limit:
            beyond.append(f"{label}: {found[label]:.2e} (limit {limit:.0e})")
    return found, beyond


def compared_in_parallel(
    device: torch.device, names: list[str]
) -> Iterator[tuple[dict[str, float], list[str]]]:
    """Yield what `compared` returns of all names together, as far as it is known, until it is.

    A process that dies costs the comparisons that it had not done, which are beyond their limits.
    """
    count = min(len(names), len(os.sched_getaffinity(0)))
    shares = [names[first::count] for first in range(count)]
    with TemporaryDirectory() as folder, ExitStack() as opened:
        logs = [Path(folder) / str(number) for number in range(count)]
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", __spec__.name, device.type, *share],
                stdout=opened.enter_context(log.open("w")),
            )
            for log, share in zip(logs, shares, strict=True)
        ]
        while any([process.poll() is None for process in processes]):
            time.sleep(_LOOK_EVERY_SECONDS)
            yield _together([_lines(log) for log in logs])
        dead = [
            f"{name}: not compared, its process ended with exit code {process.returncode}"
            for process, log, share in zip(processes, logs, shares, strict=True)
            for name in share[len(_lines(log)) :]
        ]
        found, beyond = _together([_lines(log) for log in logs])
        yield found, beyond + dead


def _lines(log: Path) -> list[str]:
    return [line for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]


def _together(lines: list[list[str]]) -> tuple[dict[str, float], list[str]]:
    found: dict[str, float] = {}
    beyond: list[str] = []
    for line in itertools.chain.from_iterable(lines):
        differences, messages = json.loads(line)
        found |= differences
        beyond += messages
    return found, beyond


def main(words: list[str]) -> None:
    """Compare some and print each as a line of JSON; words are a device and names."""
    for name in words[1:]:
        try:
            found = compared(torch.device(words[0]), name)
        except Exception as error:  # a kernel that fails costs no other one its comparison
            traceback.print_exc()
            found = {}, [f"{name}: {type(error).__name__}: {error}"]
        print(json.dumps(found), flush=True)


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


def _passes(run: Callable[..., list[torch.Tensor]], inputs: list[torch.Tensor]) -> Operation:
    """Of a kernel that is a backward pass itself."""

    def operation(backend: Backend) -> list[torch.Tensor]:
        return run(backend, *(one.double() if backend == "torch" else one for one in inputs))

    return operation


def _norm_gradients(
    backend: Backend, x: torch.Tensor, *tensors: torch.Tensor, lengths: list[int]
) -> list[torch.Tensor]:
    grad, residual, *affine = tensors
    weights, biases = affine[: len(lengths)], affine[len(lengths) :]
    _, mean, inverse_deviation = layer_norm(x, weights, biases, lengths, NORM_EPSILON)
    found = layer_norm_backward(
        x,
        mean,
        inverse_deviation,
        weights,
        biases,
        lengths,
        grad,
        residual,
        give_tokens=True,
        epsilon=NORM_EPSILON,
        backend=backend,
    )
    assert found.tokens is not None
    return [found.x, *found.weights, *found.biases, found.residual_sum, found.tokens]


def _gelu_gradients(backend: Backend, *tensors: torch.Tensor) -> list[torch.Tensor]:
    of_x, of_bias, activation = gelu_backward(*tensors, give_activation=True, backend=backend)
    assert activation is not None
    return [of_x, of_bias, activation]


def _operations(device: torch.device, sizes: Sizes, dtype: torch.dtype) -> dict[str, Operation]:
    batch, width, tokens = sizes.batch, sizes.width, sizes.grid[0] * sizes.grid[1]

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    ids = torch.rand(batch, tokens, device=device).argsort(1)
    kept, removed = ids[:, : sizes.kept], ids[:, sizes.kept :]
    height, length = (16 * side for side in sizes.grid)
    channels = 1 if sizes.sound else 3
    pixels = torch.randn(batch, channels, height, length, device=device)
    if sizes.sound:
        pixels = pixels.transpose(2, 3).contiguous().transpose(2, 3)
    grey = pixels.mul(64).add(128).clamp(0, 255).to(torch.uint8)
    mean, std = (torch.linspace(low, 99, channels, device=device) for low in (90, 50))
    temperature = torch.full((), 0.05, device=device, dtype=dtype)
    positions = torch.arange(batch, device=device)
    operations: dict[str, Operation] = {
        "gather_tokens": _with_gradients(
            lambda backend, x: gather_tokens(x, kept, backend=backend),
            [normal(batch, tokens, width)],
        ),
        "restore_tokens": _with_gradients(
            lambda backend, x, mask_token, position, modality: restore_tokens(
                x, ids, mask_token, position, modality, backend=backend
            ),
            [
                normal(batch, sizes.kept, width),
                *(normal(1, rows, width) for rows in (1, tokens, 1)),
            ],
        ),
        "masked_reconstruction_loss": _with_gradients(
            lambda backend, x: masked_reconstruction_loss(
                x, pixels, removed, True, backend=backend
            ),
            [normal(batch, tokens - sizes.kept, 256 * channels)],
        ),
        "gather_patches": lambda backend: [
            gather_patches(pixels, kept, dtype=dtype, backend=backend)
        ],
        "gather_patches of bytes": lambda backend: [
            gather_patches(grey, kept, mean=mean, std=std, dtype=dtype, backend=backend)
        ],
    }
    for segments in (1, 2):
        lengths = [tokens] if segments == 1 else [sizes.kept, tokens - sizes.kept]
        vectors = [normal(width) for _ in range(2 * segments)]
        operations[f"layer_norm_backward of {segments}"] = _passes(
            partial(_norm_gradients, lengths=lengths),
            [*(normal(batch, tokens, width) for _ in range(3)), *vectors],
        )
    operations["gelu_backward"] = _passes(
        _gelu_gradients, [normal(batch * tokens, 4 * width) for _ in range(2)]
    )
    operations["pack_rows"] = _passes(
        lambda backend, *parts: list(pack_rows(*parts, backend=backend)),
        [normal(batch, tokens, width) for _ in range(3)],
    )
    for way, bidirectional in (("both ways", True), ("one way", False)):
        operations[f"contrastive_loss {way}"] = _with_gradients(
            lambda backend, a, v, t, both=bidirectional: (
                contrastive_loss(a, v, t, both, backend=backend).loss
            ),
            [normal(sizes.pairs, width), normal(sizes.pairs, width), temperature],
        )
    for mode in ("unstructured", "time", "freq", "tf"):
        operations[f"random_mask {mode}"] = lambda backend, mode=mode: list(
            random_mask(
                positions,
                seed=0,
                stream="mask_audio",
                grid=sizes.grid,
                ratio=0.75,
                mode=mode,
                backend=backend,
            )
        )
    return operations


if __name__ == "__main__":
    main(sys.argv[1:])
