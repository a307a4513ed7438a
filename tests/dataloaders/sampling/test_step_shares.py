"""Ranks and micro-batches share every step: all of it, once, and evenly."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cavmae.dataloaders.sampling.sample_plan import default_lanes
from cavmae.dataloaders.sampling.step_shares import StepShares

BATCHES = st.integers(1, 200)


@given(data=st.data(), global_batch=BATCHES, micro_batch=st.integers(1, 70))
def test_every_sample_is_in_one_micro_batch_and_all_ranks_have_as_many(
    data: st.DataObject, global_batch: int, micro_batch: int
) -> None:
    world_size = data.draw(st.integers(1, global_batch))
    first_world_size = data.draw(st.integers(1, global_batch))
    lanes = default_lanes(global_batch, first_world_size)
    shares = StepShares(global_batch, lanes, world_size, micro_batch)
    ranks = [shares.micro_batches(rank) for rank in range(world_size)]
    assert {len(parts) for parts in ranks} == {shares.accumulation}
    sizes = [len(part) for parts in ranks for part in parts]
    assert min(sizes) > 0 and max(sizes) == shares.largest_micro_batch
    assert max(sizes) <= max(micro_batch, 2)
    each = [sum(map(len, parts)) for parts in ranks]
    assert max(each) == shares.largest and max(each) - min(each) <= 1
    own = [np.concatenate(parts).tolist() for parts in ranks]
    assert all(offsets == sorted(offsets) for offsets in own)
    assert sorted(np.concatenate(own).tolist()) == list(range(global_batch))


@given(data=st.data(), global_batch=BATCHES, micro_batch=st.integers(1, 70))
def test_the_weighted_means_of_micro_batches_have_the_mean_of_the_step(
    data: st.DataObject, global_batch: int, micro_batch: int
) -> None:
    world_size = data.draw(st.integers(1, global_batch))
    shares = StepShares(global_batch, 1, world_size, micro_batch)
    values = np.random.default_rng(0).standard_normal(global_batch)
    means = [
        shares.weight(len(part)) * values[part].mean()
        for rank in range(world_size)
        for part in shares.micro_batches(rank)
    ]
    assert np.mean(means) == pytest.approx(values.mean(), rel=1e-12, abs=1e-12)


def test_ranks_that_divide_the_lanes_own_whole_ones_and_weigh_nothing() -> None:
    shares = StepShares(global_batch=32, lanes=16, world_size=4, micro_batch=4)
    assert sorted(set((shares.offsets(1) % 16).tolist())) == [4, 5, 6, 7]
    assert [len(part) for part in shares.micro_batches(1)] == [4, 4]
    assert shares.weight(4) == 1.0


def test_992_of_1000_ranks_train_and_none_waits_for_more_than_a_sample() -> None:
    shares = StepShares(64_000, default_lanes(64_000, 1000), world_size=992, micro_batch=32)
    assert {len(shares.offsets(rank)) for rank in range(992)} == {64, 65}
    assert 64_000 / (992 * shares.largest) > 0.99


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"world_size": 33}, r"there are 33 ranks and global_batch is 32; use 1 to 32 ranks"),
        ({"world_size": 0}, r"there are 0 ranks"),
        ({"lanes": 7}, r"lanes is 7.*global_batch = 32; use 32"),
        ({"micro_batch": 0}, r"micro_batch is 0; use 1 or more"),
    ],
)
def test_shares_that_cannot_be_are_refused_with_the_fix(
    changes: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        StepShares(
            **({"global_batch": 32, "lanes": 8, "world_size": 2, "micro_batch": 4} | changes)
        )
