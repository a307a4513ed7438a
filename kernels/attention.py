"""Softmax attention without a stored attention matrix, by the fastest way of each device.

- `blocks`: on a CPU. The scores of a few heads at a time fill one buffer that stays in the cache,
  and are computed again in the backward pass. torch's fused attention for CPUs multiplies bf16
  slowly there.
- `sdpa`: torch's fused attention, one call for each segment of a packed sequence; `sdpa-flash`,
  `sdpa-cudnn` and `sdpa-efficient` are its kernels one by one, on a GPU.
- `flash-attn`: that package, one call for all segments; bf16 and fp16 on a GPU.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import register_flop_formula

AttentionBackend = Literal[
    "blocks", "sdpa", "sdpa-flash", "sdpa-cudnn", "sdpa-efficient", "flash-attn"
]
_SDPA_KERNELS = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
}

BLOCK_BYTES = 4 << 20
"""Scores of a CPU's block: with their gradients they fit a second-level cache, or nearly so."""
_private: Any = torch
"""For the operations behind softmax and its gradient, which write where they read."""
FLASH_ATTN_IS_INSTALLED = find_spec("flash_attn") is not None


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: Sequence[int] | None = None,
    *,
    backend: AttentionBackend | None = None,
) -> torch.Tensor:
    """`softmax(query @ key^T / sqrt(head width)) @ value`, within each segment.

    Args:
        query: (batch, heads, queries, head width) float, any strides.
        key, value: (batch, heads, tokens, head width).
        lengths: tokens of each segment of a packed sequence, in order; queries and tokens are the
            same ones then. None: all tokens are one segment.
        backend: see above; None: `blocks` on a CPU, on a GPU `flash-attn` for several segments of
            bf16 or fp16 where it is installed, else `sdpa`. A graph that is exported has `sdpa`.

    Returns:
        (batch, heads, queries, head width), dtype of `query`.

    Raises:
        ValueError: shapes that don't fit, or a backend that can't take these tensors.
    """
    lengths = list(lengths or [key.shape[2]])
    _check(query, key, value, lengths)
    chosen = backend or _default(query, lengths)
    if chosen == "flash-attn":
        _check_flash_attn(query)
        return _flash_attn(query, key, value, lengths)
    if chosen not in get_args(AttentionBackend):
        raise ValueError(f"backend is {chosen!r}; use {', '.join(get_args(AttentionBackend))}")
    if chosen == "blocks" and query.device.type != "cpu":
        raise ValueError(f"backend is 'blocks' and query is on {query.device}; it is a CPU's way")
    if chosen in _SDPA_KERNELS and query.device.type == "cpu":
        raise ValueError(
            f"backend is {chosen!r} and query is on cpu; it is a GPU's way: use 'sdpa'"
        )
    if chosen in _SDPA_KERNELS:
        with sdpa_kernel(_SDPA_KERNELS[chosen]):
            return _by_segment(F.scaled_dot_product_attention, query, key, value, lengths)
    attend = F.scaled_dot_product_attention if chosen == "sdpa" else _block_attention
    return _by_segment(attend, query, key, value, lengths)


def _by_segment(
    attend: Callable[..., torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: list[int],
) -> torch.Tensor:
    if len(lengths) == 1:
        return attend(query, key, value)
    segments = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    return torch.cat([attend(*segment) for segment in segments], dim=2)


def _check(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int]) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.ndim != 4 or tensor.device != query.device or tensor.dtype != query.dtype:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device} of shape {tuple(tensor.shape)}; "
                "query, key and value have to be (batch, heads, tokens, head width), of one dtype "
                "and device"
            )
    batch, heads, queries, head_width = query.shape
    tokens = key.shape[2]
    expected = (batch, heads, tokens, head_width)
    if key.shape != expected or value.shape != expected:
        raise ValueError(
            f"key has shape {tuple(key.shape)} and value {tuple(value.shape)}; for a query of "
            f"shape {tuple(query.shape)} both have to be {expected}"
        )
    if sum(lengths) != tokens or (len(lengths) > 1 and queries != tokens):
        raise ValueError(
            f"lengths {lengths} add up to {sum(lengths)}, for {queries} queries and {tokens} "
            "tokens; they have to add up to the tokens, and several segments need as many queries"
        )


def _default(query: torch.Tensor, lengths: list[int]) -> AttentionBackend:
    if torch.compiler.is_exporting():
        return "sdpa"
    if query.device.type == "cpu":
        return "blocks"
    half = query.dtype in (torch.bfloat16, torch.float16)
    return "flash-attn" if len(lengths) > 1 and half and FLASH_ATTN_IS_INSTALLED else "sdpa"


def _check_flash_attn(query: torch.Tensor) -> None:
    if not FLASH_ATTN_IS_INSTALLED:
        raise ValueError(
            "backend is 'flash-attn', which is not installed; docs/start/install.md says how, or "
            "use 'sdpa'"
        )
    if query.device.type != "cuda" or query.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"backend is 'flash-attn' and query is {query.dtype} on {query.device}; it takes "
            "bfloat16 and float16 on a GPU: use 'sdpa'"
        )


