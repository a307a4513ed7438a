"""Compiles every kernel for GPUs that need not be there, at the shapes of the published base model.

Run as a program of its own, because kernels that the interpreter runs can't be compiled. The
operations are called with tensors without storage, and what they launch is compiled instead.
Prints, as JSON, what each compiled kernel takes of a multiprocessor, by architecture and kernel.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from cavmae.kernels import (
    backend,
    contrastive_loss,
    gather_patches,
    gather_tokens,
    gelu_backward,
    layer_norm_backward,
    masked_reconstruction_loss,
    pack_rows,
    random_mask,
    restore_tokens,
)
from cavmae.kernels.similarity import tiles

ARCHITECTURES = (80, 90, 100)
BATCH = 512


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16, grad: bool = False) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)


def ids(count: int) -> torch.Tensor:
    return tensor(BATCH, count, dtype=torch.int64)


def masks() -> None:
    positions = tensor(BATCH, dtype=torch.int64)
    for mode in ("unstructured", "tf"):
        random_mask(
            positions,
            seed=0,
            stream="mask_audio",
            grid=(8, 64),
            ratio=0.75,
            mode=mode,
            backend="triton",
        )


def tokens() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        x = tensor(BATCH, 708, 512, dtype=dtype, grad=True)
        gather_tokens(x, ids(531), backend="triton").sum().backward()
        x = tensor(BATCH, 177, 512, dtype=dtype, grad=True)
        tables = [tensor(1, length, 512, dtype=dtype, grad=True) for length in (1, 708, 708)]
        restore_tokens(x, ids(708), *tables, backend="triton").sum().backward()


def patches() -> None:
    for dtype in (torch.float32, torch.uint8):
        image = tensor(BATCH, 3, 224, 224, dtype=dtype)
        statistic = tensor(3, dtype=torch.float32)
        gather_patches(
            image, ids(49), mean=statistic, std=statistic, dtype=torch.bfloat16,
            backend="triton",
        )  # fmt: skip
    spectrogram = tensor(BATCH, 1024, 128, dtype=torch.float32).transpose(1, 2)[:, None]
    gather_patches(spectrogram, ids(128), dtype=torch.bfloat16, backend="triton")


def reconstruction() -> None:
    spectrogram = tensor(BATCH, 1024, 128, dtype=torch.float32).transpose(1, 2)[:, None]
    image = tensor(BATCH, 3, 224, 224, dtype=torch.float32)
    for pixels, removed in ((spectrogram, 384), (image, 147)):
        predicted = tensor(BATCH, removed, 256 * pixels.shape[1], grad=True)
        masked_reconstruction_loss(
            predicted, pixels, ids(removed), norm_pix=True, backend="triton"
        ).backward()


def branches() -> None:
    """Of the decoder and of the encoders, which keep what they could compute again or do not."""
    for width, dtype in ((512, torch.bfloat16), (768, torch.bfloat16), (768, torch.float32)):
        x = tensor(BATCH, 128, width, dtype=dtype)
        statistics = [tensor(BATCH, 128, 1, dtype=torch.float32) for _ in range(2)]
        affine = [tensor(width, dtype=dtype)]
        pack_rows(x, x, x, backend="triton")
        for again in (True, False):
            gelu_backward(x.flatten(0, 1), x.flatten(0, 1), give_activation=again, backend="triton")
            layer_norm_backward(
                x,
                statistics[0],
                statistics[1],
                affine,
                affine,
                [128],
                x,
                x,
                give_tokens=again,
                epsilon=1e-5,
                backend="triton",
            )


def contrast() -> None:
    """The model's width and one that no block divides; small and large tiles; both losses."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    for batch, width, dtype, bidirectional in (
        (512, 768, bf16, True),
        (32768, 768, bf16, True),
        (32768, 768, bf16, False),
        (32768, 1000, bf16, True),
        (32768, 1000, fp16, False),
        (512, 768, fp32, True),
        (512, 768, fp32, False),
        (512, 1000, fp32, True),
        (512, 1000, fp32, False),
    ):
        audio, video = (tensor(batch, width, dtype=dtype, grad=True) for _ in range(2))
        temperature = tensor(dtype=torch.float32, grad=True)
        contrastive_loss(audio, video, temperature, bidirectional, backend="triton").loss.backward()


