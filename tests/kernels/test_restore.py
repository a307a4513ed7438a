"""The decoder's input: kept tokens at their places, mask tokens elsewhere, every gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from three_way import (
    DEVICE,
    DTYPES,
    ROUNDING,
    check_repeats,
    check_three_way,
    dtype_name,
    normal,
    shuffles,
)

from cavmae.kernels import gather_tokens, mask_ids_from_shuffle, restore_tokens


def restore(backend, x, ids, mask_token, position, modality) -> torch.Tensor:
    return restore_tokens(x, ids, mask_token, position, modality, backend=backend)


def arguments(batch: int, tokens: int, kept: int, width: int, both: bool = False):
    """`both`: a modality vector for each token, as where two modalities lie end to end."""
    return [
        normal(batch, kept, width),
        shuffles(batch, tokens),
        normal(1, 1, width, seed=1),
        normal(1, tokens, width, seed=2),
        normal(1, tokens if both else 1, width, seed=3),
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize(
    ("batch", "tokens", "kept", "width"),
    [(2, 6, 3, 40), (1, 1, 1, 1), (11, 9, 4, 7), (2, 5, 5, 100), (9, 17, 1, 1030)],
)
def test_the_kernel_is_as_near_to_the_truth_as_torch(batch, tokens, kept, width, dtype) -> None:
    # Sums over the batch and the tokens round more often in torch than in the kernel.
    inputs = arguments(batch, tokens, kept, width)
    check_three_way(restore, inputs, dtype, tolerance=2 * ROUNDING[dtype])


def test_a_modality_vector_for_each_token_has_its_own_gradient() -> None:
    check_three_way(restore, arguments(3, 9, 4, 20, both=True), torch.float32)


@pytest.mark.parametrize(
    ("place", "view"),
    [
        (0, lambda: normal(3, 20, 4).transpose(1, 2)),
        (0, lambda: normal(3, 8, 20)[:, ::2]),
        (0, lambda: normal(3, 4, 50)[:, :, 10:30]),
        (0, lambda: normal(4, 20).expand(3, -1, -1)),
        (1, lambda: shuffles(3, 9).T.contiguous().T),
        (1, lambda: shuffles(1, 9).expand(3, -1)),
        (2, lambda: normal(1, 1, 1, seed=1).expand(1, 1, 20)),
        (2, lambda: normal(1, 1, 40, seed=1)[:, :, ::2]),
        (3, lambda: normal(1, 20, 9, seed=2).transpose(1, 2)),
        (3, lambda: normal(1, 1, 20, seed=2).expand(1, 9, 20)),
        (4, lambda: normal(1, 20, 9, seed=3).transpose(1, 2)),
    ],
    ids=[
        "x-transposed",
        "x-every-second-token",
        "x-columns",
        "x-expanded",
        "restore_ids-transposed",
        "restore_ids-expanded",
        "mask_token-expanded",
        "mask_token-every-second",
        "position-transposed",
        "position-expanded",
        "modality-transposed",
    ],
)
def test_inputs_are_read_through_their_strides(place: int, view) -> None:
    inputs = arguments(3, 9, 4, 20)
    inputs[place] = view()
    check_three_way(restore, inputs, torch.float32)


@pytest.mark.parametrize(
    "turned",
    [lambda out: out.transpose(1, 2), lambda out: out.sum(2), lambda out: out[:, ::2, 3:17]],
    ids=["transposed", "expanded", "sliced"],
)
def test_an_upstream_gradient_is_read_through_its_strides(turned) -> None:
    def operation(*inputs) -> torch.Tensor:
        return turned(restore(*inputs))

    check_three_way(operation, arguments(3, 9, 4, 20), torch.float32)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_each_gradient_has_the_dtype_of_its_input(backend) -> None:
    x, ids, *tables = arguments(2, 6, 3, 8)
    leaves = [t.requires_grad_() for t in (x.bfloat16(), *(t.float() for t in tables))]
    out = restore(backend, leaves[0], ids, *leaves[1:])
    gradients = torch.autograd.grad(out.sum(), leaves)
    assert out.dtype == torch.bfloat16
    assert [g.dtype for g in gradients] == [torch.bfloat16, *[torch.float32] * 3]


def test_places_from_kept_on_are_all_mask_tokens() -> None:
    x, ids, *tables = (t.float() if t.is_floating_point() else t for t in arguments(2, 6, 3, 8))
    far = torch.where(ids < 3, ids, ids + 1000)
    for backend in ("torch", "triton"):
        near = restore(backend, x, ids, *tables)
        assert torch.equal(restore(backend, x, far, *tables), near)


@settings(max_examples=15, deadline=None)
@given(
    tokens=st.integers(2, 12),
    ratio=st.sampled_from([0.0, 0.25, 0.5, 0.8]),
    backend=st.sampled_from(["torch", "triton"]),
)
def test_restoring_undoes_the_gather(tokens: int, ratio: float, backend) -> None:
    mask = mask_ids_from_shuffle(shuffles(2, tokens), ratio)
    kept = normal(2, mask.keep.shape[1], 4).float()
    zero = torch.zeros(1, 1, 4, device=DEVICE)
    position = torch.zeros(1, tokens, 4, device=DEVICE)
    restored = restore(backend, kept, mask.restore, zero + 7, position, zero)
    assert torch.equal(gather_tokens(restored, mask.keep), kept)
    assert (gather_tokens(restored, mask.removed) == 7).all()


@pytest.mark.parametrize("both", [False, True], ids=["one-modality", "both-modalities"])
def test_the_reference_passes_gradcheck_for_every_input(both: bool) -> None:
    x, ids, *tables = arguments(2, 5, 3, 3, both)
    inputs = [t.requires_grad_() for t in (x, *tables)]
    assert torch.autograd.gradcheck(lambda x, *tables: restore("torch", x, ids, *tables), inputs)


def test_two_runs_give_the_same_bits() -> None:
    inputs = [t.float() if t.is_floating_point() else t for t in arguments(9, 7, 3, 40)]
    check_repeats(restore, inputs)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.zeros(2, 3), r"x has shape \(2, 3\)"),
        (0, torch.zeros(2, 7, 4), r"x has 7 kept tokens and restore_ids only 6"),
        (1, torch.zeros(2, 6), r"restore_ids are torch.float32"),
        (1, torch.zeros(3, 6, dtype=torch.int64), r"restore_ids are .* of shape \(3, 6\)"),
        (1, torch.zeros(2, 6, 1, dtype=torch.int64), r"restore_ids are .* of shape \(2, 6, 1\)"),
        (1, torch.zeros(2, 6, dtype=torch.int64, device="meta"), r"restore_ids is on meta"),
        (2, torch.zeros(1, 1, 4, device="meta"), r"mask_token is on meta"),
        (4, torch.zeros(1, 1, 4, device="meta"), r"modality is on meta"),
        (1, torch.full((2, 6), -1), r"restore_ids holds -1"),
        (2, torch.zeros(1, 1, 5), r"mask_token has shape \(1, 1, 5\)"),
        (3, torch.zeros(1, 5, 4), r"position has shape \(1, 5, 4\)"),
        (4, torch.zeros(1, 2, 4), r"modality has shape \(1, 2, 4\)"),
        (3, torch.zeros(1, 6, 4, device="meta"), r"position is on meta"),
    ],
)
def test_bad_input_is_named(place: int, value: torch.Tensor, message: str) -> None:
    inputs = [t.cpu() for t in arguments(2, 6, 3, 4)]
    inputs[place] = value
    with pytest.raises(ValueError, match=message):
        restore_tokens(*inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_published_shapes(dtype) -> None:
    check_three_way(restore, arguments(64, 708, 177, 512), dtype, tolerance=2 * ROUNDING[dtype])
