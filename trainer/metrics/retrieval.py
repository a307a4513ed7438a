"""Retrieval between paired audio and video embeddings: how often the positive ranks first.

Recall and median rank as the published code computes them, with chance level, interval and p-value.

Ties follow the published code, which lists every place that a score equal to the true pair's takes
in the sorted row. A row whose true score is tied t ways with b better scores therefore contributes
the t places b+1 to b+t, and recall is the share of all listed places that are at most k. Embeddings
that are all equal get exactly the recall of chance.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from cavmae.trainer.metrics.estimate import Estimate


@dataclass(frozen=True)
class Recall(Estimate):
    """Recall at one k: the share of queries whose positive is among the first k, with its Wilson
    interval.

    Attributes:
        chance: recall of a random order.
        p_value: probability of at least this many hits by chance (exact binomial, one-sided).
    """

    chance: float
    p_value: float


@dataclass(frozen=True)
class RetrievalScores:
    """Retrieval scores of one direction.

    Attributes:
        queries: number of queries, each with as many candidates.
        r1, r5, r10: recall among the first 1, 5 and 10.
        median_rank: 1 is best.
        chance_median_rank: median rank of a random order.
    """

    queries: int
    r1: Recall
    r5: Recall
    r10: Recall
    median_rank: float
    chance_median_rank: float

    def as_metrics(self) -> dict[str, float]:
        """Return flat numbers for a tracker: `r1`, `r1_low`, ..., `median_rank`, ..."""
        metrics: dict[str, float] = {}
        for name in ("r1", "r5", "r10"):
            metrics |= getattr(self, name).as_metrics(name)
        ranks = {"median_rank": self.median_rank, "chance_median_rank": self.chance_median_rank}
        return metrics | ranks


@dataclass(frozen=True)
class Ranking:
    """What each query of one direction ranks above, beside and instead of its true partner.

    Attributes:
        better: (queries,) int64, candidates with a higher score than the true partner.
        equal: (queries,) int64, candidates with the same score, itself included.
        first: (queries,) int64, the candidate with the highest score; of equal ones the first.
    """

    better: torch.Tensor
    equal: torch.Tensor
    first: torch.Tensor

    @property
    def places(self) -> torch.Tensor:
        """(queries,) float64, place of the true partner, 1 is best; of a tie the mean of its
        places, so that embeddings that are all equal don't look perfect."""
        return self.better + (self.equal + 1) / 2


def retrieval_scores(
    audio: torch.Tensor, video: torch.Tensor, *, chunk: int = 1024
) -> dict[str, RetrievalScores]:
    """Score both directions by cosine similarity.

    Args:
        audio, video, chunk: as of `rankings`.

    Returns:
        `audio_to_video` (each audio clip ranks the videos) and `video_to_audio`.

    Raises:
        ValueError: as of `rankings`.
    """
    ranked = rankings(audio, video, chunk=chunk)
    return {direction: _scores(one.better, one.equal) for direction, one in ranked.items()}


