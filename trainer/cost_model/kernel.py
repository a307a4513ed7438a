"""A kernel of a step and its work, by the operation of torch that launches it."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch

ADAM_BYTES = 28
"""Of a weight: gradient, weight and two moments read, the last three written, in float32."""

Pass = Literal["forward", "backward", "update"]
Kind = Literal["product", "attention", "other"]

_FIRST_FACTOR = {"mm": 0, "addmm": 1, "bmm": 0, "baddbmm": 1}
_ATTENTION = ("block_attention", "scaled_dot_product")
_TAKES_ROWS = {"gather", "index", "index_select", "embedding"}
"""Of whose first argument as much is read as is written."""


@dataclass(frozen=True)
class Kernel:
    """Equal kernels.

    Attributes:
        during: the pass that launches them.
        part: the child of the model that they belong to, such as `blocks_a`; outside of all, the
            function of `kernels/`, or nothing.
        kind: a matrix product, attention, or anything else, which is bound by memory.
        name: operation of torch, function of `kernels/`, or `fused`.
        shape: of a product (batch, rows, columns, inner), of attention (batch, heads, queries,
            tokens, head width); empty for others.
        layout: of a product, for each factor `n`, or `t` where its columns lie side by side.
        flops: of one; attention's scores that are computed again are not counted.
        bytes: that one reads and writes.
        calls: how many there are.
    """

    during: Pass
    part: str
    kind: Kind
    name: str
    shape: tuple[int, ...]
    layout: str
    flops: int
    bytes: int
    calls: int = 1


def kernel(
    during: Pass,
    part: str,
    name: str,
    inputs: Iterable[torch.Tensor],
    outputs: Iterable[torch.Tensor],
) -> Kernel:
    """Return the kernel of one operation.

    Args:
        during, part, name: see `Kernel`.
        inputs, outputs: its tensors, in the order of its arguments and results.
    """
    inputs, outputs = list(inputs), list(outputs)
    written = sum(map(touched_bytes, outputs))
    read = [touched_bytes(one) for one in {id(one): one for one in inputs}.values()]
    if name in _TAKES_ROWS:
        read[0] = min(read[0], written)
    kind: Kind = "other"
    shape: tuple[int, ...] = ()
    layout, flops = "", 0
    if name in _FIRST_FACTOR:
        kind = "product"
        a, b = inputs[_FIRST_FACTOR[name] :][:2]
        shape = (math.prod(a.shape[:-2]), a.shape[-2], b.shape[-1], a.shape[-1])
        layout = "".join("n" if one.stride(-1) == 1 else "t" for one in (a, b))
        flops = 2 * math.prod(shape)
    elif any(word in name for word in _ATTENTION):
        kind = "attention"
        heads = [one for one in inputs if one.ndim == 4]  # (batch, heads, tokens, head width)
        query, key = heads[1:3] if "backward" in name else heads[:2]
        read = [touched_bytes(one) for one in heads]
        shape = (*query.shape[:3], *key.shape[2:])
        flops = (8 if "backward" in name else 4) * math.prod(shape)
    return Kernel(during, part, kind, name, shape, layout, flops, sum(read) + written)


def operation(function: Any) -> str:
    """Return the name of an operation of torch without namespace and overload."""
    return function.overloadpacket.__name__


def touched_bytes(tensor: torch.Tensor) -> int:
    """Return the bytes of a tensor in memory; an expanded dimension is there once."""
    sides = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.element_size() * math.prod(size for size, stride in sides if stride)