def ones() -> None:
    """Sizes of 1, which Triton turns into constants: another program."""
    one = tensor(1, 1, dtype=torch.int64)
    options = {"seed": 0, "stream": "mask_audio", "grid": (1, 1), "ratio": 0.0, "mode": "tf"}
    random_mask(one[0], **options, backend="triton")
    x = tensor(1, 1, 1, grad=True)
    gather_tokens(x, one, backend="triton").sum().backward()
    restore_tokens(x, one, x, x, x, backend="triton").sum().backward()
    pixels = tensor(1, 1, 16, 16)
    gather_patches(pixels, one, backend="triton")
    predicted = tensor(1, 1, 256, grad=True)
    masked_reconstruction_loss(predicted, pixels, one, True, backend="triton").backward()
    audio, video = (tensor(1, 1, grad=True) for _ in range(2))
    contrastive_loss(audio, video, 0.05, True, backend="triton").loss.backward()


def launches(operation: Callable[[], None]) -> dict[str, ASTSource]:
    """What an operation launches, by kernel and dtypes."""
    found: dict[str, ASTSource] = {}
    options: dict[str, dict[str, Any]] = {}

    def record(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        values = dict(zip(kernel.arg_names, arguments, strict=False)) | keywords
        signature, constants, attributes = {}, {}, {}
        for place, parameter in enumerate(kernel.params):
            value = values.pop(parameter.name)
            if parameter.is_constexpr or (isinstance(value, int) and value == 1):
                signature[parameter.name] = "constexpr"
                constants[(place,)] = value
            else:
                signature[parameter.name] = _type(value)
                # What Triton itself looks at when it launches.
                if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
                    attributes[(place,)] = [["tt.divisibility", 16]]
        dtypes = {v.removeprefix("*") for v in signature.values() if v.startswith("*")}
        sizes = "x".join(str(v) for v in constants.values())
        name = f"{kernel.__name__}[{','.join(sorted(dtypes))};{sizes}]"
        found[name] = ASTSource(kernel, signature, constants, attributes)
        options[name] = values

    original, JITFunction.run = JITFunction.run, record  # pyright: ignore[reportAttributeAccessIssue]
    try:
        operation()
    finally:
        JITFunction.run = original
    for name, source in found.items():
        source.launch_options = options[name]  # pyright: ignore[reportAttributeAccessIssue]
    return found


def _type(value: Any) -> str:
    names = {
        torch.float32: "fp32",
        torch.bfloat16: "bf16",
        torch.float16: "fp16",
        torch.int64: "i64",
        torch.uint8: "u8",
    }
    if isinstance(value, torch.Tensor):
        return "*" + names[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def resources(source: ASTSource, architecture: int) -> dict[str, Any]:
    """Registers, spilled bytes, shared memory and matrix instructions of a compiled kernel."""
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", architecture, 32),
        options=source.launch_options,  # pyright: ignore[reportAttributeAccessIssue]
    )
    ptx = compiled.asm["ptx"]
    target = re.search(r"\.target (sm_\w+)", ptx)
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        done = subprocess.run(
            [
                get_ptxas(architecture).path,
                "-v",
                f"-arch={target[1]}",
                path,
                "-o",
                Path(folder) / "kernel.cubin",
            ],
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    registers = re.search(r"Used (\d+) registers", done.stderr)
    spills = re.findall(r"(\d+) bytes spill", done.stderr)
    assert registers is not None and spills
    return {
        "registers": int(registers[1]),
        "spilled_bytes": sum(map(int, spills)),
        "shared_bytes": compiled.metadata.shared,
        "wide_accesses": len(re.findall(r"(?:ld|st)\.global\S*\.v[248]\.", ptx)),
        "accesses": len(re.findall(r"(?:ld|st)\.global", ptx)),
        "wgmma": "wgmma.mma_async" in ptx,
        "warps": compiled.metadata.num_warps,
    }


def main() -> None:
    backend.INTERPRETED = True  # lets tensors without a GPU through; nothing is interpreted
    results: dict[str, dict[str, Any]] = {}
    for architecture in ARCHITECTURES:
        found: dict[str, ASTSource] = {}
        tiles.major_capability = lambda _, major=architecture // 10: major
        for operation in (masks, tokens, patches, reconstruction, branches, contrast):
            found |= launches(operation)
        if architecture == 90:
            found |= launches(ones)
        results[str(architecture)] = {
            name: resources(source, architecture) for name, source in found.items()
        }
    json.dump(results, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
