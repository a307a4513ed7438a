"""What the page shows of a clip, and what it finds, is what shards and embeddings hold."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny_run import save_untrained

pytest.importorskip("gradio", reason="needs the extra explore")

from cavmae import cli
from cavmae.dataloaders.media.audio_codec import decode_audio
from cavmae.dataloaders.shards.shard_set import ShardSet
from cavmae.trainer.embeddings.parquet_store import EmbeddingSet
from cavmae.trainer.embeddings.search import SearchConfig, search
from cavmae.trainer.explore.collection import Collection, spectrogram


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


def test_what_is_found_is_what_search_finds(collection: Collection, embeddings: Path) -> None:
    expected = search(SearchConfig(str(embeddings), "000001/000000009", top=5))
    vectors = collection.subject(collection.row_of("000001/000000009")).vectors
    for kind, other, column in (
        ("video", "audio_embedding", "video_embedding"),
        ("sound", "video_embedding", "audio_embedding"),
    ):
        found = collection.nearest(column, vectors[other], 5)
        assert [row for row, _ in found] == [clip["position"] for clip in expected[kind]]
        scores = [clip["score"] for clip in expected[kind]]
        assert [score for _, score in found] == pytest.approx(scores, abs=1e-5)


def test_a_clip_is_heard_and_seen_as_it_was_packed(
    collection: Collection, packed_synthetic: Path
) -> None:
    subject = collection.subject(9)
    assert subject.name == "000001/000000009" and subject.row == 9 and subject.window
    stored = decode_audio(ShardSet(packed_synthetic / "frames").member(1, 1, "flac"))
    assert subject.window.audio is not None and subject.window.frame is not None
    assert (subject.window.audio * 32768 == stored).all()
    assert subject.window.frame.shape == (64, 64, 3) and subject.window.frame.std() > 5
    label, source = subject.facts.split("\n")
    assert label == f"labels: {collection.clip(9)['labels'][0]}" and "000009.mp4" in source


def test_clips_without_shards_are_found_and_say_that_there_is_no_media(embeddings: Path) -> None:
    alone = Collection(EmbeddingSet(embeddings), None)
    subject = alone.subject(3)
    assert subject.window is None and "no media at hand" in subject.facts
    assert len(alone.nearest("video_embedding", subject.vectors["audio_embedding"], 99)) == 24


def test_a_clip_that_does_not_decode_says_why(
    embeddings: Path, packed_synthetic: Path, tmp_path: Path
) -> None:
    shutil.copytree(packed_synthetic / "frames", tmp_path / "frames")
    shard = tmp_path / "frames" / "000000.tar"
    shard.write_bytes(shard.read_bytes().replace(b"fLaC", b"XXXX"))
    subject = Collection(EmbeddingSet(embeddings), ShardSet(tmp_path / "frames")).subject(0)
    assert subject.window is None and "no media: crc_mismatch" in subject.facts


def test_an_id_that_no_clip_has_is_named(collection: Collection) -> None:
    with pytest.raises(ValueError, match=r"no clip has the id '<b>'; give one such as 000000/"):
        collection.row_of("<b>")


def test_a_tone_is_drawn_at_its_pitch() -> None:
    time = np.arange(16000, dtype=np.float32) / 16000
    drawn = spectrogram(np.sin(2 * np.pi * 4000 * time)).sum((1, 2))
    low = spectrogram(np.sin(2 * np.pi * 300 * time)).sum((1, 2))
    assert drawn.argmax() < low.argmax() < 128