def rankings(
    audio: torch.Tensor,
    video: torch.Tensor,
    *,
    chunk: int = 1024,
    ranked: Callable[[int], object] | None = None,
) -> dict[str, Ranking]:
    """Rank all candidates for all queries by cosine similarity, in both directions.

    The similarity matrix is never held whole. Similarities are computed in float64 and rounded to
    float32, so that equal pairs tie whatever the chunk they are computed in.

    Args:
        audio: (clips, width) any float dtype and device; row i belongs to row i of `video`.
        video: (clips, width) on the same device.
        chunk: rows and columns of the part of the similarity matrix held at a time.
        ranked: is called with the number of sounds that are done, after each chunk of them.

    Returns:
        `audio_to_video` (each audio clip ranks the videos) and `video_to_audio`, on the CPU.

    Raises:
        ValueError: shapes that differ, no clips, or embeddings that are not finite.
    """
    if audio.ndim != 2 or audio.shape != video.shape or len(audio) == 0:
        raise ValueError(
            f"audio and video embeddings have shapes {tuple(audio.shape)} and "
            f"{tuple(video.shape)}; retrieval needs one (clips, width) row a clip in both"
        )
    for name, embeddings in (("audio", audio), ("video", video)):
        bad = (~embeddings.isfinite().all(dim=1)).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"{len(bad)} {name} embeddings are not finite (first rows {bad[:5]}); "
                "look at the clips of these rows or at the weights"
            )
    audio, video = (F.normalize(x.detach().double(), dim=1) for x in (audio, video))
    truth = (audio * video).sum(dim=1).float()  # (clips,)
    better, equal, first = (torch.zeros(2, len(audio), dtype=torch.int64) for _ in range(3))
    highest = torch.full((2, len(audio)), -torch.inf)
    for row in range(0, len(audio), chunk):
        rows = slice(row, row + chunk)
        for column in range(0, len(video), chunk):
            columns = slice(column, column + chunk)
            similarity = (audio[rows] @ video[columns].T).float()  # (audio, video)
            if row == column:
                similarity.diagonal().copy_(truth[rows])
            # Each audio clip against these videos, then each of these videos against them.
            for side, queries, others in ((0, rows, column), (1, columns, row)):
                of_truth = truth[queries].unsqueeze(1 - side)
                better[side, queries] += (similarity > of_truth).sum(dim=1 - side).cpu()
                equal[side, queries] += (similarity == of_truth).sum(dim=1 - side).cpu()
                here, place = (one.cpu() for one in similarity.max(dim=1 - side))
                higher = here > highest[side, queries]
                first[side, queries] = torch.where(higher, place + others, first[side, queries])
                highest[side, queries] = highest[side, queries].maximum(here)
        if ranked is not None:
            ranked(min(row + chunk, len(audio)))
    directions = ("audio_to_video", "video_to_audio")
    return {name: Ranking(better[n], equal[n], first[n]) for n, name in enumerate(directions)}


def similarity_scores(similarity: torch.Tensor) -> RetrievalScores:
    """Score a whole similarity matrix, rows as queries.

    Args:
        similarity: (queries, queries), the true pairs on the diagonal.
    """
    truth = similarity.diagonal()[:, None]
    return _scores((similarity > truth).sum(dim=1).cpu(), (similarity == truth).sum(dim=1).cpu())


def _scores(better: torch.Tensor, equal: torch.Tensor) -> RetrievalScores:
    """Score from how many candidates beat and equal (itself included) each positive."""
    # Not at the top: it takes a second, which the start of a run and `cavmae.load` need not wait.
    from scipy.stats import binom

    queries = len(better)
    # Places 0, 1, ... listed over all queries: +1 where a run of equal scores starts, -1 behind it.
    steps = torch.zeros(queries + 1, dtype=torch.int64)
    steps.index_add_(0, better, torch.ones_like(better))
    steps.index_add_(0, better + equal, -torch.ones_like(better))
    listed_up_to = steps.cumsum(0)[:queries].cumsum(0)  # listed places 0 to i
    total = int(listed_up_to[-1])

    def recall(k: int) -> Recall:
        value = int(listed_up_to[min(k, queries) - 1]) / total
        chance = min(k, queries) / queries
        low, high = wilson_interval(value, queries)
        # With ties `value * queries` need not be whole; rounding down never flatters.
        hits = math.floor(value * queries + 1e-9)
        return Recall(value, low, high, chance, float(binom.sf(hits - 1, queries, chance)))

    # The median of an even count is the mean of its two middle values.
    middle = torch.tensor([(total + 1) // 2, total // 2 + 1])
    places = torch.searchsorted(listed_up_to, middle)  # first place with that many listed
    return RetrievalScores(
        queries=queries,
        r1=recall(1),
        r5=recall(5),
        r10=recall(10),
        median_rank=float(places.double().mean()) + 1,
        chance_median_rank=(queries + 1) / 2,
    )


def wilson_interval(share: float, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Compute the interval of a share (Wilson 1927); 95% by default.

    SciPy's `proportion_ci` takes a whole number of hits, which a recall with ties need not be.
    """
    center = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (center - spread) / scale), min(1.0, (center + spread) / scale)
