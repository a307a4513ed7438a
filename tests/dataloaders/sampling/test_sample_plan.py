"""The order of samples: every sample once an epoch, the same for all ranks, at any position."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cavmae.dataloaders.sampling.sample_plan import (
    PlannedSample,
    SamplePlan,
    default_lanes,
)

plans = st.builds(
    lambda sizes, seed, lanes, window: SamplePlan(
        sizes, seed, min(lanes, max(sum(sizes), 1)), window
    ),
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    seed=st.integers(0, 2**32 - 1),
    lanes=st.integers(1, 16),
    window=st.integers(1, 50),
)


def places(samples: list[PlannedSample]) -> list[tuple[int, int]]:
    return [(sample.shard, sample.sample) for sample in samples]


@settings(max_examples=60, deadline=None)
@given(plan=plans, epoch=st.integers(0, 5))
def test_each_epoch_has_every_sample_once(plan: SamplePlan, epoch: int) -> None:
    samples = plan.samples(epoch * plan.count, plan.count)
    everything = [
        (shard, sample) for shard, size in enumerate(plan.sizes.tolist()) for sample in range(size)
    ]
    assert sorted(places(samples)) == everything
    assert {sample.epoch for sample in samples} == {epoch}


@settings(max_examples=40, deadline=None)
@given(plan=plans, start=st.integers(0, 300), count=st.integers(0, 300))
def test_any_start_gives_a_slice_of_the_whole_order(
    plan: SamplePlan, start: int, count: int
) -> None:
    whole = plan.samples(0, start + count)
    fresh = SamplePlan(plan.sizes.tolist(), plan.seed, plan.lanes, plan.window)
    assert fresh.samples(start, count) == whole[start:]
    assert all(
        fresh.samples(start + place, 1)[0] == sample for place, sample in enumerate(whole[start:])
    )


@settings(max_examples=40, deadline=None)
@given(plan=plans, epoch=st.integers(0, 3))
def test_each_lane_reads_one_run_of_the_permuted_shards(plan: SamplePlan, epoch: int) -> None:
    samples = places(plan.samples(epoch * plan.count, plan.count))
    lane_of = {
        place: (epoch * plan.count + number) % plan.lanes for number, place in enumerate(samples)
    }
    # Shards in the order of their first use by the lowest lane are the permuted shards; laid end
    # to end, the lanes must come in blocks.
    lanes_of_shard = [
        [lane_of[shard, sample] for sample in range(size)]
        for shard, size in enumerate(plan.sizes.tolist())
    ]
    for lanes in lanes_of_shard:
        assert lanes == sorted(lanes), "a lane's part of a shard is not contiguous"
    shared = Counter(lane for lanes in lanes_of_shard for lane in set(lanes))
    cuts = sum(shared.values()) - len(lanes_of_shard)
    assert cuts <= plan.lanes - 1, "more shards are shared than there are cuts"


def test_nodes_fetch_hardly_more_than_the_set_in_an_epoch() -> None:
    """What is fetched twice is at most a shard per cut between ranks."""
    plan = SamplePlan([100] * 400, seed=3, lanes=64, window=4096)
    world_size = 8
    fetched = 0
    for rank in range(world_size):
        lanes = range(rank * 8, rank * 8 + 8)
        positions = np.concatenate([np.arange(lane, plan.count, 64) for lane in lanes])
        fetched += len({sample.shard for sample in plan.at(positions)})
    assert fetched <= 1.05 * 400


def test_epochs_seeds_and_the_samples_within_a_shard_are_shuffled() -> None:
    plan = SamplePlan([50, 50, 50], seed=1, lanes=2, window=30)
    first, second = places(plan.samples(0, 150)), places(plan.samples(150, 150))
    other_seed = places(SamplePlan([50, 50, 50], seed=2, lanes=2, window=30).samples(0, 150))
    assert len({tuple(first), tuple(second), tuple(other_seed)}) == 3
    within = [sample for shard, sample in first if shard == first[0][0]]
    assert within != sorted(within)


def test_the_shuffle_stays_within_its_window() -> None:
    plan = SamplePlan([1000], seed=4, lanes=1, window=10)
    for number, sample in enumerate(plan.samples(0, 1000)):
        assert sample.sample // 10 == number // 10


def test_a_batch_may_straddle_two_epochs() -> None:
    plan = SamplePlan([7], seed=0, lanes=2, window=4)
    epochs = [sample.epoch for sample in plan.samples(4, 8)]
    assert epochs == [0, 0, 0, 1, 1, 1, 1, 1]


@settings(max_examples=30, deadline=None)
@given(plan=plans, position=st.integers(0, 2**40), attempt=st.integers(0, 9))
def test_a_substitute_is_a_sample_of_the_set_and_the_same_each_time(
    plan: SamplePlan, position: int, attempt: int
) -> None:
    substitute = plan.substitute(position, attempt)
    assert 0 <= substitute.sample < plan.sizes[substitute.shard]
    assert substitute.epoch == position // plan.count
    assert substitute == plan.substitute(position, attempt)


def test_substitutes_of_one_position_differ() -> None:
    plan = SamplePlan([1000] * 10, seed=0, lanes=4, window=100)
    assert len({plan.substitute(12, attempt) for attempt in range(10)}) > 8


def test_memory_does_not_grow_with_the_samples() -> None:
    plan = SamplePlan([10**6] * 100, seed=0, lanes=64, window=512)
    for step in range(20):
        plan.samples(step * 10**6, 1024)
    assert 0 < plan._window.cache_info().currsize <= 2 * 64
    assert len(plan._window(0, 0, 512)) == 512


@pytest.mark.parametrize(
    ("global_batch", "world_size", "lanes"),
    [(1, 1, 1), (48, 1, 48), (120, 4, 60), (1024, 8, 64), (97, 4, 1), (960, 48, 48), (120, 9, 60)],
)
def test_default_lanes_are_the_most_up_to_64_that_the_ranks_share_evenly(
    global_batch: int, world_size: int, lanes: int
) -> None:
    assert default_lanes(global_batch, world_size) == lanes


def test_more_than_64_ranks_have_as_many_lanes() -> None:
    assert default_lanes(64_000, 1000) == 1000
    assert default_lanes(64_000, 992) == 800


def test_fewer_samples_than_lanes_are_refused_with_the_fix() -> None:
    with pytest.raises(ValueError, match=r"7 samples, fewer than lanes = 8.*set lanes to 7"):
        SamplePlan([3, 4], seed=0, lanes=8, window=10)
