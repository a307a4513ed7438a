"""Which implementation runs, and that nothing else is chosen silently."""

import pytest
import torch
from three_way import DEVICE, normal

from cavmae.kernels import backend as backends
from cavmae.kernels import (
    contrastive_loss,
    default_backend,
    gather,
    gather_patches,
    gather_tokens,
    masked_reconstruction_loss,
    patches,
    reconstruction,
    restore,
    restore_tokens,
)
from cavmae.kernels.backend import choose_backend


def test_cpu_tensors_run_the_reference_and_cuda_tensors_the_kernels() -> None:
    assert default_backend(torch.device("cpu")) == "torch"
    assert default_backend(torch.device("cuda", 1)) == "triton"


def test_an_explicit_choice_is_kept() -> None:
    x = torch.zeros(1, device=DEVICE)
    assert choose_backend("torch", x=x) == "torch"
    assert choose_backend("triton", x=x) == "triton", "without a GPU the interpreter runs it"


def test_the_kernels_need_a_gpu_or_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "INTERPRETED", False)
    with pytest.raises(
        ValueError, match=r"backend is 'triton' and x is on cpu; .*TRITON_INTERPRET"
    ):
        gather_tokens(torch.zeros(1, 2, 3), torch.tensor([[0]]), backend="triton")


def test_a_gpu_that_is_not_the_current_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    backends._check_current("x", torch.device("cuda", 0))
    with pytest.raises(ValueError, match=r"x is on cuda:1 and the current device is cuda:0; call"):
        backends._check_current("x", torch.device("cuda", 1))


@pytest.mark.gpu
def test_tensors_of_another_gpu_are_refused() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    x, ids = torch.zeros(1, 2, 4, device="cuda:1"), torch.tensor([[0]], device="cuda:1")
    with torch.cuda.device(0), pytest.raises(ValueError, match="x is on cuda:1"):
        gather_tokens(x, ids)
    with torch.cuda.device(1):
        assert gather_tokens(x, ids).shape == (1, 1, 4)


def test_an_unknown_backend_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="backend is 'cuda'; use 'torch', 'triton' or None"):
        gather_tokens(torch.zeros(1, 2, 3), torch.tensor([[0]]), backend="cuda")  # pyright: ignore[reportArgumentType]


X, IDS, TABLE = normal(1, 2, 4), torch.tensor([[0, 1]], device=DEVICE), normal(1, 1, 4).float()


@pytest.mark.parametrize(
    ("refused", "call"),
    [
        ("audio", lambda: contrastive_loss(X[0], X[0], 0.05, True, backend="triton")),
        ("x", lambda: gather_tokens(X, IDS, backend="triton")),
        ("x", lambda: restore_tokens(X, IDS, TABLE, X.float(), TABLE, backend="triton")),
        ("position", lambda: restore_tokens(X.float(), IDS, TABLE, X, TABLE, backend="triton")),
    ],
    ids=["contrastive_loss", "gather_tokens", "restore_tokens", "restore_tokens-position"],
)
def test_the_kernels_refuse_float64_by_name(refused: str, call) -> None:
    with pytest.raises(ValueError, match=rf"^{refused} is torch.float64; .*backend='torch'"):
        call()


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids reach the kernels unseen, as they do on a GPU."""
    for module in (gather, patches, reconstruction):
        monkeypatch.setattr(module, "check_ids", lambda *_: None)
    monkeypatch.setattr(restore, "_check_shapes", lambda *_: None)


@pytest.mark.parametrize("wrong", [-1, 4, 10**6])
def test_a_row_whose_id_is_out_of_range_is_nan(unchecked: None, wrong: int) -> None:
    ids = torch.tensor([[2, wrong, 0]], device=DEVICE)
    tokens, pixels = normal(1, 4, 8).float(), normal(1, 1, 32, 32).float()
    for found in (
        gather_tokens(tokens, ids, backend="triton"),
        gather_patches(pixels, ids, 16, backend="triton"),
    ):
        assert found[0, 1].isnan().all() and found[0, [0, 2]].isfinite().all()
    predicted = normal(1, 3, 256).float()
    assert masked_reconstruction_loss(predicted, pixels, ids, True, backend="triton").isnan()


def test_a_row_whose_place_is_below_zero_is_nan_and_writes_no_gradient(unchecked: None) -> None:
    places = torch.tensor([[0, -1, 1]], device=DEVICE)
    x = normal(1, 2, 8).float().requires_grad_()
    table = torch.zeros(1, 3, 8, device=DEVICE)
    out = restore_tokens(x, places, table[:, :1], table, table[:, :1], backend="triton")
    assert out[0, 1].isnan().all() and torch.equal(out[0, [0, 2]], x[0])
    (gradient,) = torch.autograd.grad(out[0, [0, 2]].sum(), [x])
    assert torch.equal(gradient, torch.ones_like(x))
