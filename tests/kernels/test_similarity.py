"""The parts of the contrastive loss that a distributed caller puts together itself."""

from dataclasses import replace

import pytest
import torch
from three_way import DEVICE, normal

from cavmae.kernels import Backend
from cavmae.kernels.similarity import (
    ROW_BLOCK_BYTES,
    Parts,
    Similarity,
    direction_gradient,
    inverse_norms,
    merge,
    row_blocks,
    statistics,
)

BACKENDS: list[Backend] = ["torch", "triton"]


def similarity(queries: int, candidates: int, shift: int, backend, width: int = 12) -> Similarity:
    q, c = normal(1, queries, width).float(), normal(1, candidates, width, seed=1).float()
    temperature = torch.tensor(1 / 0.07, device=DEVICE)
    inverses = inverse_norms(q, backend), inverse_norms(c, backend)
    return Similarity(q, c, *inverses, temperature, shift, backend)


def block(whole: Similarity, first: int, last: int) -> Similarity:
    """The same queries against some of the candidates."""
    return replace(
        whole,
        candidates=whole.candidates[:, first:last],
        candidate_inverse=whole.candidate_inverse[:, first:last],
        shift=whole.shift - first,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_of_blocks_joined_are_those_of_the_whole(backend) -> None:
    whole = similarity(30, 100, 20, backend)
    cuts = [(0, 15), (15, 90), (90, 100)]  # the middle one has the positives
    parts = [statistics(block(whole, *cut), reverse=False).query for cut in cuts]
    joined = Parts(torch.cat(parts, dim=1), None)
    options = {"shift": 20, "first_query": 0, "pairs": 30, "backend": backend}
    by_blocks, at_once = (
        merge(joined, **options),
        merge(statistics(whole, reverse=False), **options),
    )
    torch.testing.assert_close(by_blocks.query_log_sum, at_once.query_log_sum)
    torch.testing.assert_close(by_blocks.terms, at_once.terms)


@pytest.mark.parametrize("backend", BACKENDS)
def test_blocks_of_several_groups_are_read_through_their_strides(backend) -> None:
    queries, candidates = normal(3, 20, 8).float(), normal(3, 40, 8, seed=1).float()
    candidates *= torch.linspace(0.1, 9, 40, device=DEVICE)[:, None]  # so that norms differ
    inverses = inverse_norms(queries, backend), inverse_norms(candidates, backend)
    temperature = torch.tensor(10.0, device=DEVICE)
    whole = Similarity(queries, candidates, *inverses, temperature, 5, backend)
    blocks = [block(whole, *cut) for cut in ((0, 15), (15, 40))]
    joined = Parts(torch.cat([statistics(b, reverse=False).query for b in blocks], 1), None)
    options = {"shift": 5, "first_query": 0, "pairs": 20, "backend": backend}
    at_once = merge(statistics(whole, reverse=False), **options)
    torch.testing.assert_close(merge(joined, **options).terms, at_once.terms)
    everything = slice(0, 20), slice(0, 3)
    gradients = [
        direction_gradient(b, at_once.query_log_sum, None, *everything) for b in (*blocks, whole)
    ]
    torch.testing.assert_close(gradients[0] + gradients[1], gradients[2], atol=1e-5, rtol=1e-4)


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
    found, expected = (
        merge(
            statistics(matrix, reverse=False),
            shift=matrix.shift,
            first_query=0,
            pairs=matrix.queries.shape[1],
            backend=backend,
        ).query_log_sum
        for matrix in (some, whole)
    )
    torch.testing.assert_close(found, expected[:, 4:16])


@pytest.mark.parametrize("backend", BACKENDS)
def test_candidates_statistics_of_blocks_of_queries_joined_are_those_of_the_whole(backend) -> None:
    whole = similarity(150, 30, -40, backend)  # candidate c's positive is query c + 40
    parts = [
        statistics(
            replace(
                whole,
                queries=whole.queries[:, first:last],
                query_inverse=whole.query_inverse[:, first:last],
                shift=whole.shift + first,
            ),
            reverse=True,
        )
        for first, last in ((0, 50), (50, 150))
    ]
    candidates = [part.candidate for part in parts if part.candidate is not None]
    joined = Parts(statistics(whole, reverse=False).query, torch.cat(candidates, dim=1))
    options = {"shift": -40, "first_query": 40, "pairs": 30, "backend": backend}
    by_blocks, at_once = (merge(p, **options) for p in (joined, statistics(whole, reverse=True)))
    torch.testing.assert_close(by_blocks.candidate_log_sum, at_once.candidate_log_sum)
    torch.testing.assert_close(by_blocks.terms, at_once.terms)


@pytest.mark.parametrize("backend", BACKENDS)
def test_transposed_twice_is_the_same_matrix(backend) -> None:
    whole = similarity(5, 9, 2, backend)
    turned = whole.transposed()
    assert turned.queries is whole.candidates and turned.candidate_inverse is whole.query_inverse
    assert turned.shift == -2
    torch.testing.assert_close(turned.dense, whole.dense.transpose(1, 2))
    assert turned.transposed().queries is whole.queries and turned.transposed().shift == 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_blocks_add_up_to_that_of_the_whole(backend) -> None:
    whole = similarity(30, 100, 20, backend)
    log_sums = [
        merge(
            statistics(one, reverse=False), shift=0, first_query=0, pairs=count, backend=backend
        ).query_log_sum
        for one, count in ((whole, 30), (whole.transposed(), 100))
    ]
    of_queries, of_candidates = log_sums
    everything = slice(0, 30), slice(0, 1)
    at_once = direction_gradient(whole, of_queries, of_candidates, *everything)
    parts = [
        direction_gradient(block(whole, a, b), of_queries, of_candidates[:, a:b], *everything)
        for a, b in ((0, 15), (15, 90), (90, 100))
    ]
    torch.testing.assert_close(sum(parts), at_once, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_candidates_statistics_are_those_of_the_transposed_matrix(backend) -> None:
    whole = similarity(200, 210, 5, backend)
    options = {"first_query": 0, "pairs": 200, "backend": backend}
    both = merge(statistics(whole, reverse=True), shift=5, **options)
    turned = statistics(whole.transposed(), reverse=False)
    turned = merge(turned, shift=-5, first_query=5, pairs=200, backend=backend)
    torch.testing.assert_close(both.candidate_log_sum, turned.query_log_sum)
    torch.testing.assert_close(both.terms[1], turned.terms[0])
    assert both.candidate_log_sum is not None
    assert both.candidate_log_sum[0].isinf().sum() == 10, "candidates without a positive"


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_kernel_s_statistics_are_the_reference_s(backend) -> None:
    whole = similarity(70, 90, 3, backend)
    dense = torch.nn.functional.normalize(whole.queries[0], dim=1).double()
    dense = dense @ torch.nn.functional.normalize(whole.candidates[0], dim=1).double().T / 0.07
    found = merge(
        statistics(whole, reverse=True), shift=3, first_query=0, pairs=70, backend=backend
    )
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
    found = list(row_blocks(matrix))
    covered = [row for block in found for row in range(block.start, block.stop)]
    assert covered == list(range(5000))
    most = max(block.stop - block.start for block in found)
    assert most * candidates * 2 <= ROW_BLOCK_BYTES or most == 128
