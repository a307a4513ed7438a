"""The two residual branches of a block, with backward passes of few passes over memory.

Autograd by itself reads an activation once for each gradient that it takes part in. Here a
backward pass gives the products what they want in one pass over a norm's or an activation's input:
what they multiply, computed again where it was not kept, and the sums that are gradients of biases.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from cavmae.kernels import gelu_backward, layer_norm, layer_norm_backward, pack_rows


def projections(
    x: torch.Tensor,
    norms: Sequence[nn.LayerNorm],
    lengths: Sequence[int],
    linear: nn.Linear,
    residual_bias: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value of attention, and the residual that goes past it.

    Args:
        x: (batch, tokens, width).
        norms: of each segment.
        lengths: tokens of each segment, in order.
        linear: from width to three times the width.
        residual_bias: (width,) a bias that the caller adds to the residual, detached; its gradient
            is that of the residual, added up, and comes from here.

    Returns:
        Query, key, value and `x`, each (batch, tokens, width).
    """
    affine = _affine(norms)
    if not _needs_gradients(x, linear.weight, linear.bias, residual_bias, *affine):
        half = len(norms)
        tokens = layer_norm(x, affine[:half], affine[half:], lengths, norms[0].eps).tokens
        query, key, value = linear(tokens).chunk(3, dim=2)
        return query, key, value, x
    return _Projections.apply(
        x, linear.weight, linear.bias, residual_bias, lengths, norms[0].eps, *affine
    )


def mlp_branch(
    x: torch.Tensor,
    norms: Sequence[nn.LayerNorm],
    lengths: Sequence[int],
    first: nn.Linear,
    second: nn.Linear,
    *,
    keep: bool,
) -> torch.Tensor:
    """`x + second(gelu(first(norm(x))))`.

    Args:
        x: (batch, tokens, width).
        norms: of each segment.
        lengths: tokens of each segment, in order.
        first, second: the linear layers.
        keep: the inputs of both layers for the backward pass, which would compute them again.
    """
    weights = (first.weight, first.bias, second.weight, second.bias)
    affine = _affine(norms)
    if not _needs_gradients(x, *weights, *affine):
        half = len(norms)
        tokens = layer_norm(x, affine[:half], affine[half:], lengths, norms[0].eps).tokens
        return x + second(F.gelu(first(tokens)))
    return _MlpBranch.apply(x, *weights, lengths, keep, norms[0].eps, *affine)


def _needs_gradients(*tensors: torch.Tensor) -> bool:
    """Whether there will be a backward pass. Without one the functions below are not for use:
    torch.compile then mistakes the context for an argument of those with variable arguments
    (torch 2.13, `AutogradFunctionVariable.call_apply`)."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _affine(norms: Sequence[nn.LayerNorm]) -> list[nn.Parameter]:
    return [norm.weight for norm in norms] + [norm.bias for norm in norms]


def _weight_gradient(grad: torch.Tensor, x: torch.Tensor | None) -> torch.Tensor:
    """Of a linear layer that maps rows `x`, kept or computed again, to rows with that gradient."""
    assert x is not None
    return grad.flatten(0, -2).T @ x.flatten(0, -2)


class _Projections(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        residual_bias: torch.Tensor,
        lengths: Sequence[int],
        epsilon: float,
        *affine: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        half = len(affine) // 2
        tokens, *statistics = layer_norm(x, affine[:half], affine[half:], lengths, epsilon)
        query, key, value = F.linear(tokens, weight, bias).chunk(3, dim=2)
        ctx.save_for_backward(x, *statistics, weight, tokens, *affine)
        ctx.lengths, ctx.epsilon = lengths, epsilon
        return query, key, value, x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        of_query: torch.Tensor,
        of_key: torch.Tensor,
        of_value: torch.Tensor,
        residual: torch.Tensor,
    ) -> tuple[torch.Tensor | None, ...]:
        x, mean, inverse_deviation, weight, tokens, *affine = ctx.saved_tensors
        half = len(affine) // 2
        packed, of_bias = pack_rows(of_query, of_key, of_value)
        of_norm = layer_norm_backward(
            x,
            mean,
            inverse_deviation,
            affine[:half],
            affine[half:],
            ctx.lengths,
            packed @ weight,
            residual,
            give_tokens=False,
            epsilon=ctx.epsilon,
        )
        of_weight = _weight_gradient(packed, tokens)
        affine = (*of_norm.weights, *of_norm.biases)
        return of_norm.x, of_weight, of_bias, of_norm.residual_sum, None, None, *affine


class _MlpBranch(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        x: torch.Tensor,
        weight_1: torch.Tensor,
        bias_1: torch.Tensor,
        weight_2: torch.Tensor,
        bias_2: torch.Tensor,
        lengths: Sequence[int],
        keep: bool,
        epsilon: float,
        *affine: torch.Tensor,
    ) -> torch.Tensor:
        half = len(affine) // 2
        tokens, *statistics = layer_norm(x, affine[:half], affine[half:], lengths, epsilon)
        hidden = F.linear(tokens, weight_1, bias_1)
        activation = F.gelu(hidden)
        kept = (tokens, activation) if keep else (None, None)
        ctx.save_for_backward(x, *statistics, hidden, weight_1, weight_2, *kept, *affine)
        ctx.lengths, ctx.epsilon = lengths, epsilon
        return x + F.linear(activation, weight_2, bias_2)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        x, mean, inverse_deviation, hidden, weight_1, weight_2, *saved = ctx.saved_tensors
        tokens, activation, *affine = saved
        half = len(affine) // 2
        of_hidden, of_bias_1, again = gelu_backward(
            hidden.flatten(0, 1),
            (grad @ weight_2).flatten(0, 1),
            give_activation=activation is None,
        )
        of_weight_2 = _weight_gradient(grad, again if activation is None else activation)
        del again
        of_norm = layer_norm_backward(
            x,
            mean,
            inverse_deviation,
            affine[:half],
            affine[half:],
            ctx.lengths,
            (of_hidden @ weight_1).unflatten(0, x.shape[:2]),
            grad,
            give_tokens=tokens is None,
            epsilon=ctx.epsilon,
        )
        of_weight_1 = _weight_gradient(of_hidden, of_norm.tokens if tokens is None else tokens)
        weights = (of_weight_1, of_bias_1, of_weight_2, of_norm.residual_sum)
        affine = (*of_norm.weights, *of_norm.biases)
        return of_norm.x, *weights, None, None, None, *affine
