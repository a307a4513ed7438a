"""The torch reference: the whole matrix at once, in float32 or float64."""

import torch

from cavmae.kernels.similarity.matrix import LARGEST_INVERSE, Parts, Similarity, Statistics


def _positives(matrix: torch.Tensor, shift: int) -> torch.Tensor:
    """(groups, pairs) view of the entries of queries and their positives."""
    return matrix.diagonal(shift, 1, 2)


def statistics(similarity: Similarity, reverse: bool) -> Parts:
    """Compute `statistics` from the dense matrix."""
    dense, shift = similarity.dense, similarity.shift
    negatives = dense.clone()
    _positives(negatives, shift).fill_(-torch.inf)
    positive = torch.full_like(dense[:, :, 0], -torch.inf)
    first, pairs = max(0, -shift), _positives(dense, shift).shape[1]
    positive[:, first : first + pairs] = _positives(dense, shift)
    query = torch.stack([dense.logsumexp(2), negatives.amax(2), positive])[:, None]
    if not reverse:
        return Parts(query, None)
    return Parts(query, torch.stack([dense.logsumexp(1), negatives.amax(1)])[:, None])


def merge(parts: Parts, shift: int, first_query: int, pairs: int) -> Statistics:
    """Merge parts in torch."""

    def direction(log_sum: torch.Tensor, hardest: torch.Tensor, first: int) -> torch.Tensor:
        """(2, groups * pairs) loss and hit of each pair, and +inf where there is no pair."""
        paired = slice(first, first + pairs)
        loss, hit = log_sum[:, paired] - positive, positive > hardest[:, paired]
        log_sum[:, :first] = log_sum[:, first + pairs :] = torch.inf
        return torch.stack([loss.flatten(), hit.to(loss.dtype).flatten()])

    def total(log_sums: torch.Tensor) -> torch.Tensor:
        return log_sums[0] if len(log_sums) == 1 else log_sums.logsumexp(0)

    query_log_sum, hardest = total(parts.query[0]), parts.query[1].amax(0)
    positive = parts.query[2].amax(0)[:, first_query : first_query + pairs]
    terms = [direction(query_log_sum, hardest, first_query)]
    candidate_log_sum = None
    if parts.candidate is not None:
        candidate_log_sum = total(parts.candidate[0])
        candidate_hardest = parts.candidate[1].amax(0)
        terms.append(direction(candidate_log_sum, candidate_hardest, first_query + shift))
    return Statistics(query_log_sum, candidate_log_sum, torch.stack(terms))


def weights(
    similarity: Similarity,
    query_log_sum: torch.Tensor | None,
    candidate_log_sum: torch.Tensor | None,
) -> torch.Tensor:
    """(groups, queries, candidates) `dL/ds`."""
    total = torch.zeros_like(similarity.dense)
    for log_sum in (
        None if query_log_sum is None else query_log_sum[..., None],
        None if candidate_log_sum is None else candidate_log_sum[:, None],
    ):
        if log_sum is not None:
            total += (similarity.dense - log_sum).exp_()
            _positives(total, similarity.shift).sub_(1)
    return total


def project(
    direction: torch.Tensor, unit: torch.Tensor, inverse: torch.Tensor, factor: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of the embeddings and their alignment; arguments as `project` of the package,
    `unit` being the normalised embeddings."""
    aligned = (direction * unit).sum(-1)
    along = aligned.masked_fill(inverse > LARGEST_INVERSE, 0)
    gradient = (direction - unit * along[..., None]) * (inverse * factor)[..., None]
    return gradient, aligned * factor


def embedding_gradients(
    similarity: Similarity,
    query_log_sum: torch.Tensor,
    candidate_log_sum: torch.Tensor | None,
    factor: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute `embedding_gradients` from the dense matrix."""
    weight = weights(similarity, query_log_sum, candidate_log_sum)
    queries, candidates = similarity.units
    of_queries, alignment = project(weight @ candidates, queries, similarity.query_inverse, factor)
    of_candidates, _ = project(
        weight.transpose(1, 2) @ queries, candidates, similarity.candidate_inverse, factor
    )
    dtype = similarity.queries.dtype
    return of_queries.to(dtype), of_candidates.to(dtype), alignment
