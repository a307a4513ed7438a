"""The passes of a residual branch's backward pass, against the truth and against torch."""

import sys
from collections.abc import Callable

import pytest
import torch
from three_way import DEVICE, DTYPES, ROUNDING, dtype_name, error, normal

from cavmae.kernels import gelu_backward, layer_norm, layer_norm_backward, pack_rows

Results = list[torch.Tensor]
Operation = Callable[[str, list[torch.Tensor]], Results]


def norm_gradients(lengths: list[int], tokens: bool = True) -> Operation:
    def operation(backend, inputs: list[torch.Tensor]) -> Results:
        x, grad, residual, *affine = inputs
        weights, biases = affine[: len(lengths)], affine[len(lengths) :]
        _, mean, inverse_deviation = layer_norm(x, weights, biases, lengths, 1e-5)
        found = layer_norm_backward(
            x,
            mean,
            inverse_deviation,
            weights,
            biases,
            lengths,
            grad,
            residual,
            give_tokens=tokens,
            epsilon=1e-5,
            backend=backend,
        )
        given = [] if found.tokens is None else [found.tokens]
        return [found.x, *found.weights, *found.biases, found.residual_sum, *given]

    return operation


def activation_gradients(backend, inputs: list[torch.Tensor]) -> Results:
    found = gelu_backward(*inputs, give_activation=True, backend=backend)
    assert found[2] is not None
    return [*found[:2], found[2]]


def packed(backend, inputs: list[torch.Tensor]) -> Results:
    return list(pack_rows(*inputs, backend=backend))


def norm_inputs(batch: int, lengths: list[int], width: int) -> list[torch.Tensor]:
    tokens = [normal(batch, sum(lengths), width, seed=seed) for seed in range(3)]
    return [*tokens, *(normal(width, seed=seed) for seed in range(2 * len(lengths)))]


CASES = {
    "norm": (norm_gradients([7]), norm_inputs(3, [7], 40)),
    "norm, one value": (norm_gradients([1]), norm_inputs(1, [1], 1)),
    "norm, rows beyond a tile": (norm_gradients([90]), norm_inputs(2, [90], 1000)),
    "norm, three segments": (norm_gradients([4, 1, 5]), norm_inputs(3, [4, 1, 5], 24)),
    "norm, tokens not wanted": (norm_gradients([5], False), norm_inputs(2, [5], 16)),
    "gelu": (activation_gradients, [3 * normal(5, 300), normal(5, 300, seed=1)]),
    "gelu, rows beyond a tile": (activation_gradients, [normal(50, 9), normal(50, 9, seed=1)]),
    "pack": (packed, [normal(3, 7, 24, seed=seed) for seed in range(3)]),
    "pack, rows beyond a tile": (packed, [normal(8, 7, 5, seed=seed) for seed in range(3)]),
}


@pytest.fixture(autouse=True)
def few_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many programs as the interpreter runs in no time."""
    for operation in (gelu_backward, layer_norm_backward, pack_rows):
        monkeypatch.setattr(sys.modules[operation.__module__], "ROW_PARTS", 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("case", CASES)
def test_kernels_are_as_near_to_the_truth_as_torch(case: str, dtype: torch.dtype) -> None:
    operation, exact = CASES[case]
    inputs = [tensor.to(dtype) for tensor in exact]
    truth = operation("torch", [tensor.double() for tensor in inputs])
    theirs, ours = operation("torch", inputs), operation("triton", inputs)
    for true, one, other in zip(truth, ours, theirs, strict=True):
        assert one.dtype == dtype
        assert error(one, true) <= error(other, true) + ROUNDING[dtype]


@pytest.mark.parametrize("case", CASES)
def test_everything_is_written(case: str) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what is unwritten with NaN
    try:
        assert torch.ones(1, device=DEVICE).new_empty(2).isnan().all()
        operation, exact = CASES[case]
        assert all(x.isfinite().all() for x in operation("triton", [x.float() for x in exact]))
    finally:
        torch.use_deterministic_algorithms(False)


def test_torch_s_way_is_what_autograd_gives() -> None:
    lengths = [4, 1, 5]
    x, grad, residual, *affine = (tensor.requires_grad_() for tensor in norm_inputs(3, lengths, 24))
    tokens = layer_norm(x, affine[:3], affine[3:], lengths, 1e-5).tokens
    ((tokens * grad).sum() + (x * residual).sum()).backward()
    found = norm_gradients(lengths)("torch", [x, grad, residual, *affine])
    for ours, leaf in zip(found, [x, *affine], strict=False):
        torch.testing.assert_close(ours, leaf.grad)
    torch.testing.assert_close(found[-1], tokens)


def test_gradients_of_attention_are_packed_wherever_they_lie() -> None:
    views = [normal(2, 4, 6, 8, seed=seed).float().transpose(1, 2).flatten(2) for seed in range(3)]
    for ours, theirs in zip(packed("triton", views), packed("torch", views), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, check_dtype=False)
