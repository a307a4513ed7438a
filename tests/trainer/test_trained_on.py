"""`trained_on.npz`: what weights were trained on, wherever they are taken."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
from starts import Start
from tiny_run import save_untrained, tiny_run

from cavmae import cli
from cavmae.dataloaders.shards.shard_set import ShardSet
from cavmae.trainer.config.serialize import load_run_config
from cavmae.trainer.trained_on import TrainedOn


def test_the_file_has_each_clip_once_in_order(val_shards: Path, tmp_path: Path) -> None:
    shutil.copytree(val_shards, tmp_path / "copy")
    folders = [str(one / "frames") for one in (val_shards, tmp_path / "copy")]
    TrainedOn.of_sets(folders, None).save(tmp_path)
    read = TrainedOn.beside(tmp_path)
    shards = ShardSet(folders[0])
    assert [(one.name, one.clips, one.fingerprint) for one in read.sets] == [
        (name, 8, shards.fingerprint) for name in (f"{val_shards.name}/frames", "copy/frames")
    ]
    content = shards.content()
    assert content is not None and (read.content == np.unique(content)).all()
    assert read.unknown == () and read.leakage("both") == "none"
    assert (tmp_path / "trained_on.npz").stat().st_size < 2500


def test_it_goes_with_the_weights_through_exports_and_links(
    val_shards: Path, tmp_path: Path
) -> None:
    run, out, linked = tmp_path / "run", tmp_path / "out", tmp_path / "linked.pt"
    save_untrained(val_shards, run)
    assert cli.main(["export", str(run), str(out), "--format", "published"]) == 0
    linked.symlink_to(run / "weights.pt")
    places = [run, out, run / "weights.pt", out / "published.pth", linked]
    assert {len(TrainedOn.beside(one).content) for one in places} == {8}
    assert "(8 clips, fingerprint of the shards `" in (out / "README.md").read_text()


def test_weights_from_elsewhere_are_unknown(val_shards: Path, tmp_path: Path) -> None:
    save_untrained(val_shards, tmp_path / "run")
    shutil.copy(tmp_path / "run/weights.pt", tmp_path / "run/audio_model.25.pth")
    shutil.copy(tmp_path / "run/weights.pt", tmp_path)
    for place, name in (
        ("run/audio_model.25.pth", "run/audio_model.25.pth"),
        ("weights.pt", f"{tmp_path.name}/weights.pt"),
        ("gone/weights.pt", "gone/weights.pt"),
    ):
        training = TrainedOn.beside(tmp_path / place)
        assert training.unknown == (name,) and training.leakage("both") == f"unknown of {name}"


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 cut", b"text"])
def test_a_damaged_file_is_named(val_shards: Path, tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "trained_on.npz").write_bytes(damage)
    with pytest.raises(ValueError, match=r"trained_on\.npz is damaged .* or remove it"):
        TrainedOn.beside(tmp_path)


@pytest.mark.slow
@pytest.mark.field
def test_a_run_notes_at_its_start_what_it_and_its_initial_weights_are_trained_on(
    packed_synthetic: Path, val_shards: Path, tmp_path: Path
) -> None:
    save_untrained(val_shards, tmp_path / "pretrained")
    (tmp_path / "link").symlink_to(packed_synthetic / "frames")
    config = tiny_run(packed_synthetic, tmp_path / "run", steps=1)
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, train=str(tmp_path / "link")),
        initial_weights=str(tmp_path / "pretrained/weights.pt"),
    )
    Start(config, 1, tmp_path).finish()
    training = TrainedOn.beside(tmp_path / "run")
    assert [one.clips for one in training.sets] == [24, 8] and len(training.content) == 32
    saved = load_run_config(tmp_path / "run/config.json")
    assert saved.data.train_folders == [str((packed_synthetic / "frames").resolve())]
    written = (tmp_path / "run/trained_on.npz").read_bytes()
    (tmp_path / "pretrained/trained_on.npz").unlink()
    Start(config, 1, tmp_path).finish()  # resumes at its end
    assert (tmp_path / "run/trained_on.npz").read_bytes() == written
