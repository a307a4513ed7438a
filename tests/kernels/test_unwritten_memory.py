"""No kernel leaves a value unwritten or reads what nobody wrote.

Memory that is asked for is filled with NaN (and the largest integer) here; elsewhere it holds what
was there before, which in a small test is often right by chance.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from three_way import DEVICE, normal, results, shuffles

from cavmae.kernels import (
    contrastive_loss,
    gather_patches,
    gather_tokens,
    masked_reconstruction_loss,
    random_mask,
    restore_tokens,
)
from cavmae.kernels.similarity import tile_statistics

Operation = tuple[Callable[..., torch.Tensor], list[torch.Tensor]]


@pytest.fixture(autouse=True)
def unwritten_is_nan(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tile_statistics, "_programs", lambda _: 8)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.ones(1, device=DEVICE).new_empty(2).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def gather() -> Operation:
    def operation(backend, x, ids) -> torch.Tensor:
        return gather_tokens(x, ids, backend=backend)

    return operation, [normal(3, 9, 20).float(), shuffles(3, 9)[:, :4]]


def restore() -> Operation:
    def operation(backend, x, ids, *tables) -> torch.Tensor:
        return restore_tokens(x, ids, *tables, backend=backend)

    tables = [normal(1, count, 20, seed=count).float() for count in (1, 9, 1)]
    return operation, [normal(2, 4, 20).float(), shuffles(2, 9), *tables]  # 2 of 8 parts in use


def reconstruct() -> Operation:
    pixels, ids = normal(3, 3, 12, 18).float(), shuffles(3, 6)[:, :5]

    def operation(backend, predicted) -> torch.Tensor:
        return masked_reconstruction_loss(predicted, pixels, ids, True, 6, backend=backend)

    return operation, [normal(3, 5, 108, seed=1).float()]


def contrast(
    audio: int, video: int, offset: int = 0, group: int | None = None, both: bool = True
) -> Operation:
    def operation(backend, a, v, temperature) -> torch.Tensor:
        result = contrastive_loss(a, v, temperature, both, group, offset, backend=backend)
        return result.loss + 0 * result.accuracy

    embeddings = [normal(audio, 8).float(), normal(video, 8, seed=1).float()]
    return operation, [*embeddings, torch.tensor(0.1, device=DEVICE)]


@pytest.mark.parametrize(
    "case",
    [
        gather,
        restore,
        reconstruct,
        lambda: contrast(300, 300),
        lambda: contrast(300, 300, both=False),
        lambda: contrast(70, 133, 60),
        lambda: contrast(133, 70, 3),
        lambda: contrast(30, 30, group=5),
    ],
    ids=[
        "gather_tokens",
        "restore_tokens",
        "masked_reconstruction_loss",
        "contrastive_loss-both",
        "contrastive_loss-one",
        "contrastive_loss-more-video",
        "contrastive_loss-more-audio",
        "contrastive_loss-groups",
    ],
)
def test_output_and_gradients_are_written_whole(case: Callable[[], Operation]) -> None:
    operation, inputs = case()
    for place, found in enumerate(results(operation, "triton", inputs)):
        assert found.isfinite().all(), "output" if place == 0 else f"gradient {place}"


def test_patches_are_written_whole() -> None:
    pixels = normal(3, 3, 12, 18).float()
    assert gather_patches(pixels, shuffles(3, 6)[:, :5], 6, backend="triton").isfinite().all()


@pytest.mark.parametrize("ratio", [0.0, 0.4, 0.99])
def test_masks_are_written_whole(ratio: float) -> None:
    mask = random_mask(
        torch.arange(3, device=DEVICE),
        seed=0,
        stream="mask_audio",
        grid=(5, 9),
        ratio=ratio,
        mode="tf",
        backend="triton",
    )
    assert all(((ids >= 0) & (ids < 45)).all() for ids in mask)
