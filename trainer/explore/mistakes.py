"""*Mistakes*: the clips that are found worst by their own sound or picture, and classes that are
taken for others.

Ranks are those of `metrics.retrieval`. Classes are compared by what a search finds first, which
needs no classifier; it is a mistake if that clip has none of the labels of the query.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from cavmae.atomic_write import atomic_write
from cavmae.trainer.metrics.retrieval import Ranking, rankings

DIRECTIONS = ("audio_to_video", "video_to_audio")


@dataclass(frozen=True)
class Mistake:
    """A query whose true partner is not found first.

    Attributes:
        row: of the query, and of its true partner.
        place: of the partner, 1 is best; of a tie the mean of its places.
        score: cosine of the pair.
        found: rows that are found instead, the best first, with their cosines.
    """

    row: int
    place: float
    score: float
    found: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Confusion:
    """A class for which another one is found.

    Attributes:
        label, found: the two classes.
        clips: of `label` for which `found` is found; a clip that is found and has several labels
            counts for each of them in equal parts.
        queries: all clips of `label` that could be judged.
        rows: of such clips, each with what it finds, some.
    """

    label: str
    found: str
    clips: float
    queries: int
    rows: tuple[tuple[int, int], ...]


def kept_rankings(
    audio: np.ndarray, video: np.ndarray, path: Path, report: Callable[[int, int], None]
) -> dict[str, Ranking]:
    """Read rankings from a file, or compute them and write it.

    Args:
        audio, video: (clips, width) float32; row i of one belongs to row i of the other.
        path: the .npy file; its folder is made.
        report: is called with clips done and clips in all.

    Returns:
        As of `rankings`.

    Raises:
        ValueError: the file is damaged, or of other clips.
        OSError: it can't be written.
    """
    if path.exists():
        try:
            kept = torch.from_numpy(np.load(path, allow_pickle=False))
        except (ValueError, TypeError, EOFError, OSError) as error:
            raise ValueError(f"{path} is damaged ({error}); remove it") from error
        if kept.shape != (len(DIRECTIONS), len(fields(Ranking)), len(audio)):
            raise ValueError(f"{path} ranks other clips; remove it")
        return {name: Ranking(*kept[number]) for number, name in enumerate(DIRECTIONS)}
    report(0, len(audio))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    made = rankings(
        *(torch.from_numpy(side).to(device) for side in (audio, video)),
        ranked=lambda clips: report(clips, len(audio)),
    )
    kept = [torch.stack([*asdict(made[name]).values()]) for name in DIRECTIONS]
    path.parent.mkdir(exist_ok=True)
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.save(file, torch.stack(kept).numpy())  # (directions, fields, clips)
    return made


def worst_retrievals(
    queries: torch.Tensor,
    candidates: torch.Tensor,
    ranking: Ranking,
    *,
    count: int = 10,
    found: int = 3,
) -> list[Mistake]:
    """Return the queries whose true partners have the last places, the worst first.

    Args:
        queries: (clips, width) float; row i belongs to row i of `candidates`.
        candidates: (clips, width).
        ranking: of these.
        count: at most; partners that are found first are never among them.
        found: candidates that are named for each.

    Raises:
        ValueError: `ranking` is of other embeddings.
    """
    if not len(queries) == len(candidates) == len(ranking.better):
        raise ValueError(
            f"the ranking is of {len(ranking.better)} clips, and there are {len(queries)} queries "
            f"and {len(candidates)} candidates; rank these"
        )
    places = ranking.places
    rows = places.argsort(descending=True, stable=True)[:count]
    rows = rows[places[rows] > 1]
    unit = F.normalize(queries[rows].double(), dim=1)
    cosines = (unit @ F.normalize(candidates.double(), dim=1).T).float()  # (rows, clips)
    own = cosines.gather(1, rows[:, None])[:, 0]
    others = cosines.scatter(1, rows[:, None], -torch.inf)
    best = others.topk(min(found, len(candidates) - 1), dim=1)
    return [
        Mistake(row, places[row].item(), score, tuple(zip(others, values, strict=True)))
        for row, score, others, values in zip(
            rows.tolist(), own.tolist(), best.indices.tolist(), best.values.tolist(), strict=True
        )
    ]


def most_confused(
    labels: Sequence[Sequence[str]],
    ranking: Ranking,
    *,
    count: int = 10,
    examples: int = 3,
) -> list[Confusion]:
    """Return the pairs of classes with the most clips, the worst first.

    Args:
        labels: of each clip. A query without labels, or that finds a clip without, is not judged;
            one of several labels is judged for each of them.
        ranking: of these clips.
        count: at most.
        examples: rows of each.

    Raises:
        ValueError: `ranking` is of other clips.
    """
    if len(labels) != len(ranking.first):
        raise ValueError(
            f"the ranking is of {len(ranking.first)} clips, and {len(labels)} have labels; rank "
            "these"
        )
    queries: dict[str, int] = {}
    pairs: dict[tuple[str, str], float] = {}
    rows: dict[tuple[str, str], list[tuple[int, int]]] = {}
    firsts: list[int] = ranking.first.tolist()
    for row, first in enumerate(firsts):
        ours, theirs = set(labels[row]), set(labels[first])
        if not theirs:
            continue
        for label in ours:
            queries[label] = queries.get(label, 0) + 1
        if not ours.isdisjoint(theirs):
            continue
        for pair in [(label, other) for label in ours for other in theirs]:
            pairs[pair] = pairs.get(pair, 0.0) + 1 / len(theirs)
            rows.setdefault(pair, []).append((row, first))
    worst = sorted(pairs, key=lambda pair: (-pairs[pair], pair))[:count]
    return [
        Confusion(*pair, pairs[pair], queries[pair[0]], tuple(rows[pair][:examples]))
        for pair in worst
    ]
