"""Gathering tokens: forward and backward write each row once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from three_way import (
    DEVICE,
    DTYPES,
    check_repeats,
    check_three_way,
    dtype_name,
    normal,
    results,
    shuffles,
    upstream_of,
)

from cavmae.kernels import gather_tokens


def gather(backend, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return gather_tokens(x, ids, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize(
    ("batch", "tokens", "kept", "width"),
    [(2, 6, 4, 40), (1, 1, 1, 1), (3, 9, 9, 7), (2, 20, 1, 1100), (5, 33, 8, 100)],
)
def test_the_kernel_moves_what_torch_moves(batch, tokens, kept, width, dtype) -> None:
    ids = shuffles(batch, tokens)[:, :kept]
    check_three_way(gather, [normal(batch, tokens, width), ids], dtype, tolerance=0)


@pytest.mark.parametrize(
    "view",
    [
        lambda: normal(3, 40, 9).transpose(1, 2),
        lambda: normal(3, 18, 40)[:, ::2],
        lambda: normal(3, 9, 80)[:, :, 20:60],
        lambda: normal(9, 40).expand(3, -1, -1),
    ],
    ids=["transposed", "every-second-token", "columns", "expanded"],
)
def test_views_are_read_through_their_strides(view) -> None:
    check_three_way(gather, [view(), shuffles(3, 9)[:, 2:7]], torch.float32, tolerance=0)


@pytest.mark.parametrize(
    "ids",
    [
        lambda: shuffles(3, 9).T.contiguous().T,
        lambda: shuffles(3, 9)[:, ::2],
        lambda: shuffles(1, 9)[:, 1:5].expand(3, -1),
    ],
    ids=["transposed", "every-second", "expanded"],
)
def test_ids_are_read_through_their_strides(ids) -> None:
    check_three_way(gather, [normal(3, 9, 20), ids()], torch.float32, tolerance=0)


@pytest.mark.parametrize(
    "turned",
    [lambda out: out.transpose(1, 2), lambda out: out.sum(2), lambda out: out[:, ::2, 3:17]],
    ids=["transposed", "expanded", "sliced"],
)
def test_an_upstream_gradient_is_read_through_its_strides(turned) -> None:
    def operation(backend, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return turned(gather_tokens(x, ids, backend=backend))

    inputs = [normal(3, 9, 20), shuffles(3, 9)[:, 2:7]]
    check_three_way(operation, inputs, torch.float32)


@settings(max_examples=15, deadline=None)
@given(batch=st.integers(1, 3), tokens=st.integers(1, 12), width=st.integers(1, 9), data=st.data())
def test_the_gradient_is_the_upstream_where_taken_and_zero_elsewhere(
    batch: int, tokens: int, width: int, data
) -> None:
    ids = shuffles(batch, tokens)[:, : data.draw(st.integers(1, tokens))]
    _, gradient = results(gather, "triton", [normal(batch, tokens, width).float(), ids])
    taken = torch.zeros(batch, tokens, device=DEVICE).scatter(1, ids, 1.0).bool()
    assert (gradient[~taken] == 0).all()
    taken_rows = gather_tokens(gradient, ids, backend="torch")
    assert torch.equal(taken_rows, upstream_of(taken_rows))


def test_two_runs_give_the_same_bits() -> None:
    check_repeats(gather, [normal(2, 9, 40).float(), shuffles(2, 9)[:, :5]])


def test_the_reference_passes_gradcheck() -> None:
    ids = shuffles(2, 6)[:, :3]
    assert torch.autograd.gradcheck(
        lambda x: gather_tokens(x, ids, backend="torch"), [normal(2, 6, 3).requires_grad_()]
    )


@pytest.mark.parametrize(
    ("x", "ids", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 1, dtype=torch.int64), r"x has shape \(2, 3\)"),
        (torch.zeros(2, 3, 4), torch.zeros(1, 1, dtype=torch.int64), r"ids has shape \(1, 1\)"),
        (torch.zeros(2, 3, 4), torch.zeros(2, 1, dtype=torch.int32), r"ids is torch.int32"),
        (torch.zeros(1, 3, 4), torch.tensor([[0, 3]]), r"ids holds 3; ids go from 0 to 2"),
        (torch.zeros(1, 3, 4), torch.tensor([[-1, 0]]), r"ids holds -1"),
        (torch.zeros(1, 3, 4, device="meta"), torch.tensor([[0]]), r"ids is on cpu and x on meta"),
    ],
)
def test_bad_input_is_named(x: torch.Tensor, ids: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gather_tokens(x, ids)


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31_are_right() -> None:
    tokens, width = 1 << 12, 1 << 10
    x = torch.zeros(600, tokens, width, dtype=torch.bfloat16, device=DEVICE)  # 2.5e9 values
    x[599, tokens - 1] = 3
    ids = torch.full((600, 1), tokens - 1, device=DEVICE)
    assert (gather_tokens(x, ids)[599] == 3).all()


@pytest.mark.gpu
def test_gradients_beyond_two_to_the_31_are_right() -> None:
    tokens, width = 1 << 12, 1 << 10
    x = torch.zeros(600, tokens, width, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    ids = torch.full((600, 1), tokens - 1, device=DEVICE)
    (gradient,) = torch.autograd.grad(gather_tokens(x, ids)[599].sum(), [x])
    assert (gradient[599, tokens - 1] == 1).all()
    assert gradient.count_nonzero() == width


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_published_shapes(dtype) -> None:
    ids = shuffles(64, 708)[:, :531]
    check_three_way(gather, [normal(64, 708, 512), ids], dtype, tolerance=0)
