"""What a GPU check finds of training: the fastest batch, and the largest one."""

import pytest
import torch

from cavmae.benchmarks.gpu.training import SEARCH_SHARE, best, large_contrast, largest_batch


@pytest.mark.parametrize("limit", [8, 9, 15, 16, 100, 1000, 1023, 5000])
@pytest.mark.parametrize("known", [1, 8])
def test_the_largest_batch_is_found_to_within_its_share(limit: int, known: int) -> None:
    tried: list[int] = []

    def fits(batch: int) -> bool:
        tried.append(batch)
        return batch <= limit

    found = largest_batch(fits, known)
    assert found <= limit
    assert limit - found <= max(1, SEARCH_SHARE * found)
    assert len(tried) == len(set(tried)) <= 20


def test_the_fastest_row_is_the_best_one_and_skipped_ones_are_none() -> None:
    rows = [
        {"batch": 32, "compile": False, "samples_per_second": 10.0},
        {"batch": 64, "compile": True, "samples_per_second": 30.0},
        {"batch": 128, "compile": True, "skipped": "out of memory"},
        {"batch": 64, "compile": False, "samples_per_second": 20.0},
    ]
    assert best(rows) == (64, True)
    assert best(rows[2:3]) is None


def test_a_contrastive_batch_is_timed_with_its_backward_pass() -> None:
    found = large_contrast(64, 16, torch.device("cpu"), repeats=2)
    assert found["contrastive_pairs"] == 64
    assert found["contrastive_seconds"] > 0
