"""The parts of the contrastive loss that a distributed caller puts together itself."""

from dataclasses import replace

import pytest
import torch
from three_way import DEVICE, normal

from cavmae.kernels import Backend
from cavmae.kernels.similarity import (
    ROW_BLOCK_BYTES,
    Similarity,
    inverse_norms,
    query_gradients,
    row_blocks,
    statistics,
)

BACKENDS: list[Backend] = ["torch", "triton"]


def similarity(queries: int, candidates: int, shift: int, backend, width: int = 12) -> Similarity:
    q, c = normal(1, queries, width).float(), normal(1, candidates, width, seed=1).float()
    temperature = torch.tensor(1 / 0.07, device=DEVICE)
    inverses = inverse_norms(q, backend), inverse_norms(c, backend)
    return Similarity(q, c, *inverses, temperature, shift, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_some_queries_of_several_groups_have_the_statistics_that_they_have_among_all(
    backend,
) -> None:
    queries, candidates = normal(3, 20, 8).float(), normal(3, 40, 8, seed=1).float()
    queries *= torch.linspace(0.1, 9, 20, device=DEVICE)[:, None]  # so that norms differ
    inverses = inverse_norms(queries, backend), inverse_norms(candidates, backend)
    whole = Similarity(
        queries, candidates, *inverses, torch.tensor(10.0, device=DEVICE), 5, backend
    )
    some = replace(
        whole, queries=queries[:, 4:16], query_inverse=whole.query_inverse[:, 4:16], shift=9
    )
    found, expected = (statistics(one, reverse=False).query_log_sum for one in (some, whole))
    torch.testing.assert_close(found, expected[:, 4:16])


@pytest.mark.parametrize("backend", BACKENDS)
def test_some_queries_of_several_groups_have_the_gradients_that_they_have_among_all(
    backend,
) -> None:
    queries, candidates = normal(3, 20, 8).float(), normal(3, 40, 8, seed=1).float()
    inverses = inverse_norms(queries, backend), inverse_norms(candidates, backend)
    temperature, factor = torch.tensor(10.0, device=DEVICE), torch.tensor(0.5, device=DEVICE)
    whole = Similarity(queries, candidates, *inverses, temperature, 5, backend)
    some = replace(
        whole, queries=queries[:, 4:16], query_inverse=whole.query_inverse[:, 4:16], shift=9
    )
    found = statistics(whole, reverse=True)
    expected = query_gradients(whole, found.query_log_sum, found.candidate_log_sum, factor)
    of_some = found.query_log_sum[:, 4:16]
    ours = query_gradients(some, of_some, found.candidate_log_sum, factor)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other[:, 4:16], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_transposed_twice_is_the_same_matrix(backend) -> None:
    whole = similarity(5, 9, 2, backend)
    turned = whole.transposed()
    assert turned.queries is whole.candidates and turned.candidate_inverse is whole.query_inverse
    assert turned.shift == -2
    torch.testing.assert_close(turned.dense, whole.dense.transpose(1, 2))
    assert turned.transposed().queries is whole.queries and turned.transposed().shift == 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_candidates_statistics_are_those_of_the_transposed_matrix(backend) -> None:
    whole = similarity(200, 210, 5, backend)
    both = statistics(whole, reverse=True)
    turned = statistics(whole.transposed(), reverse=False)
    torch.testing.assert_close(both.candidate_log_sum, turned.query_log_sum)
    torch.testing.assert_close(both.terms[1], turned.terms[0])
    assert both.candidate_log_sum is not None
    assert both.candidate_log_sum[0].isinf().sum() == 10, "candidates without a positive"


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_kernel_s_statistics_are_the_reference_s(backend) -> None:
    whole = similarity(70, 90, 3, backend)
    dense = torch.nn.functional.normalize(whole.queries[0], dim=1).double()
    dense = dense @ torch.nn.functional.normalize(whole.candidates[0], dim=1).double().T / 0.07
    found = statistics(whole, reverse=True)
    torch.testing.assert_close(
        found.query_log_sum[0].double(), dense.logsumexp(1), rtol=1e-5, atol=1e-5
    )
    positive = dense.diagonal(3)
    torch.testing.assert_close(
        found.terms[0, 0].double(), dense.logsumexp(1) - positive, rtol=1e-5, atol=1e-5
    )
    first = dense.argmax(1) == torch.arange(70, device=DEVICE) + 3
    assert torch.equal(found.terms[0, 1].bool(), first)


@pytest.mark.parametrize("candidates", [100, 32768, 1 << 20])
def test_row_blocks_cover_the_queries_once_within_their_bytes(candidates: int) -> None:
    x = torch.empty(1, 5000, 4, dtype=torch.bfloat16)
    y = torch.empty(1, candidates, 4, dtype=torch.bfloat16)
    matrix = Similarity(x, y, x[..., 0], y[..., 0], x[0, 0, 0], 0, "triton")
    groups, found = zip(*row_blocks(matrix), strict=True)
    assert all(list(range(1))[group] == [0] for group in groups)
    covered = [row for block in found for row in range(block.start, block.stop)]
    assert covered == list(range(5000))
    most = max(block.stop - block.start for block in found)
    assert most * candidates * 2 <= ROW_BLOCK_BYTES or most == 128
