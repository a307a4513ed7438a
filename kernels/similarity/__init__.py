"""The two passes over a similarity matrix that is never stored: statistics, and gradients.

Queries rank candidates by `s[q, c] = cosine(query q, candidate c) / temperature`; the positive of
query `q` is candidate `q + shift`. The statistics of a query are the logarithm of its sum of
`exp(s)` over all candidates, its largest similarity to a negative (the hardest
one), and the similarity to its positive. The same tiles give the candidates' own statistics over
the queries, so both directions cost one matrix product.

Nothing here knows of losses, ranks or autograd: `contrastive.py` and a distributed caller, whose
candidates are gathered from all ranks, put these parts together.
"""

from collections.abc import Iterator

import torch

from cavmae.kernels.backend import Backend
from cavmae.kernels.similarity import reference
from cavmae.kernels.similarity.gradient import launch_project, launch_weights, product
from cavmae.kernels.similarity.matrix import SMALLEST_NORM, Similarity, Statistics
from cavmae.kernels.similarity.tile_statistics import launch_inverse_norms, launch_statistics

LARGEST_WIDTH = 2048
ROW_BLOCK_BYTES = 32 << 20
"""Memory for the weights that are stored at a time."""


def inverse_norms(x: torch.Tensor, backend: Backend) -> torch.Tensor:
    """Return 1 / norm of each row of (groups, count, width), float32 (float64 for float64).

    At most 1 / SMALLEST_NORM; NaN where the norm overflows, or is not a number.
    """
    if backend == "torch":
        exact = torch.promote_types(x.dtype, torch.float32)
        norm = x.to(exact).norm(dim=-1)
        return norm.clamp(min=SMALLEST_NORM).reciprocal().masked_fill(~norm.isfinite(), torch.nan)
    return launch_inverse_norms(x)


def statistics(similarity: Similarity, *, reverse: bool) -> Statistics:
    """Compute the statistics of every query over the candidates, and the loss of each pair.

    Args:
        similarity: the matrix.
        reverse: compute those of every candidate over the queries too.
    """
    if similarity.backend == "torch":
        return reference.statistics(similarity, reverse)
    return launch_statistics(similarity, reverse)


def query_gradients(
    similarity: Similarity,
    query_log_sum: torch.Tensor | None,
    candidate_log_sum: torch.Tensor | None,
    factor: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the gradient of the summed losses by the queries.

    The workspace is the weights of one row block: `ROW_BLOCK_BYTES`, or 128 queries where those
    take more. The reference stores all weights.

    Args:
        similarity: the matrix.
        query_log_sum: statistics of the direction in which queries rank; None: it is no part of the
            loss.
        candidate_log_sum: statistics of the other direction, likewise.
        factor: 0-dimensional; multiplies everything.

    Returns:
        The gradients (groups, queries, width), dtype of the queries; and (groups, queries) float32
        (float64 for float64) the products of each normalised query with the gradient by it, whose
        sum is `-temperature` times the gradient of the temperature.
    """
    if similarity.backend == "torch":
        return reference.query_gradients(similarity, query_log_sum, candidate_log_sum, factor)
    gradients = torch.empty_like(similarity.queries, memory_format=torch.contiguous_format)
    alignment = torch.empty_like(similarity.query_inverse)
    for group, block in row_blocks(similarity):
        weights = launch_weights(similarity, query_log_sum, candidate_log_sum, block, group)
        launch_project(
            product(weights, similarity.candidates[group]),
            similarity.queries[group, block],
            similarity.query_inverse[group, block],
            factor,
            gradients[group, block],
            alignment[group, block],
        )
    return gradients, alignment


def embedding_gradients(
    similarity: Similarity,
    query_log_sum: torch.Tensor,
    candidate_log_sum: torch.Tensor | None,
    factor: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the gradients of queries and candidates, and the queries' alignment, as
    `query_gradients` does; the reference computes the weights once for both sides."""
    if similarity.backend == "torch":
        return reference.embedding_gradients(similarity, query_log_sum, candidate_log_sum, factor)
    queries, alignment = query_gradients(similarity, query_log_sum, candidate_log_sum, factor)
    turned = similarity.transposed()
    candidates, _ = query_gradients(turned, candidate_log_sum, query_log_sum, factor)
    return queries, candidates, alignment


def row_blocks(similarity: Similarity) -> Iterator[tuple[slice, slice]]:
    """Yield blocks of groups and queries whose weights take `ROW_BLOCK_BYTES`, or 128 queries if
    more."""
    groups, count, _ = similarity.queries.shape
    weight_bytes = 4 if similarity.queries.dtype == torch.float32 else 2
    fit = max(1, ROW_BLOCK_BYTES // (weight_bytes * similarity.candidates.shape[1]))
    together = max(1, fit // count)
    rows = count if fit >= count else max(128, fit // 128 * 128)
    for first_group in range(0, groups, together):
        for first in range(0, count, rows):
            yield (
                slice(first_group, first_group + together),
                slice(first, min(first + rows, count)),
            )