def _flash_attn(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int]
) -> torch.Tensor:
    from flash_attn import (  # pyright: ignore[reportMissingImports]
        flash_attn_func,
        flash_attn_varlen_func,
    )

    q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # (batch, tokens, heads, head width)
    if len(lengths) == 1:
        return flash_attn_func(q, k, v).transpose(1, 2)
    ends = segment_ends(query.shape[0], tuple(lengths), query.device)
    longest = max(lengths)
    packed = (x.flatten(0, 1) for x in (q, k, v))  # (batch * tokens, heads, head width)
    mixed = flash_attn_varlen_func(*packed, ends, ends, longest, longest)
    return mixed.unflatten(0, q.shape[:2]).transpose(1, 2)


@torch.compiler.assume_constant_result
def segment_ends(batch: int, lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Return the bounds of each segment of each sample in the concatenated tokens of a batch:
    (batch * segments + 1,) int32, from 0 on. A run has few shapes, and each is copied to the device
    once."""
    return _segment_ends(batch, lengths, device)


@lru_cache(maxsize=16)
def _segment_ends(batch: int, lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    every = torch.tensor([0, *lengths * batch], dtype=torch.int32)
    return every.cumsum(0, dtype=torch.int32).to(device)


# An operator of its own, so that torch.compile sees one call and not the loop in it.
@torch.library.custom_op("cavmae::block_attention", mutates_args=())
def _block_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    out = torch.empty(query.shape, dtype=query.dtype)
    q, k, v = (x.flatten(0, 1) for x in (query, key, value))  # (batch * heads, tokens, head width)
    flat = out.flatten(0, 1)
    (buffer,) = _buffers(q, k, 1)
    for part in _parts(len(q), len(buffer)):
        weights = _weights(q[part], k[part], buffer)
        torch.bmm(weights, v[part], out=flat[part])
    return out


@torch.library.custom_op("cavmae::block_attention_backward", mutates_args=())
def _block_attention_backward(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    gradients = [torch.empty(x.shape, dtype=x.dtype) for x in (query, key, value)]
    g, q, k, v = (x.flatten(0, 1) for x in (grad, query, key, value))
    grad_q, grad_k, grad_v = (x.flatten(0, 1) for x in gradients)
    scale = q.shape[2] ** -0.5
    buffer, other = _buffers(q, k, 2)
    for part in _parts(len(q), len(buffer)):
        weights = _weights(q[part], k[part], buffer)
        torch.bmm(weights.transpose(1, 2), g[part], out=grad_v[part])
        slope = torch.bmm(g[part], v[part].transpose(1, 2), out=other[: len(weights)])
        _private._softmax_backward_data(slope, weights, -1, slope.dtype, grad_input=slope)
        _scaled_product(slope, k[part], scale, grad_q[part])
        _scaled_product(slope.transpose(1, 2), q[part], scale, grad_k[part])
    return gradients[0], gradients[1], gradients[2]


def _buffers(query: torch.Tensor, key: torch.Tensor, count: int) -> list[torch.Tensor]:
    """(heads of a block, queries, tokens) each."""
    pairs, queries = query.shape[:2]
    tokens = key.shape[1]
    fitting = BLOCK_BYTES // max(1, queries * tokens * query.element_size())
    block = min(pairs, max(1, fitting))
    return [query.new_empty(block, queries, tokens) for _ in range(count)]


def _parts(pairs: int, block: int) -> list[slice]:
    return [slice(first, min(first + block, pairs)) for first in range(0, pairs, max(1, block))]


def _weights(query: torch.Tensor, key: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    """The attention matrices of a block, in the buffer."""
    weights = buffer[: len(query)]
    _scaled_product(query, key.transpose(1, 2), query.shape[2] ** -0.5, weights)
    return _private._softmax(weights, -1, False, out=weights)


def _scaled_product(a: torch.Tensor, b: torch.Tensor, scale: float, out: torch.Tensor) -> None:
    torch.baddbmm(out, a, b, beta=0, alpha=scale, out=out)


@_block_attention.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return query.new_empty(query.shape)


@_block_attention_backward.register_fake
def _(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _save(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return _block_attention_backward(grad, *ctx.saved_tensors)


_block_attention.register_autograd(_gradients, setup_context=_save)


@register_flop_formula(torch.ops.cavmae.block_attention)
def _forward_operations(query_shape: Any, key_shape: Any, *others: Any, **options: Any) -> int:
    """Count the two products."""
    batch, heads, queries, head_width = query_shape
    return 4 * batch * heads * queries * key_shape[2] * head_width


@register_flop_formula(torch.ops.cavmae.block_attention_backward)
def _backward_operations(
    grad_shape: Any, query_shape: Any, key_shape: Any, *others: Any, **options: Any
) -> int:
    """Count the four products; recomputed scores are not work that the gradient needs."""
    return 2 * _forward_operations(query_shape, key_shape)
