"""A similarity matrix by its factors, and what is known of it without storing it."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from cavmae.kernels.backend import Backend

SMALLEST_NORM = 1e-12
"""Shorter embeddings are divided by this, as `torch.nn.functional.normalize` does."""
LARGEST_INVERSE = (1 - 1e-6) / SMALLEST_NORM
"""Above it an embedding was divided by a constant, whose gradient has no part along it."""


@dataclass(frozen=True)
class Similarity:
    """A similarity matrix by its factors.

    Attributes:
        queries: (groups, queries, width), last dimension contiguous.
        candidates: (groups, candidates, width), same dtype.
        query_inverse, candidate_inverse: (groups, count) 1 / norm, from `inverse_norms`.
        inverse_temperature: 0-dimensional tensor.
        shift: the positive of query q is candidate q + shift, where there is one.
        backend: whose arithmetic.
    """

    queries: torch.Tensor
    candidates: torch.Tensor
    query_inverse: torch.Tensor
    candidate_inverse: torch.Tensor
    inverse_temperature: torch.Tensor
    shift: int
    backend: Backend

    @cached_property
    def dense(self) -> torch.Tensor:
        """(groups, queries, candidates) float32 or float64: for the torch reference, which keeps it
        from the forward to the backward pass."""
        queries, candidates = self.units
        return queries @ (candidates * self.inverse_temperature).transpose(1, 2)

    @cached_property
    def units(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised queries and candidates, likewise."""
        exact = self.query_inverse.dtype
        queries = self.queries.to(exact) * self.query_inverse[..., None]
        return queries, self.candidates.to(exact) * self.candidate_inverse[..., None]

    @property
    def paired(self) -> slice:
        """The queries that have a positive."""
        queries, candidates = self.queries.shape[1], self.candidates.shape[1]
        return slice(max(0, -self.shift), min(queries, candidates - self.shift))

    def transposed(self) -> "Similarity":
        """Candidates rank the queries."""
        return replace(
            self,
            queries=self.candidates,
            candidates=self.queries,
            query_inverse=self.candidate_inverse,
            candidate_inverse=self.query_inverse,
            shift=-self.shift,
        )


@dataclass(frozen=True)
class Statistics:
    """What both directions of a loss need of the matrix; natural logarithms.

    Attributes:
        query_log_sum: (groups, queries); +inf where a query has no positive, hence no loss.
        candidate_log_sum: (groups, candidates) likewise, or None.
        terms: (directions, 2, groups * pairs): loss of each pair, and 1 where its similarity is
            larger than that of every negative. Direction 0: queries rank candidates.
    """

    query_log_sum: torch.Tensor
    candidate_log_sum: torch.Tensor | None
    terms: torch.Tensor
