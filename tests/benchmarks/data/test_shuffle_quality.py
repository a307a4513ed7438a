"""The three numbers of an order: what they are for orders whose answers are known."""

import json
from pathlib import Path

import numpy as np
import pytest

from cavmae.benchmarks.data import shuffle_quality


def test_an_unshuffled_order_is_told_from_a_perfect_one() -> None:
    straight = np.arange(8000)
    worst = shuffle_quality._numbers(straight, straight, samples=100, batch=50)
    assert worst["shards_in_a_batch"] == 1 and worst["pairs_again"] == 1
    assert worst["class_distance"] > 0.98
    perfect = shuffle_quality._perfect(80, 100, 50)
    assert perfect["pairs_again"] < 0.02
    # 50 draws among 80 shards: 80 * (1 - (79 / 80) ** 50) different ones.
    assert perfect["shards_in_a_batch"] == pytest.approx(37.3, abs=1)


def test_larger_windows_come_nearer() -> None:
    found = [shuffle_quality.measure(20, 200, 256, window) for window in (1, 100)]
    assert found[1]["pairs_again"] < found[0]["pairs_again"]
    assert found[1]["class_distance"] < found[0]["class_distance"]


def test_the_record_and_its_plot(tmp_path: Path) -> None:
    words = ["--shards", "8", "--samples", "50", "--batch", "16", "--windows", "4", "100"]
    assert shuffle_quality.main([*words, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("shuffle-*.json")
    assert path.with_suffix(".png").exists()
    assert set(json.loads(path.read_text())["results"]) == {"perfect", "window_4", "window_100"}
    with pytest.raises(ValueError, match="fewer than two batches"):
        shuffle_quality.ShuffleConfig(shards=1, samples=10, batch=16)
