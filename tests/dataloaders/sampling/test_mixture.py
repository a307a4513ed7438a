"""Weighted samples, and several sets in one order."""

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cavmae.dataloaders.config import DataConfig
from cavmae.dataloaders.sampling.mixture import BLOCK, MixturePlan, training_plan
from cavmae.dataloaders.sampling.sample_plan import SamplePlan
from cavmae.dataloaders.sampling.step_shares import StepShares
from cavmae.dataloaders.shards.shard_set import ShardSet

SIZES = [30, 50, 20, 40]
COUNT = sum(SIZES)


def places(plan: SamplePlan | MixturePlan, positions: np.ndarray) -> list[tuple[int, int]]:
    return [(planned.shard, planned.sample) for planned in plan.at(positions)]


def number(place: tuple[int, int]) -> int:
    return sum(SIZES[: place[0]]) + place[1]


weightings = st.lists(
    st.one_of(st.just(0.0), st.floats(0.015625, 100, width=32)), min_size=COUNT, max_size=COUNT
).filter(any)


@settings(max_examples=60, deadline=None)
@given(weights=weightings, seed=st.integers(0, 99), epoch=st.integers(0, 3))
def test_a_sample_comes_as_often_as_its_weight_says_give_or_take_one(
    weights: list[float], seed: int, epoch: int
) -> None:
    array = np.array(weights, dtype=np.float32)
    plan = SamplePlan(SIZES, seed, lanes=4, window=25, weights=array)
    drawn = Counter(map(number, places(plan, np.arange(epoch * COUNT, (epoch + 1) * COUNT))))
    expected = array.astype(np.float64) / array.sum(dtype=np.float64) * COUNT
    for sample, times in enumerate(expected):
        assert abs(drawn[sample] - times) < 1 + 1e-6
        assert times or not drawn[sample], "a sample without weight was drawn"


def test_equal_weights_change_nothing() -> None:
    plain = SamplePlan(SIZES, 5, lanes=8, window=25)
    equal = SamplePlan(SIZES, 5, lanes=8, window=25, weights=np.full(COUNT, 0.3, np.float32))
    everything = np.arange(3 * COUNT)
    assert places(plain, everything) == places(equal, everything)


def test_over_epochs_fractions_of_a_weight_come_out_too() -> None:
    weights = np.ones(COUNT, np.float32)
    weights[:70] = 0.25
    plan = SamplePlan(SIZES, 0, lanes=2, window=25, weights=weights)
    drawn = Counter(map(number, places(plan, np.arange(400 * COUNT))))
    expected = weights / weights.sum() * COUNT * 400
    assert max(abs(drawn[sample] / expected[sample] - 1) for sample in range(COUNT)) < 0.2


