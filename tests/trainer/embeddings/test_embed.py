"""`cavmae embed`: every clip has a row or a reason, and a restart or a batch changes nothing."""

import dataclasses
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tiny_run import save_untrained

from cavmae import cli
from cavmae.dataloaders.packing.output_folder import locked
from cavmae.dataloaders.shards.shard_set import ShardSet
from cavmae.trainer.embeddings.embed import (
    EmbedConfig,
    embed_set,
    in_this_process,
    origin_of,
    write_files,
)
from cavmae.trainer.embeddings.parquet_store import ORIGIN, Origin, claimed
from cavmae.trainer.evaluation.clip_outputs import embed
from cavmae.trainer.evaluation.trained_run import open_trained_run

CPU = torch.device("cpu")
FILES = ["000000.parquet", "000001.parquet", "000002.parquet"]


@pytest.fixture(scope="module")
def run_dir(packed_synthetic: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("embed") / "run"
    save_untrained(packed_synthetic, folder)
    return folder


@pytest.fixture(scope="module")
def embedded(run_dir: Path, packed_synthetic: Path) -> Path:
    """Embeddings of all 24 clips, ten frames each, in batches of five."""
    out = run_dir.parent / "embedded"
    assert command(run_dir, packed_synthetic, out, "--frames=10", "--batch=5") == 0
    return out


def command(run_dir: Path, shards: Path, out: Path, *words: str) -> int:
    return cli.main(["embed", str(run_dir), str(shards / "frames"), f"--out={out}", *words])


def begun(run_dir: Path, shards: Path, out: Path) -> tuple[EmbedConfig, Origin]:
    """What the command works with; its fields as those of `embedded`."""
    config = EmbedConfig(str(run_dir), (str(shards / "frames"),), str(out), frames=10, batch=5)
    run = open_trained_run(run_dir)
    return config, origin_of(run, ShardSet(config.shards), config)


def column(folder: Path, name: str) -> np.ndarray:
    """Of all files, in order."""
    rows = [row for file in FILES for row in pq.read_table(folder / file)[name].to_pylist()]
    return np.array(rows, dtype=np.float32)


def description(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "embeddings.json").read_text())


def test_the_files_have_what_packing_noted_of_each_clip(
    embedded: Path, packed_synthetic: Path
) -> None:
    shards = ShardSet(packed_synthetic / "frames")
    rows = [row for file in FILES for row in pq.read_table(embedded / file).to_pylist()]
    assert [row["position"] for row in rows] == list(range(24))
    for row in rows:
        place = shards.at(row["position"])
        noted = shards.description(*place)
        assert row["sample_id"] == shards.sample_id(*place)
        assert row["labels"] == noted["labels"]
        assert row["source_path"] == noted["source"]["path"]
        assert row["source_start_seconds"] == noted["source"]["start_seconds"]
        assert row["seconds"] == noted["audio"]["samples"] / 16000
        shown = [frame["seconds"] for frame in noted["ten_frames"]]
        assert row["frame_seconds"] == pytest.approx(shown)


@pytest.mark.parametrize("batch", [1, 64])
def test_the_values_are_those_that_scores_rest_on_whatever_the_batch(
    embedded: Path, run_dir: Path, packed_synthetic: Path, batch: int
) -> None:
    run = open_trained_run(run_dir)
    shards = str(packed_synthetic / "frames")
    expected = embed(run.model(CPU), run.config, shards, clips=0, batch=batch)
    for name, values in expected.values.items():
        found = column(embedded, f"{name}_embedding")
        np.testing.assert_allclose(found, values.numpy(), rtol=1e-5, atol=1e-5)


def test_the_video_is_the_middle_frame_and_frames_differ(embedded: Path) -> None:
    frames = column(embedded, "frame_embeddings")
    assert frames.shape == (24, 10, 32)
    np.testing.assert_array_equal(column(embedded, "video_embedding"), frames[:, 5])
    assert (frames[:, 0] != frames[:, 9]).any(axis=1).all()


