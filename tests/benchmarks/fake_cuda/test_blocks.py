"""What Inductor makes of a block for an H200, without one: products, attention, fused kernels."""

from collections.abc import Iterator
from typing import get_args

import pytest
from fake_gpu.blocks import FORMS, compiled_block

from cavmae.benchmarks.fake_cuda.process import FakeCuda, fake_cuda
from cavmae.trainer.model.blocks import Recompute

PRODUCTS: dict[Recompute, tuple[int, int]] = {
    "none": (4, 8),
    "selective": (4, 8),
    "full": (4, 11),  # the backward pass repeats qkv, proj and fc1
}
"""Matrix products of a block, forward and backward."""
BUDGET: dict[tuple[str, Recompute], tuple[float, float]] = {
    ("modality", "none"): (1.75, 2.7),
    ("modality", "selective"): (1.75, 3.2),
    ("modality", "full"): (1.75, 4.2),
    ("joint", "none"): (5.4, 9.2),
    ("joint", "selective"): (5.4, 10.6),
    ("joint", "full"): (5.4, 14.0),
    ("last", "none"): (6.4, 9.8),
    ("last", "selective"): (6.4, 11.1),
    ("last", "full"): (6.4, 15.4),
}
"""Gigabytes that kernels of a block beside products and attention may read and write at batch 512,
forward and backward."""
ATTENTION = {"modality": 1, "joint": 3, "last": 1}
"""Calls of fused attention in a forward pass: one for each segment."""
LONG = (pytest.mark.slow, pytest.mark.long)


@pytest.fixture(scope="module")
def gpu() -> Iterator[FakeCuda]:
    with fake_cuda() as device:
        yield device


@pytest.mark.parametrize(
    ("form", "recompute"),
    [
        # Each form, and each way to recompute, at each commit; the other pairs before a release.
        pytest.param(form, how, marks=marks)
        for form in FORMS
        for how in get_args(Recompute)
        for marks in [() if form == "modality" or how == "selective" else LONG]
    ],
)
def test_a_block_compiles_whole_to_known_products_within_its_budget_of_bytes(
    gpu: FakeCuda, form: str, recompute: Recompute
) -> None:
    trace = gpu.run(compiled_block, form, recompute)

    passes = ("forward", "backward")
    assert tuple(len(trace.of("product", phase=name)) for name in passes) == PRODUCTS[recompute]
    beside = [trace.of("fused", "triton", "other", phase=name) for name in passes]
    gigabytes = [sum(one.bytes for one in operations) / 1e9 for operations in beside]
    for found, budget in zip(gigabytes, BUDGET[form, recompute], strict=True):
        assert 0.9 * budget < found <= budget
    repeated = recompute == "full"
    calls = [len(trace.of("attention", phase=name)) for name in passes]
    assert calls == [ATTENTION[form], ATTENTION[form] * (1 + repeated)]
    assert not trace.waits and not trace.copies
