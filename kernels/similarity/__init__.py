"""The two passes over a similarity matrix that is never stored: statistics, and gradients.

Queries rank candidates by `s[q, c] = cosine(query q, candidate c) / temperature`; the partner of
query `q` is candidate `q + shift`. The statistics of a query are the logarithm of its sum of
`exp(s)` over all candidates, its largest similarity to a candidate that is not its partner (its
rival), and the similarity to its partner. The same tiles give the candidates' own statistics over
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
    "SLAB_BYTES",
    "Parts",
    "Similarity",
    "Statistics",
    "direction_gradient",
    "embedding_gradients",
    "inverse_norms",
    "merge",
    "project",
    "slabs",
    "statistics",
]

LARGEST_WIDTH = 2048
SLAB_BYTES = 32 << 20
"""Of the weights that are stored at a time."""


def inverse_norms(x: torch.Tensor, backend: Backend) -> torch.Tensor:
    """1 / norm of each row of (groups, count, width), float32 (float64 for float64).

    At most 1 / SMALLEST_NORM; NaN where the norm overflows, or is not a number.
    """
    if backend == "torch":
        exact = torch.promote_types(x.dtype, torch.float32)
        norm = x.to(exact).norm(dim=-1)
        return norm.clamp(min=SMALLEST_NORM).reciprocal().masked_fill(~norm.isfinite(), torch.nan)
    return launch_inverse_norms(x)


def statistics(similarity: Similarity, *, reverse: bool) -> Parts:
    """Statistics of every query over these candidates.

    Args:
        similarity: the matrix.
        reverse: also those of every candidate over these queries.
    """
    if similarity.backend == "torch":
        return reference.statistics(similarity, reverse)
    return launch_statistics(similarity, reverse)


def merge(
    parts: Parts, *, shift: int, first_query: int, pairs: int, backend: Backend
) -> Statistics:
    """Statistics over all parts, and the loss of each pair.

    Args:
        parts: of the whole other side; join blocks along the dimension of parts.
        shift: of the whole matrix.
        first_query: the first query that has a partner.
        pairs: queries from there on that have one.
        backend: whose arithmetic.
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
    """Gradient of the summed losses with respect to the normalised queries, times temperature.

    Args:
        similarity: the matrix.
        query_log_sum: of the direction in which queries rank; None: it is no part of the loss.
        candidate_log_sum: of the other direction, likewise.
        queries: which of them.
        group: which groups.

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
    """From the gradient of a normalised embedding to that of the embedding.

    Args:
        direction: (groups, count, width) from `direction_gradient`.
        x: (groups, count, width) embeddings.
        inverse: (groups, count) 1 / norm.
        factor: 0-dimensional; multiplies everything.
        out: (groups, count, width) receives the gradient, dtype of `x`.
        alignment: (groups, count) receives `factor * direction . normalised x`, whose sum over
            queries is `-temperature` times the gradient of the temperature.
        backend: whose arithmetic.
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
    """Gradients of the queries and of the candidates, and the queries' alignment (see `project`).

    The workspace is one slab of weights: `SLAB_BYTES`, or 128 queries where those take more. The
    reference stores all weights, but computes them once for both sides.
    """
    if similarity.backend == "torch":
        return reference.embedding_gradients(similarity, query_log_sum, candidate_log_sum, factor)
    queries, alignment = _by_slabs(similarity, query_log_sum, candidate_log_sum, factor)
    turned = similarity.transposed()
    candidates, _ = _by_slabs(turned, candidate_log_sum, query_log_sum, factor)
    return queries, candidates, alignment


def _by_slabs(
    similarity: Similarity,
    query_log_sum: torch.Tensor | None,
    candidate_log_sum: torch.Tensor | None,
    factor: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    groups, count, _ = similarity.queries.shape
    fit = _queries_in_a_slab(similarity)
    together = max(1, fit // count)
    out = torch.empty_like(similarity.queries, memory_format=torch.contiguous_format)
    alignment = torch.empty_like(similarity.query_inverse)
    for first_group in range(0, groups, together):
        group = slice(first_group, first_group + together)
        for slab in slabs(similarity):
            weights = launch_weights(similarity, query_log_sum, candidate_log_sum, slab, group)
            launch_project(
                product(weights, similarity.candidates[group]),
                similarity.queries[group, slab],
                similarity.query_inverse[group, slab],
                factor,
                out[group, slab],
                alignment[group, slab],
            )
    return out, alignment


def slabs(similarity: Similarity) -> Iterator[slice]:
    """The queries in parts whose weights take `SLAB_BYTES`, or 128 queries where that is more."""
    count = similarity.queries.shape[1]
    fit = _queries_in_a_slab(similarity)
    rows = count if fit >= count else max(128, fit // 128 * 128)
    for first in range(0, count, rows):
        yield slice(first, min(first + rows, count))


def _queries_in_a_slab(similarity: Similarity) -> int:
    if similarity.backend == "torch":
        return similarity.queries.shape[1]  # the reference has the whole matrix anyway
    weight_bytes = 4 if similarity.queries.dtype == torch.float32 else 2
    return max(1, SLAB_BYTES // (weight_bytes * similarity.candidates.shape[1]))
