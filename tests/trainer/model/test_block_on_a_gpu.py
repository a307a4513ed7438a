"""Products and memory traffic of a compiled block, as Inductor lowers it for an H200."""

from collections.abc import Iterator

import pytest
from block_on_a_gpu import BATCH, SEGMENTS, WIDTH, compiled_block

from cavmae.benchmarks.fake_cuda.process import FakeCuda, fake_cuda


@pytest.fixture(scope="module")
def gpu() -> Iterator[FakeCuda]:
    with fake_cuda() as device:
        yield device


FORMS = {"one sequence": (None, 0), "three streams": (SEGMENTS, 0), "some queries": (None, 96)}
BUDGETS = {
    # Passes over all tokens of one width, each a read or a write, beside products and attention:
    # forward, norm 2, sum and norm 4, GELU 8, sum 3; backward, GELU 12 and its output again 4,
    # norms 4 each and the normalised tokens again 1, gradients of query, key and value packed 6.
    ("none", "one sequence"): (17, 26),
    ("selective", "one sequence"): (17, 31),
    ("full", "one sequence"): (17, 26 + 17),
    # The outputs of attention over each segment, and their gradients, are put together.
    ("selective", "three streams"): (17 + 2, 31 + 6),
    # Three quarters of the tokens after attention, whose rows are gathered and put back.
    ("selective", "some queries"): (2 + 0.75 * 15 + 3.5, 6 + 4 + 0.75 * 21 + 3.5),
}


@pytest.mark.parametrize(("how", "form"), BUDGETS)
def test_a_block_multiplies_nothing_twice_and_moves_no_more_than_its_budget(
    gpu: FakeCuda, how, form: str
) -> None:
    segments, queries = FORMS[form]
    trace = gpu.run(compiled_block, how, segments, queries)
    again = 3 if how == "full" else 0  # what is recomputed of 4: the last product's output is not
    for phase, products, passes in zip(
        ("forward", "backward"), (4, 8 + again), BUDGETS[how, form], strict=True
    ):
        assert len(trace.of("product", phase=phase)) == products
        calls = (len(segments) if segments else 1) * (1 + (again > 0 and phase == "backward"))
        assert len(trace.of("attention", phase=phase)) == calls
        moved = sum(each.bytes for each in trace.of("fused", "triton", "other", phase=phase))
        tokens = BATCH * (sum(segments.values()) if segments else 128)
        # Statistics, ids and the parts of sums, which are larger beside a batch this small.
        assert moved < 1.15 * passes * tokens * WIDTH * 2, phase
    assert not trace.waits and not trace.copies
