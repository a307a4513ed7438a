"""What a machine reaches in the kernels of one of our steps, measured: the input of a prediction.

Products, attention and the operations that move most bytes are timed one by one, at a few of the
step's own shapes. How often each is called, and in which shapes, is counted, not measured.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import cycle
from typing import Any

import torch

from cavmae.benchmarks.harness.machine_peaks import DTYPES
from cavmae.benchmarks.harness.timing import ceilings, median_seconds
from cavmae.benchmarks.step.training_step import StepSetting
from cavmae.kernels import attention
from cavmae.trainer.config.configs import EngineConfig, PretrainConfig
from cavmae.trainer.config.recipes import audioset_base
from cavmae.trainer.cost_model.kernel import ADAM_BYTES, Kernel
from cavmae.trainer.cost_model.kernel_time import Ceilings, Range
from cavmae.trainer.cost_model.step_work import micro_batch_work

_SHAPES, _REPEATS = 4, 5
"""Measured for each layout of a product, and times each is timed."""
_CALLS = 200
_CACHE_BYTES = 1 << 28
"""More than any cache of a CPU or a GPU holds."""
_ADAM_ELEMENTS = 1 << 26


def step_config(setting: StepSetting) -> PretrainConfig:
    """Return the run whose micro-batch is our step."""
    return replace(
        audioset_base(),
        model=setting.config,
        global_batch=setting.batch,
        micro_batch=setting.batch,
        lanes=1,
        engine=EngineConfig(
            dtype=setting.precision,
            compile=setting.choices.compile,
            activation_checkpointing=setting.choices.recompute,
        ),
    )


def measure_ceilings(setting: StepSetting) -> dict[str, Any]:
    """Measure a machine for `recorded_ceilings`.

    Args:
        setting: whose kernels are measured, at its batch.

    Returns:
        `flops_per_second` and `bytes_per_second` of a large product and copy; `layouts`: operations
        a second of the step's products by layout, over their operations; `attention`: by pass;
        `operations`: bytes a second; `call_seconds` of an operation that does next to nothing.
    """
    device, dtype = setting.device, DTYPES[setting.precision]
    work = micro_batch_work(step_config(setting), gpu=device.type == "cuda")
    largest = ceilings(device, dtype)
    products = [one for one in work if one.kind == "product" and one.shape[0] == 1]
    layouts = {
        layout: _rate([one for one in products if one.layout == layout], dtype, device)
        for layout in sorted({one.layout for one in products})
    }
    small = torch.zeros(1, device=device)
    calls = median_seconds(lambda: [small + small for _ in range(_CALLS)], device, _REPEATS)
    return {
        "flops_per_second": largest["flops_per_second"],
        "bytes_per_second": largest["bytes_per_second"],
        "layouts": {name: {"flops_per_second": rate} for name, rate in layouts.items()},
        "attention": _attention(work, dtype, device),
        "operations": _operations(work, dtype, device)
        | {"adam": _adam_rate(setting.config.width, device)},
        "call_seconds": calls / _CALLS,
    }


def median_ceilings(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Take the median of each number of several measurements of the same setting."""
    return {
        name: median_ceilings([one[name] for one in found])
        if isinstance(value, dict)
        else statistics.median(one[name] for one in found)
        for name, value in found[0].items()
    }


def recorded_ceilings(found: dict[str, Any], name: str) -> Ceilings:
    """Return what `measure_ceilings` found."""

    def rates(part: str, unit: str) -> dict[str, Range]:
        return {key: _exactly(one[unit]) for key, one in found[part].items()}

    return Ceilings(
        name=name,
        source="measured beside the step",
        flops_per_second=_exactly(found["flops_per_second"]),
        bytes_per_second=_exactly(found["bytes_per_second"]),
        attention=rates("attention", "flops_per_second"),
        gap_seconds=_exactly(found["call_seconds"]),
        layouts=rates("layouts", "flops_per_second"),
        operations=rates("operations", "bytes_per_second"),
    )


def _exactly(value: float) -> Range:
    return Range(value, value)


def _most(work: Iterable[Kernel], count: int) -> list[Kernel]:
    """Return the shapes with most operations, or bytes where there are none."""
    totals: dict[tuple[int, ...], tuple[int, Kernel]] = {}
    for one in work:
        before = totals.get(one.shape, (0, one))[0]
        totals[one.shape] = (before + one.calls * (one.flops or one.bytes), one)
    ordered = sorted(totals.values(), key=lambda found: found[0], reverse=True)
    return [one for _, one in ordered[:count]]


