"""`cavmae explore`: what it opens belongs together, and what is wrong is one line."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
from tiny_run import save_untrained

pytest.importorskip("gradio", reason="needs the extra explore")

from cavmae import cli
from cavmae.trainer.explore.command import ExploreConfig, fill
from cavmae.trainer.explore.page import Page, subject_of_file


@pytest.fixture(scope="module")
def run_dir(packed_synthetic: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("explore") / "run"
    save_untrained(packed_synthetic, folder)
    return folder


@pytest.fixture(scope="module")
def filled(run_dir: Path, packed_synthetic: Path) -> Page:
    page = Page()
    fill(page, ExploreConfig(str(run_dir), str(packed_synthetic / "frames")))
    return page


def kept(run_dir: Path) -> Path:
    (folder,) = (run_dir / "explore").iterdir()
    return folder


def test_embeddings_are_computed_once_and_kept_in_the_run(
    filled: Page, run_dir: Path, packed_synthetic: Path
) -> None:
    assert filled.status == "24 clips"
    written = {file: file.stat().st_mtime_ns for file in kept(run_dir).glob("*.parquet")}
    again = Page()
    fill(again, ExploreConfig(str(run_dir), str(packed_synthetic / "frames")))
    assert written and {file: file.stat().st_mtime_ns for file in written} == written


def test_a_file_is_looked_at_as_its_packed_clip_is(filled: Page, packed_synthetic: Path) -> None:
    subject = subject_of_file(filled, str(packed_synthetic.parent / "videos" / "000009.mp4"))
    assert subject.name == "000009.mp4" and subject.row is None and subject.window
    for column, vector in subject.vectors.items():
        (row, score), *_ = filled.collection.nearest(column, vector, 1)
        assert row == 9 and score > 0.99


def test_embeddings_alone_bring_run_and_shards_that_are_where_they_were(
    filled: Page, run_dir: Path, tmp_path: Path
) -> None:
    page = Page()
    fill(page, ExploreConfig(embeddings=str(kept(run_dir))))
    assert page.status == "24 clips" and page.collection.subject(0).window
    moved = tmp_path / "moved"
    shutil.copytree(kept(run_dir), moved)
    description = json.loads((moved / "embeddings.json").read_text())
    description |= {"run": "/gone/run", "shards": "/gone/shards"}
    (moved / "embeddings.json").write_text(json.dumps(description))
    page = Page()
    fill(page, ExploreConfig(embeddings=str(moved)))
    assert page.status == "24 clips; no media at hand; no model at hand, so no files"
    with pytest.raises(ValueError, match="no model is at hand; start the page with the RUN"):
        subject_of_file(page, "sound.wav")


def error_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(["explore", *words]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and len(error.splitlines()) == 1
    return error


def test_what_does_not_belong_together_is_refused(
    filled: Page, run_dir: Path, packed_synthetic: Path, tmp_path: Path
) -> None:
    save_untrained(packed_synthetic, tmp_path / "other", seed=5)
    weights = tmp_path / "other" / "weights.pt"
    weights.write_bytes(weights.read_bytes() + b"\0")
    with pytest.raises(ValueError, match=r"run .*other has other weights .* give that run"):
        fill(Page(), ExploreConfig(str(tmp_path / "other"), embeddings=str(kept(run_dir))))
    words = [str(tmp_path / "other"), str(packed_synthetic / "frames")]
    with pytest.raises(ValueError, match="begun with weights_sha256"):
        fill(Page(), ExploreConfig(*words, embeddings=str(kept(run_dir))))


def test_wrong_words_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="give RUN and SHARDS, or --embeddings with what"):
        ExploreConfig(str(tmp_path))
    none = tmp_path / "none"
    assert f"{none}, which has no origin.json" in error_of(capsys, "--embeddings", str(none))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    missing = error_of(capsys, "--embeddings", str(none))
    assert "gradio, openTSNE, which is not installed; pip install 'cavmae[explore]'" in missing
