"""Retrieval scores: recall and median rank with ties, chance, intervals and p-values."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cavmae.trainer.metrics import retrieval
from cavmae.trainer.metrics.retrieval import retrieval_scores, similarity_scores, wilson_interval


def embeddings(clips: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    audio = torch.randn(clips, 16, generator=generator)
    return audio, audio + 1.5 * torch.randn(clips, 16, generator=generator)


def listed_places(similarity: np.ndarray) -> np.ndarray:
    """Every place that a score equal to the true pair's takes in the sorted row."""
    ordered = -np.sort(-similarity, axis=1)
    return np.nonzero(ordered == np.diag(similarity)[:, None])[1]


@given(size=st.integers(1, 12), levels=st.integers(1, 4), seed=st.integers(0, 100))
@settings(max_examples=60, deadline=None)
def test_scores_count_every_place_of_a_tied_true_pair(size: int, levels: int, seed: int) -> None:
    similarity = np.random.default_rng(seed).integers(levels, size=(size, size)).astype(np.float32)
    places = listed_places(similarity)
    scores = similarity_scores(torch.from_numpy(similarity))
    for k, recall in ((1, scores.r1), (5, scores.r5), (10, scores.r10)):
        assert recall.value == pytest.approx((places < k).mean())
    assert scores.median_rank == np.median(places) + 1


def test_paired_embeddings_rank_first() -> None:
    audio, _ = embeddings(40)
    scores = retrieval_scores(audio, 3 * audio)
    for direction in scores.values():
        assert (direction.r1.value, direction.median_rank) == (1.0, 1.0)
        assert direction.r1.p_value < 1e-60


def test_directions_swap_with_the_arguments() -> None:
    audio, video = embeddings(30)
    forward, swapped = retrieval_scores(audio, video), retrieval_scores(video, audio)
    assert forward["audio_to_video"] == swapped["video_to_audio"]
    assert forward["video_to_audio"] == swapped["audio_to_video"]
    assert forward["audio_to_video"] != forward["video_to_audio"]


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_scores_do_not_depend_on_the_chunk_even_with_duplicates(chunk: int) -> None:
    audio, video = embeddings(150)
    video[30:60] = video[:30]  # tied candidates in other chunks
    assert retrieval_scores(audio, video, chunk=chunk) == retrieval_scores(audio, video)


def test_blocks_of_a_large_matrix_score_as_the_whole_matrix_does() -> None:
    audio, video = embeddings(3000)
    video[1000:1500] = video[:500]  # ties across blocks
    scores = retrieval_scores(audio, video, chunk=256)
    units = [torch.nn.functional.normalize(x.double(), dim=1) for x in (audio, video)]
    whole = (units[0] @ units[1].T).float()
    assert scores["audio_to_video"] == similarity_scores(whole)
    assert scores["video_to_audio"] == similarity_scores(whole.T)


def test_scores_do_not_depend_on_the_order_of_the_clips() -> None:
    audio, video = embeddings(100)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(1))
    assert retrieval_scores(audio[order], video[order]) == retrieval_scores(audio, video)


def test_collapsed_embeddings_score_exactly_chance() -> None:
    same = torch.ones(50, 8)
    for scores in retrieval_scores(same, same).values():
        assert (scores.r1.value, scores.r10.value) == (1 / 50, 10 / 50)
        assert scores.median_rank == scores.chance_median_rank == 25.5
        assert scores.r1.p_value > 0.5


def test_recall_beyond_the_number_of_clips_is_certain() -> None:
    audio, video = embeddings(3)
    recall = retrieval_scores(audio, video)["audio_to_video"].r5
    assert (recall.value, recall.chance, recall.p_value) == (1.0, 1.0, 1.0)


def test_unrelated_embeddings_are_within_chance() -> None:
    generator = torch.Generator().manual_seed(3)
    audio, video = (torch.randn(400, 16, generator=generator) for _ in range(2))
    for scores in retrieval_scores(audio, video).values():
        assert scores.r10.low <= scores.r10.chance <= scores.r10.high
        assert scores.r10.p_value > 0.01


@pytest.mark.parametrize("hits, clips", [(0, 5), (1, 5), (3, 20), (10, 10)])
def test_p_values_are_exact_binomial_tails(hits: int, clips: int) -> None:
    similarity = 1 - torch.eye(clips)
    similarity[:hits] = torch.eye(clips)[:hits]
    scores = similarity_scores(similarity)
    for k, recall in ((1, scores.r1), (5, scores.r5)):
        chance = min(k, clips) / clips
        expected = sum(
            math.comb(clips, n) * chance**n * (1 - chance) ** (clips - n)
            for n in range(round(recall.value * clips), clips + 1)
        )
        assert recall.p_value == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("hits, digits", [(1, -math.log10(1 - math.exp(-1))), (100, 158.5)])
def test_p_values_of_many_clips_neither_overflow_nor_vanish(hits: int, digits: float) -> None:
    better = torch.full((20_000,), 19_999)
    better[:hits] = 0
    recall = retrieval._scores(better, torch.ones_like(better)).r1
    assert -math.log10(recall.p_value) == pytest.approx(digits, abs=0.01)


def test_interval_is_wilsons() -> None:
    # Newcombe (1998), table I: 81 of 263 and 0 of 20.
    assert wilson_interval(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson_interval(0.0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)


def test_metrics_are_flat_numbers() -> None:
    metrics = retrieval_scores(*embeddings(20))["audio_to_video"].as_metrics()
    assert {"r1", "r1_low", "r1_high", "r5_chance", "r10_p_value", "median_rank"} <= metrics.keys()
    assert all(isinstance(value, float) for value in metrics.values())


def test_embeddings_that_are_not_finite_are_refused_by_row() -> None:
    audio, video = embeddings(10)
    video[4, 2] = float("nan")
    with pytest.raises(ValueError, match=r"1 video embeddings are not finite \(first rows \[4\]\)"):
        retrieval_scores(audio, video)


@pytest.mark.parametrize("shapes", [((3, 4), (4, 4)), ((0, 4), (0, 4)), ((4,), (4,))])
def test_embeddings_without_one_row_a_clip_are_refused(
    shapes: tuple[tuple[int, ...], tuple[int, ...]],
) -> None:
    with pytest.raises(ValueError, match="one \\(clips, width\\) row a clip"):
        retrieval_scores(torch.ones(shapes[0]), torch.ones(shapes[1]))
