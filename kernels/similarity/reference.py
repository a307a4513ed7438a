"""The torch reference: the whole matrix at once, in float32 or float64."""

import torch

from cavmae.kernels.similarity.matrix import LARGEST_INVERSE, Similarity, Statistics


def _positives(matrix: torch.Tensor, shift: int) -> torch.Tensor:
    """(groups, pairs) view of the entries of queries and their positives."""
    return matrix.diagonal(shift, 1, 2)


def statistics(similarity: Similarity, reverse: bool) -> Statistics:
    """Compute `statistics` from the dense matrix."""
    dense, shift, paired = similarity.dense, similarity.shift, similarity.paired
    positive = _positives(dense, shift)
    negatives = dense.clone()
    _positives(negatives, shift).fill_(-torch.inf)

    def direction(others: int, paired: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Log of the sum over dimension `others`, +inf where there is no pair; and
        (2, groups * pairs) loss and hit of each pair."""
        log_sum, hardest = dense.logsumexp(others), negatives.amax(others)
        loss, hit = log_sum[:, paired] - positive, positive > hardest[:, paired]
        log_sum[:, : paired.start] = log_sum[:, paired.stop :] = torch.inf
        return log_sum, torch.stack([loss.flatten(), hit.to(loss.dtype).flatten()])

    query_log_sum, terms = direction(2, paired)
    if not reverse:
        return Statistics(query_log_sum, None, terms[None])
    positives = slice(paired.start + shift, paired.stop + shift)
    candidate_log_sum, reverse_terms = direction(1, positives)
    return Statistics(query_log_sum, candidate_log_sum, torch.stack([terms, reverse_terms]))


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
    """Turn the gradient by normalised embeddings, `unit`, into that by the embeddings; also returns
    their alignment (see `query_gradients`)."""
    aligned = (direction * unit).sum(-1)
    along = aligned.masked_fill(inverse > LARGEST_INVERSE, 0)
    gradient = (direction - unit * along[..., None]) * (inverse * factor)[..., None]
    return gradient, aligned * factor


def query_gradients(
    similarity: Similarity,
    query_log_sum: torch.Tensor | None,
    candidate_log_sum: torch.Tensor | None,
    factor: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `query_gradients` from the dense matrix."""
    direction = weights(similarity, query_log_sum, candidate_log_sum) @ similarity.units[1]
    gradient, alignment = project(direction, similarity.units[0], similarity.query_inverse, factor)
    return gradient.to(similarity.queries.dtype), alignment


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
