"""What Inductor makes of a block for an H200, without one: products, attention, fused kernels."""

from collections.abc import Iterator
from typing import get_args

import pytest
from fake_blocks import FORMS, compiled_block

from cavmae.benchmarks.fake_cuda.process import FakeCuda, fake_cuda
from cavmae.trainer.model.blocks import Recompute

PRODUCTS: dict[Recompute, tuple[int, int]] = {
    "none": (4, 8),
    "selective": (4, 9),  # the backward pass repeats fc1
    "full": (4, 11),  # and qkv, and proj
}
"""Matrix products of a block, forward and backward."""
BUDGET: dict[tuple[str, Recompute], tuple[float, float]] = {
    ("modality", "none"): (1.75, 4.0),
    ("modality", "selective"): (1.75, 4.7),
    ("modality", "full"): (1.75, 4.9),
    ("joint", "none"): (8.4, 11.8),
    ("joint", "selective"): (6.2, 16.0),
    ("joint", "full"): (6.2, 16.9),
    ("last", "none"): (5.0, 11.1),
    ("last", "selective"): (5.0, 13.9),
    ("last", "full"): (5.0, 14.3),
}
"""Gigabytes that fused kernels of a block may read and write at batch 512, forward and backward."""
ATTENTION = {"modality": 1, "joint": 3, "last": 1}
"""Calls of fused attention in a forward pass: one for each segment."""


@pytest.fixture(scope="module")
def gpu() -> Iterator[FakeCuda]:
    with fake_cuda() as device:
        yield device


@pytest.mark.parametrize("recompute", get_args(Recompute))
@pytest.mark.parametrize("form", FORMS)
def test_a_block_compiles_whole_to_known_products_within_its_budget_of_bytes(
    gpu: FakeCuda, form: str, recompute: Recompute
) -> None:
    trace = gpu.run(compiled_block, form, recompute)

    passes = ("forward", "backward")
    assert tuple(len(trace.of("product", phase=name)) for name in passes) == PRODUCTS[recompute]
    gigabytes = [sum(one.bytes for one in trace.of("fused", phase=name)) / 1e9 for name in passes]
    for found, budget in zip(gigabytes, BUDGET[form, recompute], strict=True):
        assert 0.9 * budget < found <= budget
    repeated = recompute == "full"
    calls = [len(trace.of("attention", phase=name)) for name in passes]
    assert calls == [ATTENTION[form], ATTENTION[form] * (1 + repeated)]
    assert not trace.waits and not trace.copies
