"""Layer normalisation of a packed sequence, and the gradient of a pre-norm residual branch.

Each segment of a sequence has its own weight and bias. The backward pass is one pass over what it
needs: it adds the gradient that came along the residual, gives the normalised tokens again to a
product that wants them, and adds up what weights and biases get, in parts of the rows that are
added in a fixed order.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from cavmae.kernels.backend import Backend, check_floats, choose_backend, jit

ROW_PARTS = 512
"""Parts of the rows whose sums are added up apart; each is three vectors of the width, in
float32."""


class Normalized(NamedTuple):
    """A normalised sequence.

    Attributes:
        tokens: (batch, tokens, width), weight and bias applied.
        mean, inverse_deviation: (batch, tokens, 1), which the backward pass reads.
    """

    tokens: torch.Tensor
    mean: torch.Tensor
    inverse_deviation: torch.Tensor


class NormGradients(NamedTuple):
    """Gradients of a residual branch that begins with a norm.

    Attributes:
        x: (batch, tokens, width), of branch and residual together.
        weights, biases: (width,) of each segment's norm.
        residual_sum: (width,) the residual's gradient added up over all tokens, which is the
            gradient of a bias that was added to the residual.
        tokens: (batch, tokens, width) the normalised tokens; None if they were not asked for.
    """

    x: torch.Tensor
    weights: list[torch.Tensor]
    biases: list[torch.Tensor]
    residual_sum: torch.Tensor
    tokens: torch.Tensor | None


def layer_norm(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    lengths: Sequence[int],
    epsilon: float,
) -> Normalized:
    """Normalise every token, and apply the weight and bias of its segment.

    Args:
        x: (batch, tokens, width) float.
        weights, biases: (width,) of each segment.
        lengths: tokens of each segment, in order.
        epsilon: added to the variance.
    """
    width = x.shape[2:]
    if len(lengths) == 1:
        return Normalized(*torch.native_layer_norm(x, width, weights[0], biases[0], epsilon))
    tokens, *statistics = torch.native_layer_norm(x, width, None, None, epsilon)
    weight, bias = (
        torch.cat([one.expand(length, -1) for one, length in zip(each, lengths, strict=True)])
        for each in (weights, biases)
    )  # (tokens, width)
    return Normalized(torch.addcmul(bias, tokens, weight), *statistics)


def layer_norm_backward(
    x: torch.Tensor,
    mean: torch.Tensor,
    inverse_deviation: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    lengths: Sequence[int],
    grad: torch.Tensor,
    residual: torch.Tensor,
    *,
    give_tokens: bool,
    epsilon: float,
    backend: Backend | None = None,
) -> NormGradients:
    """Gradients of `x + branch(layer_norm(x))`.

    Bytes moved: `x`, `grad` and `residual` read; the gradient of `x` written, and the normalised
    tokens if they are asked for.

    Args:
        x, weights, biases, lengths, epsilon: of `layer_norm`.
        mean, inverse_deviation: that it gave.
        grad: (batch, tokens, width) gradient of the normalised tokens.
        residual: (batch, tokens, width) gradient of the sum.
        give_tokens: whether the normalised tokens are wanted.
        backend: see `cavmae.kernels.backend`.

    Raises:
        ValueError: tensors on different devices, or dtypes that the kernel has not.
    """
    grad, residual = grad.contiguous(), residual.contiguous()
    if choose_backend(backend, x=x, grad=grad, residual=residual) == "torch":
        tokens = layer_norm(x, weights, biases, lengths, epsilon).tokens if give_tokens else None
        return _reference(
            x, mean, inverse_deviation, weights, biases, lengths, grad, residual
        )._replace(tokens=tokens)
    check_floats(x=x, grad=grad, residual=residual)
    x = x.contiguous()
    batch, count, width = x.shape
    of_x = torch.empty_like(x)
    tokens = torch.empty_like(x) if give_tokens else None
    sums = x.new_empty(len(lengths), ROW_PARTS, 3, width, dtype=torch.float32)
    columns = triton.next_power_of_2(width)
    _layer_norm_backward_kernel[(ROW_PARTS, len(lengths))](
        x,
        mean,
        inverse_deviation,
        weights[0] if len(lengths) == 1 else torch.stack([*weights]),
        biases[0] if len(lengths) == 1 else torch.stack([*biases]),
        grad,
        residual,
        of_x,
        sums if tokens is None else tokens,
        sums,
        batch,
        count,
        width,
        LENGTHS=tuple(lengths),
        ROWS=max(1, 2048 // columns),
        COLUMNS=columns,
        GIVE_TOKENS=give_tokens,
        num_warps=4,
    )
    by_segment = sums.sum(1).to(weights[0].dtype)  # (segments, 3, width)
    of_weights, of_biases, of_residual = (list(each.unbind()) for each in by_segment.unbind(1))
    return NormGradients(of_x, of_weights, of_biases, sum(of_residual[1:], of_residual[0]), tokens)


def _reference(
    x: torch.Tensor,
    mean: torch.Tensor,
    inverse_deviation: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    lengths: Sequence[int],
    grad: torch.Tensor,
    residual: torch.Tensor,
) -> NormGradients:
    segments = (each.split(list(lengths), dim=1) for each in (grad, x, mean, inverse_deviation))
    parts = [
        torch.ops.aten.native_layer_norm_backward(
            # torch reads the statistics as if they were contiguous.
            *(slope, part, x.shape[2:], middle.contiguous(), steep.contiguous()),
            *(weight, bias, [True] * 3),
        )
        for slope, part, middle, steep, weight, bias in zip(*segments, weights, biases, strict=True)
    ]
    of_x, of_weights, of_biases = (list(each) for each in zip(*parts, strict=True))
    branch = of_x[0] if len(of_x) == 1 else torch.cat(of_x, dim=1)
    return NormGradients(residual + branch, of_weights, of_biases, residual.sum((0, 1)), None)


@jit
def _layer_norm_backward_kernel(
    x,
    mean,
    inverse_deviation,
    weights,
    biases,
    grad,
    residual,
    of_x,
    tokens,
    sums,
    batch,
    count,
    width,
    LENGTHS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GIVE_TOKENS: tl.constexpr,
):
    """The rows of one segment and one part, ROWS at a time; COLUMNS is a power of two from the
    width on."""
    part, segment = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first, length = 0, LENGTHS[0]
    for number in tl.static_range(1, len(LENGTHS)):  # pyright: ignore
        first = tl.where(segment >= number, first + LENGTHS[number - 1], first)
        length = tl.where(segment == number, LENGTHS[number], length)
    rows = batch * length
    rows_each = tl.cdiv(rows, tl.num_programs(0))
    column = tl.arange(0, COLUMNS)
    there = column < width
    own = segment * width + column
    scale = tl.expand_dims(tl.load(weights + own, mask=there, other=0.0).to(tl.float32), 0)
    shift = tl.expand_dims(tl.load(biases + own, mask=there, other=0.0).to(tl.float32), 0)
    to_weight = tl.zeros((ROWS, COLUMNS), tl.float32)
    to_bias = tl.zeros((ROWS, COLUMNS), tl.float32)
    to_residual = tl.zeros((ROWS, COLUMNS), tl.float32)
    end = tl.minimum(rows, (part + 1) * rows_each)
    for begin in range(part * rows_each, end, ROWS):
        row = begin + tl.arange(0, ROWS)
        inside = row < end
        wanted = inside[:, None] & there[None, :]
        token = (row // length) * count + first + row % length
        place = token[:, None] * width + column[None, :]
        middle = tl.expand_dims(tl.load(mean + token, mask=inside, other=0.0).to(tl.float32), 1)
        steep = tl.load(inverse_deviation + token, mask=inside, other=0.0).to(tl.float32)
        steep = tl.expand_dims(steep, 1)
        value = tl.load(x + place, mask=wanted, other=0.0).to(tl.float32)
        slope = tl.load(grad + place, mask=wanted, other=0.0).to(tl.float32)
        along = tl.load(residual + place, mask=wanted, other=0.0).to(tl.float32)
        value = tl.where(wanted, (value - middle) * steep, 0.0)
        if GIVE_TOKENS:
            tl.store(tokens + place, value * scale + shift, mask=wanted)
        to_weight += slope * value
        to_bias += slope
        to_residual += along
        slope *= scale
        share = tl.sum(slope * value, 1, keep_dims=True) / width
        branch = (slope - tl.sum(slope, 1, keep_dims=True) / width - value * share) * steep
        tl.store(of_x + place, along + branch, mask=wanted)
    target = sums + ((segment * tl.num_programs(0) + part) * 3) * width + column
    tl.store(target, tl.sum(to_weight, 0), mask=there)
    tl.store(target + width, tl.sum(to_bias, 0), mask=there)
    tl.store(target + 2 * width, tl.sum(to_residual, 0), mask=there)