def _rate(products: list[Kernel], dtype: torch.dtype, device: torch.device) -> float:
    """Return the operations a second of the shapes of a layout that have most of them.

    Each product has other factors than the one before, as in a step: one with the same weights
    would find them in the cache.
    """

    def factor(rows: int, columns: int, order: str) -> torch.Tensor:
        if order == "n":
            return torch.randn(rows, columns, device=device, dtype=dtype)
        return torch.randn(columns, rows, device=device, dtype=dtype).t()

    flops = seconds = 0.0
    for one in _most(products, _SHAPES):
        _, rows, columns, inner = one.shape
        bytes_each = (rows + columns) * inner * dtype.itemsize
        factors = [
            (factor(rows, inner, one.layout[0]), factor(inner, columns, one.layout[1]))
            for _ in range(math.ceil(_CACHE_BYTES / bytes_each))
        ]
        flops += one.flops
        seconds += median_seconds(partial(_product, cycle(factors)), device, _REPEATS)
    return flops / seconds


def _product(factors: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> None:
    a, b = next(factors)
    torch.matmul(a, b)


def _attention(
    work: list[Kernel], dtype: torch.dtype, device: torch.device
) -> dict[str, dict[str, float]]:
    """Return the operations a second of attention by pass, at the shape that has most of them."""
    (one,) = _most((one for one in work if one.kind == "attention"), 1)
    batch, heads, queries, tokens, head_width = one.shape
    query, key, value = (
        torch.randn(batch, length, heads, head_width, device=device, dtype=dtype)
        .transpose(1, 2)
        .requires_grad_()
        for length in (queries, tokens, tokens)
    )
    out = attention(query, key, value)
    gradient = torch.randn_like(out)
    runs: dict[str, Callable[[], Any]] = {
        "forward": lambda: attention(query, key, value),
        "backward": lambda: torch.autograd.grad(
            out, (query, key, value), gradient, retain_graph=True
        ),
    }
    products = {"forward": 2, "backward": 4}
    return {
        name: {
            "flops_per_second": products[name]
            * 2
            * math.prod(one.shape)
            / median_seconds(run, device, _REPEATS)
        }
        for name, run in runs.items()
    }


def _operations(
    work: list[Kernel], dtype: torch.dtype, device: torch.device
) -> dict[str, dict[str, float]]:
    """Return the bytes a second of operations, each as large as the largest one of its name."""
    width = 512
    largest = {
        name: max((one.bytes for one in work if one.name == name), default=0) for name in _PASSES
    }
    found = {}
    for name, moved in largest.items():
        rows = moved // (_PASSES[name] * width * dtype.itemsize)
        if rows:
            x, gradient = (torch.randn(rows, width, device=device, dtype=dtype) for _ in range(2))
            run = _run(name, x, gradient)
            seconds = median_seconds(run, device, _REPEATS)
            found[name] = {"bytes_per_second": _PASSES[name] * x.nbytes / seconds}
    return found


def _adam_rate(width: int, device: torch.device) -> dict[str, float]:
    """Return the bytes a second of an update in one pass over weights and moments, of weights as
    large as those of an MLP, which are most of a model's."""
    size = 4 * width * width
    weights = [
        torch.nn.Parameter(torch.randn(size, device=device))
        for _ in range(math.ceil(_ADAM_ELEMENTS / size))
    ]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    adam = torch.optim.Adam(weights, fused=True)
    seconds = median_seconds(adam.step, device, 3 * _REPEATS)
    return {"bytes_per_second": ADAM_BYTES * size * len(weights) / seconds}


_PASSES = {
    "add": 3,
    "clone": 2,
    "gelu": 2,
    "gelu_backward": 3,
    "native_layer_norm": 2,
    "native_layer_norm_backward": 3,
    "stack": 2,
    "sum": 1,
}
"""Operations that move most of a step's bytes outside products, and how many tensors of the size of
their input each of them reads and writes."""


def _run(name: str, x: torch.Tensor, gradient: torch.Tensor) -> Callable[[], Any]:
    """Return a call of one of `_PASSES`."""
    aten = torch.ops.aten
    weight, bias = torch.ones_like(x[0]), torch.zeros_like(x[0])
    norm = (x, x.shape[-1:], weight, bias, 1e-6)
    _, mean, scale = aten.native_layer_norm(*norm)
    thirds = x[: len(x) // 3 * 3].chunk(3)
    calls: dict[str, Callable[[], Any]] = {
        "add": lambda: x + gradient,
        "clone": lambda: x.clone(),
        "gelu": lambda: aten.gelu(x),
        "gelu_backward": lambda: aten.gelu_backward(gradient, x),
        "native_layer_norm": lambda: aten.native_layer_norm(*norm),
        "native_layer_norm_backward": lambda: aten.native_layer_norm_backward(
            gradient, x, x.shape[-1:], mean, scale, weight, bias, [True, True, True]
        ),
        "stack": lambda: torch.stack(thirds, 1),
        "sum": lambda: x.sum(0),
    }
    return calls[name]