def test_a_lane_still_reads_one_run_of_the_permuted_shards() -> None:
    """Which shards a lane reads, and the order of their first use, do not cross."""
    weights = np.linspace(0.1, 3, COUNT).astype(np.float32)
    plan = SamplePlan(SIZES, 1, lanes=4, window=10, weights=weights)
    order = plan._epoch(0).shards.tolist()
    runs = [
        [order.index(shard) for shard, _ in places(plan, np.arange(lane, COUNT, 4))]
        for lane in range(4)
    ]
    assert all(max(one) <= min(following) for one, following in pairwise(runs))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (np.ones(3, np.float32), r"shape \(3,\); use \(140,\)"),
        (np.zeros(COUNT, np.float32), "must be finite and 0 or more, and not all 0"),
        (-np.ones(COUNT, np.float32), "must be finite and 0 or more, and not all 0"),
        (np.full(COUNT, np.nan, np.float32), "must be finite and 0 or more, and not all 0"),
    ],
    ids=["too-few", "zeros", "negative", "nan"],
)
def test_weights_that_cannot_be_used_are_refused(weights: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplePlan(SIZES, 0, lanes=4, window=10, weights=weights)


def mixture(weights: tuple[float, ...], lanes: int = 4, seed: int = 0) -> MixturePlan:
    plans = [SamplePlan(sizes, seed, lanes, 20) for sizes in ([25] * 4, [10] * 3, [9])]
    return MixturePlan(plans[: len(weights)], weights)


def set_of(shard: int) -> int:
    return (shard >= 4) + (shard >= 7)


@settings(max_examples=4, deadline=None)
@given(weights=st.lists(st.floats(0.05, 5), min_size=3, max_size=3), seed=st.integers(0, 9))
def test_each_set_has_its_weight_in_every_lane(weights: list[float], seed: int) -> None:
    plan = mixture(tuple(weights), seed=seed)
    for lane in range(4):
        positions = np.arange(lane, 4 * BLOCK * 2, 4)
        found = Counter(set_of(shard) for shard, _ in places(plan, positions))
        for which, weight in enumerate(weights):
            assert abs(found[which] / (2 * BLOCK) - weight / sum(weights)) <= 1 / BLOCK


def test_each_set_keeps_its_epochs() -> None:
    """In the order of its own positions, every sample of a set comes once an epoch."""
    plan = mixture((2, 1, 1))
    planned = plan.at(np.arange(4 * BLOCK))
    for which, (first, count) in enumerate([(0, 100), (4, 30), (7, 9)]):
        epochs: dict[int, Counter] = {}
        for one in planned:
            if set_of(one.shard) == which:
                epochs.setdefault(one.epoch, Counter())[one.shard - first, one.sample] += 1
        whole = [counter for counter in epochs.values() if sum(counter.values()) == count]
        assert len(whole) >= len(epochs) - 8 and all(max(c.values()) == 1 for c in whole)


def test_the_order_is_the_same_for_any_ranks_and_from_any_position() -> None:
    plan = mixture((3, 1), lanes=8)
    whole = plan.at(np.arange(4000))
    for ranks in (1, 2, 3, 8):
        found, shares = {}, StepShares(32, 8, ranks, micro_batch=32)
        for step in range(60, 70):
            for rank in range(ranks):
                positions = step * 32 + shares.offsets(rank)
                planned = mixture((3, 1), lanes=8).at(positions)
                found |= dict(zip(positions.tolist(), planned, strict=True))
        assert found == {position: whole[position] for position in range(60 * 32, 70 * 32)}


def test_a_substitute_comes_from_the_set_of_its_position() -> None:
    plan = mixture((1, 1, 1))
    for position, planned in enumerate(plan.at(np.arange(200))):
        substitute = plan.substitute(position, 0)
        assert set_of(substitute.shard) == set_of(planned.shard)
        assert substitute.epoch == planned.epoch


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 0.0, 1.0), (1.0, -1.0, 1.0), (1.0, 1.0, 1e-9)])
def test_weights_of_a_mixture_that_cannot_be_used_are_refused(weights: tuple[float, ...]) -> None:
    plans = [SamplePlan([10], 0, 2, 5) for _ in range(3)]
    with pytest.raises(ValueError, match="mixture"):
        MixturePlan(plans, weights)


def test_the_configuration_chooses_the_order(packed_synthetic: Path, tmp_path: Path) -> None:
    folder = packed_synthetic / "frames"
    twice = f"{folder}, {folder}"

    def plan(config: DataConfig) -> SamplePlan | MixturePlan:
        return training_plan(config, ShardSet(config.train_folders), 0, 2)

    assert plan(DataConfig(train=twice)).count == 48
    mixed = plan(DataConfig(train=twice, mixture=(1, 3)))
    assert isinstance(mixed, MixturePlan) and mixed.quotas == [250, 750]
    with pytest.raises(ValueError, match=r"weights\.npy does not exist, and data\.sampling is"):
        plan(DataConfig(train=str(_without_weights(folder, tmp_path)), sampling="weighted"))


def _without_weights(folder: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "frames"
    copy.mkdir()
    (copy / "index.json").write_bytes((folder / "index.json").read_bytes())
    return copy


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train": "a,b", "mixture": (1.0,)}, "data.mixture has 1 weights and data.train names 2"),
        ({"train": "a,b", "mixture": (1.0, 0.0)}, "use weights above 0"),
        ({"cache_gigabytes": -1.0}, "data.cache_gigabytes is -1.0"),
    ],
)
def test_bad_fields_are_named(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**fields)