def test_half_precision_is_the_same_rounded(
    embedded: Path, run_dir: Path, packed_synthetic: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert command(run_dir, packed_synthetic, out, "--dtype=float16", "--batch=5") == 0
    for name in ("audio_embedding", "video_embedding"):
        assert pq.read_schema(out / FILES[0]).field(name).type.value_type == "halffloat"
        rounded = column(embedded, name).astype(np.float16)
        np.testing.assert_array_equal(column(out, name), rounded.astype(np.float32))


def test_a_start_that_was_cut_short_ends_with_the_same_bytes(
    embedded: Path, run_dir: Path, packed_synthetic: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    config, origin = begun(run_dir, packed_synthetic, out)
    finished = open_trained_run(run_dir)
    with claimed(out, origin):
        written = write_files(finished, finished.model(CPU), config, origin, [0, 2])
        while not (out / FILES[0]).exists():
            next(written)
        written.close()
    (out / f"{FILES[1]}.0123.partial").write_bytes(b"half of it")
    kept = (out / FILES[0]).stat().st_mtime_ns
    assert command(run_dir, packed_synthetic, out, "--frames=10", "--batch=5") == 0
    assert (out / FILES[0]).stat().st_mtime_ns == kept
    assert sorted(path.name for path in out.iterdir()) == [*FILES, "embeddings.json", ORIGIN]
    for file in FILES:
        assert (out / file).read_bytes() == (embedded / file).read_bytes()


def test_a_folder_is_not_complete_while_a_file_is_written_anew(
    embedded: Path, run_dir: Path, packed_synthetic: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(embedded, out)
    (out / FILES[1]).unlink()

    def looking(config: EmbedConfig, origin: Origin, numbers: Sequence[int]) -> Iterator[int]:
        assert numbers == [1] and not (out / "embeddings.json").exists()
        yield from in_this_process(config, origin, numbers)

    config, _ = begun(run_dir, packed_synthetic, out)
    assert embed_set(config, looking) == description(embedded)
    assert (out / FILES[1]).read_bytes() == (embedded / FILES[1]).read_bytes()


def test_every_clip_has_a_row_or_a_reason(
    run_dir: Path, packed_synthetic: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "shards"
    shutil.copytree(packed_synthetic, copy)
    shards = ShardSet(copy / "frames")
    damaged = [(0, 7), *((1, sample) for sample in range(8))]
    for shard, sample in damaged:
        tar, sound = Path(shards.location(shard)), shards.member(shard, sample, "flac")
        tar.write_bytes(tar.read_bytes().replace(sound, sound[::-1]))
    out = tmp_path / "out"
    assert command(run_dir, copy, out) == 0
    found = description(out)
    assert (found["clips"], found["rows"]) == (24, 15)
    assert [file["rows"] for file in found["files"]] == [7, 0, 8]
    assert [clip[:2] for clip in found["skipped"]] == [
        [shards.sample_id(*place), "crc_mismatch"] for place in damaged
    ]


def test_too_many_damaged_clips_stop_it_with_a_table(
    run_dir: Path, packed_synthetic: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "shards"
    shutil.copytree(packed_synthetic, copy)
    for tar in (copy / "frames").glob("*.tar"):
        tar.write_bytes(bytes(tar.stat().st_size))
    assert command(run_dir, copy, tmp_path / "out") == 1
    assert "over data.max_bad_fraction = 0.01" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.parquet"))


def test_embeddings_that_are_not_finite_are_told_by_clip(
    run_dir: Path, packed_synthetic: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy)
    weights = torch.load(copy / "weights.pt")
    weights["norm_v.weight"][:] = weights["norm_v.bias"][:] = 3e38  # overflows
    torch.save(weights, copy / "weights.pt")
    assert command(copy, packed_synthetic, tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "frames: the model's output for 8 clips, such as 000000/000000000, " in error
    assert "not finite in float32" in error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": 1}, "begun with frames 10, not 1; give another folder"),
        ({"dtype": "float16"}, "begun with dtype float32, not float16"),
        ({"shards_fingerprint": "ab"}, "not ab; give another folder"),
        ({"weights_sha256": "cd"}, "not cd; give another folder"),
    ],
)
def test_a_folder_of_other_values_is_refused(
    embedded: Path, change: dict[str, Any], message: str
) -> None:
    origin = Origin(**json.loads((embedded / ORIGIN).read_text()) | change)
    with pytest.raises(ValueError, match=message), claimed(embedded, origin):
        pass


def test_a_folder_of_other_things_or_in_use_is_refused(
    embedded: Path, run_dir: Path, packed_synthetic: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(run_dir, packed_synthetic, run_dir) == 1
    assert "which holds other files" in capsys.readouterr().err
    with locked(embedded / ORIGIN, "testing"):
        assert command(run_dir, packed_synthetic, embedded, "--frames=10") == 1
    assert f"another process is embedding into {embedded}" in capsys.readouterr().err


def test_a_damaged_file_is_told_before_anything_is_computed(
    embedded: Path, run_dir: Path, packed_synthetic: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(embedded, out)
    (out / FILES[0]).unlink()
    (out / FILES[2]).write_bytes((embedded / FILES[2]).read_bytes()[:-20])
    config, _ = begun(run_dir, packed_synthetic, out)
    with pytest.raises(ValueError, match=r"000002\.parquet can't be used .*; remove it"):
        embed_set(config, in_this_process)
    assert not (out / FILES[0]).exists()


def test_a_run_that_is_another_one_on_a_node_is_refused(
    run_dir: Path, packed_synthetic: Path, tmp_path: Path
) -> None:
    config, origin = begun(run_dir, packed_synthetic, tmp_path)
    finished = open_trained_run(run_dir)
    other = dataclasses.replace(origin, weights_sha256="ab")
    with pytest.raises(ValueError, match="has changed since the command began, or is another one"):
        next(write_files(finished, finished.model(CPU), config, other, [0]))
