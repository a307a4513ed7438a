"""*Mistakes*: the ranks are those that a search shows, and no tie makes a model look better."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cavmae.trainer.explore.mistakes import kept_rankings, most_confused, worst_retrievals
from cavmae.trainer.metrics.retrieval import Ranking, rankings


def found_first(*rows: int) -> Ranking:
    """A ranking in which each query finds one row first."""
    first = torch.tensor(rows)
    return Ranking((first != torch.arange(len(rows))).long(), torch.ones_like(first), first)


def unit(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(x.double(), dim=1)


@given(clips=st.integers(2, 12), seed=st.integers(0, 200), chunk=st.integers(1, 13))
@settings(max_examples=60, deadline=None)
def test_worst_retrievals_are_those_of_the_whole_sorted_matrix(
    clips: int, seed: int, chunk: int
) -> None:
    """Vectors of few values, so that many candidates are equal."""
    generator = torch.Generator().manual_seed(seed)
    sides = torch.randint(-1, 2, (2, clips, 3), generator=generator) + 0.5
    ranking = rankings(*sides, chunk=chunk)
    for direction, (queries, candidates) in (
        ("audio_to_video", sides),
        ("video_to_audio", sides.flip(0)),
    ):
        similarity = (unit(queries) @ unit(candidates).T).float()
        truth = similarity.diagonal()
        places = []
        for row, own in zip(similarity, truth, strict=True):
            tied = (row.sort(descending=True).values == own).nonzero() + 1
            places.append(tied.double().mean().item())
        found = worst_retrievals(queries, candidates, ranking[direction], count=4, found=2)
        expected = sorted((place for place in places if place > 1), reverse=True)[:4]
        assert [one.place for one in found] == expected
        for one in found:
            assert one.place == places[one.row]
            assert one.score == pytest.approx(truth[one.row].item(), abs=1e-6)
            others = similarity[one.row].scatter(0, torch.tensor(one.row), -2.0)
            best = others.sort(descending=True).values[: min(2, clips - 1)]
            assert [score for _, score in one.found] == pytest.approx(best.tolist(), abs=1e-6)
            assert one.row not in [row for row, _ in one.found]
        assert torch.equal(
            ranking[direction].first,
            torch.stack([row.argmax() for row in similarity]),
        )


@pytest.mark.field  # big-ann-benchmarks#74, BERT4Rec-VAE-Pytorch#13
def test_a_collapsed_model_has_the_places_of_chance() -> None:
    same = torch.ones(9, 4)
    ranking = rankings(same, same, chunk=4)["audio_to_video"]
    assert [one.place for one in worst_retrievals(same, same, ranking, count=20)] == [5.0] * 9


def test_a_perfect_model_makes_no_mistakes() -> None:
    vectors = torch.eye(6)
    ranking = rankings(vectors, vectors)["video_to_audio"]
    assert worst_retrievals(vectors, vectors, ranking) == []
    assert most_confused([(str(row),) for row in range(6)], ranking) == []


def test_progress_counts_every_sound() -> None:
    counted: list[int] = []
    rankings(*torch.randn(2, 10, 4), chunk=4, ranked=counted.append)
    assert counted == [4, 8, 10]


def test_rankings_are_computed_once_and_kept(tmp_path: Path) -> None:
    audio, video = np.random.default_rng(0).standard_normal((2, 10, 4)).astype(np.float32)
    path, reports = tmp_path / "index" / "ranks.npy", []
    made, again = [
        kept_rankings(audio, video, path, lambda *so_far: reports.append(so_far)) for _ in "12"
    ]
    assert reports == [(0, 10), (10, 10)]
    for direction, ranking in made.items():
        for name, values in vars(ranking).items():
            assert torch.equal(values, getattr(again[direction], name))
    with pytest.raises(ValueError, match="ranks other clips; remove it"):
        kept_rankings(audio[:9], video[:9], path, lambda *_: None)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"ranks\.npy is damaged .*; remove it"):
        kept_rankings(audio, video, path, lambda *_: None)


def test_confused_classes_are_counted_with_their_clips_and_examples() -> None:
    labels = [("dog",), ("dog",), ("dog",), ("cat",), ("bell",)]
    (first, second) = most_confused(labels, found_first(3, 3, 2, 4, 4))
    assert (first.label, first.found, first.clips, first.queries) == ("dog", "cat", 2, 3)
    assert first.rows == ((0, 3), (1, 3))
    assert (second.label, second.found, second.clips, second.queries) == ("cat", "bell", 1, 1)


def test_another_clip_of_the_same_class_is_no_mistake() -> None:
    assert most_confused([("dog",), ("dog",)], found_first(1, 0)) == []


@pytest.mark.field  # scikit-learn#4126, mulan#19: sums of a confusion of several labels
def test_of_several_labels_one_in_common_is_right_and_parts_add_up_to_clips() -> None:
    labels = [("dog", "speech"), ("speech", "rain"), ("bell", "rain"), ("dog", "dog"), ()]
    found = most_confused(labels, found_first(1, 2, 0, 2, 0))
    # Clip 0 shares speech with clip 1, clip 1 rain with clip 2; clips 2 and 3 share nothing.
    assert {(one.label, one.found, one.clips) for one in found} == {
        ("bell", "dog", 0.5),
        ("bell", "speech", 0.5),
        ("rain", "dog", 0.5),
        ("rain", "speech", 0.5),
        ("dog", "bell", 0.5),
        ("dog", "rain", 0.5),
    }
    by_label = {one.label: one.queries for one in found}
    assert by_label == {"bell": 1, "rain": 2, "dog": 2}, "a clip without labels is not judged"


def test_a_clip_that_finds_one_without_labels_is_not_judged() -> None:
    assert most_confused([("dog",), ()], found_first(1, 1)) == []


def test_a_ranking_of_other_clips_is_refused() -> None:
    ranking = rankings(*torch.randn(2, 5, 4))["audio_to_video"]
    with pytest.raises(ValueError, match="ranking is of 5 clips, and there are 4 queries"):
        worst_retrievals(torch.ones(4, 4), torch.ones(4, 4), ranking)
    with pytest.raises(ValueError, match="ranking is of 5 clips, and 2 have labels"):
        most_confused([(), ()], ranking)
