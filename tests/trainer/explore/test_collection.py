"""What the page shows of a clip, and what it finds, is what shards and embeddings hold."""

from pathlib import Path

import pytest
from tiny_run import save_untrained

pytest.importorskip("gradio", reason="needs the extra explore")

from cavmae import cli
from cavmae.dataloaders.shards.shard_set import ShardSet
from cavmae.trainer.embeddings.parquet_store import EmbeddingSet
from cavmae.trainer.explore.collection import Collection


@pytest.fixture(scope="module")
def embeddings(packed_synthetic: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("explore")
    save_untrained(packed_synthetic, folder / "run")
    words = [str(folder / "run"), str(packed_synthetic / "frames"), f"--out={folder / 'out'}"]
    assert cli.main(["embed", *words]) == 0
    return folder / "out"


@pytest.fixture(scope="module")
def collection(embeddings: Path, packed_synthetic: Path) -> Collection:
    return Collection(EmbeddingSet(embeddings), ShardSet(packed_synthetic / "frames"))
