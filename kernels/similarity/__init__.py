"""The two passes over a similarity matrix that is never stored: statistics, and gradients.

Queries rank candidates by `s[q, c] = cosine(query q, candidate c) / temperature`; the positive of
query `q` is candidate `q + shift`. The statistics of a query are the logarithm of its sum of
`exp(s)` over all candidates, its largest similarity to a negative (the hardest
one), and the similarity to its positive. The same tiles give the candidates' own statistics over
the queries, so both directions cost one matrix product.

Nothing here knows of losses, ranks or autograd: `contrastive.py` and a distributed caller put these
parts together. Statistics of several blocks of candidates are merged by `merge`, gradients are
sums over blocks, so the candidates may come from other processes one block after the other.
"""

from collections.abc import Iterator

import torch

from cavmae.kernels.backend import Backend
from cavmae.kernels.similarity import reference
from cavmae.kernels.similarity.gradient import launch_project, launch_weights, product
from cavmae.kernels.similarity.matrix import (
    SMALLEST_NORM,
    Parts,
    Similarity,
    Statistics,
)
from cavmae.kernels.similarity.tile_statistics import (
    launch_inverse_norms,
    launch_merge,
    launch_statistics,
)

__all__ = [
    "LARGEST_WIDTH",
    "ROW_BLOCK_BYTES",
    "Parts",
    "Similarity",
    "Statistics",
    "direction_gradient",
    "embedding_gradients",
    "inverse_norms",
    "merge",
    "project",
    "row_blocks",
    "statistics",
]

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


def statistics(similarity: Similarity, *, reverse: bool) -> Parts:
    """Compute the statistics of every query over these candidates.

    Args:
        similarity: the matrix.
        reverse: compute those of every candidate over these queries too.
    """
    if similarity.backend == "torch":
        return reference.statistics(similarity, reverse)
    return launch_statistics(similarity, reverse)


def merge(
    parts: Parts, *, shift: int, first_query: int, pairs: int, backend: Backend
) -> Statistics:
    """Merge statistics over all parts, and compute the loss of each pair.

    Args:
        parts: parts of the whole other side; join blocks along the dimension of parts.
        shift: shift of the whole matrix.
        first_query: the first query that has a positive.
        pairs: queries from there on that have one.
        backend: the implementation.
    """
    if backend == "torch":
        return reference.merge(parts, shift, first_query, pairs)
    return launch_merge(parts, shift, first_query, pairs)


def direction_gradient(
    similarity: Similarity,
    query_log_sum: torch.Tensor | None,
    candidate_log_sum: torch.Tensor | None,
    queries: slice,
    group: slice,
) -> torch.Tensor:
    """Compute the gradient of the summed losses by the normalised queries, times temperature.

    Args:
        similarity: the matrix.
        query_log_sum: statistics of the direction in which queries rank; None: it is no part of the
            loss.
        candidate_log_sum: statistics of the other direction, likewise.
        queries: slice of queries.
        group: slice of groups.

    Returns:
        (groups, queries, width) float32 (float64 for float64) of the slices.
    """
    if similarity.backend == "torch":
        weights = reference.weights(similarity, query_log_sum, candidate_log_sum)
        return weights[group, queries] @ similarity.units[1][group]
    weights = launch_weights(similarity, query_log_sum, candidate_log_sum, queries, group)
    return product(weights, similarity.candidates[group])


def project(
    direction: torch.Tensor,
    x: torch.Tensor,
    inverse: torch.Tensor,
    factor: torch.Tensor,
    out: torch.Tensor,
    alignment: torch.Tensor,
    backend: Backend,
) -> None:
    """Turn the gradient by a normalised embedding into that by the embedding.

    Args:
        direction: (groups, count, width) from `direction_gradient`.
        x: (groups, count, width) embeddings.
        inverse: (groups, count) 1 / norm.
        factor: 0-dimensional; multiplies everything.
        out: (groups, count, width) receives the gradient, dtype of `x`.
        alignment: (groups, count) receives `factor * direction . normalised x`, whose sum over
            queries is `-temperature` times the gradient of the temperature.
        backend: the implementation.
    """
    if backend == "torch":
        unit = x.to(direction.dtype) * inverse[..., None]
        gradient, aligned = reference.project(direction, unit, inverse, factor)
        out.copy_(gradient)
        alignment.copy_(aligned)
        return
    launch_project(direction, x, inverse, factor, out, alignment)


def embedding_gradients(
    similarity: Similarity,
    query_log_sum: torch.Tensor,
    candidate_log_sum: torch.Tensor | None,
    factor: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute gradients of queries and candidates, and the queries' alignment (see `project`).

    The workspace is the weights of one row block: `ROW_BLOCK_BYTES`, or 128 queries where those
    take more. The reference stores all weights, but computes them once for both sides.
    """
    if similarity.backend == "torch":
        return reference.embedding_gradients(similarity, query_log_sum, candidate_log_sum, factor)
    queries, alignment = _by_row_blocks(similarity, query_log_sum, candidate_log_sum, factor)
    turned = similarity.transposed()
    candidates, _ = _by_row_blocks(turned, candidate_log_sum, query_log_sum, factor)
    return queries, candidates, alignment


def _by_row_blocks(
    similarity: Similarity,
    query_log_sum: torch.Tensor | None,
    candidate_log_sum: torch.Tensor | None,
    factor: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    groups, count, _ = similarity.queries.shape
    fit = _queries_per_block(similarity)
    together = max(1, fit // count)
    out = torch.empty_like(similarity.queries, memory_format=torch.contiguous_format)
    alignment = torch.empty_like(similarity.query_inverse)
    for first_group in range(0, groups, together):
        group = slice(first_group, first_group + together)
        for block in row_blocks(similarity):
            weights = launch_weights(similarity, query_log_sum, candidate_log_sum, block, group)
            launch_project(
                product(weights, similarity.candidates[group]),
                similarity.queries[group, block],
                similarity.query_inverse[group, block],
                factor,
                out[group, block],
                alignment[group, block],
            )
    return out, alignment


def row_blocks(similarity: Similarity) -> Iterator[slice]:
    """Yield blocks of queries whose weights take `ROW_BLOCK_BYTES`, or 128 queries if more."""
    count = similarity.queries.shape[1]
    fit = _queries_per_block(similarity)
    rows = count if fit >= count else max(128, fit // 128 * 128)
    for first in range(0, count, rows):
        yield slice(first, min(first + rows, count))


def _queries_per_block(similarity: Similarity) -> int:
    if similarity.backend == "torch":
        return similarity.queries.shape[1]  # the reference stores the whole matrix anyway
    weight_bytes = 4 if similarity.queries.dtype == torch.float32 else 2
    return max(1, ROW_BLOCK_BYTES // (weight_bytes * similarity.candidates.shape[1]))
