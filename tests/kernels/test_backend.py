"""Which implementation runs, and that nothing else is chosen silently."""

import pytest
import torch

from cavmae.kernels import backend as backends
from cavmae.kernels import contrastive_loss, default_backend, gather_tokens
from cavmae.kernels.backend import choose_backend


def test_cpu_tensors_run_the_reference_and_cuda_tensors_the_kernels() -> None:
    assert default_backend(torch.device("cpu")) == "torch"
    assert default_backend(torch.device("cuda", 1)) == "triton"


def test_an_explicit_choice_is_kept() -> None:
    assert choose_backend("torch", x=torch.zeros(1)) == "torch"
    assert choose_backend("triton", x=torch.zeros(1)) == "triton", "the interpreter runs it"


def test_the_kernels_need_a_gpu_or_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "INTERPRETED", False)
    with pytest.raises(
        ValueError, match=r"backend is 'triton' and x is on cpu; .*TRITON_INTERPRET"
    ):
        gather_tokens(torch.zeros(1, 2, 3), torch.tensor([[0]]), backend="triton")


def test_an_unknown_backend_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="backend is 'cuda'; use 'torch', 'triton' or None"):
        gather_tokens(torch.zeros(1, 2, 3), torch.tensor([[0]]), backend="cuda")  # pyright: ignore[reportArgumentType]


def test_the_kernels_refuse_float64_by_name() -> None:
    x = torch.zeros(2, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"audio is torch.float64; .*backend='torch'"):
        contrastive_loss(x, x, 0.05, True, backend="triton")
