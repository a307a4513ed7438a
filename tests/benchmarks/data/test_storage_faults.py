"""A short day: killed twice, a store that fails, a cache of half the set."""

import json
from pathlib import Path

import pytest

from cavmae.benchmarks.data import storage_faults


@pytest.mark.long
@pytest.mark.slow
def test_a_short_day_goes_as_planned(tmp_path: Path) -> None:
    words = ["--clips", "960", "--different", "8", "--shards", "12", "--kills", "2"]
    folders = ["--work-dir", str(tmp_path / "work"), "--out", str(tmp_path)]
    assert storage_faults.main([*words, "--faults", "15", *folders]) == 0
    (path,) = tmp_path.glob("storage-faults-*.json")
    results = json.loads(path.read_text())["results"]
    assert results["as_planned"] and results["each_sample_once_in_the_first_epoch"]
    assert results["kills"] == 2 and len(results["resumed_at_steps"]) == 3
    assert all(results["faults"].values()), "each fault came"
    assert results["cache_bytes_at_the_end"] <= results["cache_limit_bytes"] + 3 * (8 << 20)
    assert not (tmp_path / "work").exists()


def test_a_log_that_is_not_the_plan_is_told(tmp_path: Path) -> None:
    """The comparison itself: one id swapped."""
    folder = storage_faults._make_set(tmp_path, clips=128, different=4, shards=4)
    logs = storage_faults._planned(folder, steps=2)
    assert len(set(storage_faults._in_order(logs, 2))) == 128
    changed = json.loads(json.dumps(logs))
    changed[1][1][0], changed[1][1][1] = changed[1][1][1], changed[1][1][0]
    assert changed != logs and storage_faults._planned(folder, steps=2) == logs


def test_shards_that_do_not_divide_the_clips_are_refused() -> None:
    with pytest.raises(ValueError, match="clips is 100, shards 7"):
        storage_faults.StorageFaultsConfig(clips=100, shards=7)
