"""The benchmark of the page: embeddings that the page opens, and a record of all that it names."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from cavmae.benchmarks.explore import page
from cavmae.dataloaders.shards.shard_set import ShardSet
from cavmae.trainer.embeddings.parquet_store import EmbeddingSet


def test_embeddings_lie_around_the_centres_of_their_classes(tmp_path: Path) -> None:
    found = EmbeddingSet(page.make_embeddings(tmp_path, clips=1100, width=32))
    assert found.rows == 1100 and found.origin.width == 32
    unit = np.concatenate([*found.unit_vectors("audio_embedding")])
    near = unit @ unit[0]
    same = np.arange(1100) % page.CLASSES == 0
    assert near[same].mean() > near[~same].mean() + 0.3
    shards = ShardSet(found.description["shards"])
    assert {clip["position"] for clip in found.clips(range(1100))} == set(range(shards.samples))


def test_a_missing_browser_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(ValueError, match="the program chromium"):
        page.main([])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the program chromium")
def test_the_record_has_every_time(tmp_path: Path) -> None:
    pytest.importorskip("playwright", reason="needs playwright")
    words = ["--clips", "200", "--width", "16", "--queries", "2", f"--out={tmp_path}"]
    assert page.main(words) in (0, 1)
    (record,) = tmp_path.glob("explore-*.json")
    results = json.loads(record.read_text())["results"]
    assert 0 < results["first_page"]["value"] < results["filled_seconds"]
    assert len(results["queries"]["all_seconds"]) == 2 and results["map_seconds"] > 0
