"""`cavmae evaluate retrieve`: scores that no batch and no leak has a part in."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import save_untrained, save_untrained_classifier

from cavmae import cli
from cavmae.dataloaders.shards.shard_set import ShardSet
from cavmae.trainer.evaluation.classify import ClassifyConfig, classified
from cavmae.trainer.evaluation.clip_outputs import embed
from cavmae.trainer.evaluation.retrieve import RetrieveConfig, first_of_each_class
from cavmae.trainer.evaluation.trained_run import open_trained_classifier, open_trained_run


@pytest.fixture(scope="module")
def run_dir(packed_synthetic: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("retrieve") / "run"
    save_untrained(packed_synthetic, folder)
    return folder


def retrieve(run_dir: Path, shards: Path, *words: str) -> dict[str, Any]:
    out = run_dir / f"{len(list(run_dir.iterdir()))}.json"
    command = ["evaluate", "retrieve", str(run_dir), str(shards / "frames"), f"--out={out}", *words]
    assert cli.main(command) == 0
    return json.loads(out.read_text())


def test_the_result_names_the_clips_the_weights_and_the_code(
    run_dir: Path, val_shards: Path
) -> None:
    result = retrieve(run_dir, val_shards)
    assert result["clips"] == 8
    assert result["audio_to_video"]["r1_chance"] == 1 / 8
    assert result["video_to_audio"]["median_rank"] >= 1
    assert result["shards_fingerprint"] == ShardSet(str(val_shards / "frames")).fingerprint
    weights = (run_dir / "weights.pt").read_bytes()
    assert result["weights_sha256"] == hashlib.sha256(weights).hexdigest()
    assert (run_dir / "code" / f"{result['code']}.tar.gz").is_file()
    assert (result["leakage"], result["skipped"]) == ("none", [])


def test_an_embedding_does_not_depend_on_the_clips_beside_it(
    run_dir: Path, val_shards: Path
) -> None:
    run, shards = open_trained_run(run_dir), str(val_shards / "frames")
    model = run.model(torch.device("cpu"))
    alone, five, all_of_them = (
        embed(model, run.config, shards, clips=0, batch=batch) for batch in (1, 5, 64)
    )
    assert alone.sample_ids == five.sample_ids == all_of_them.sample_ids
    for other in (five, all_of_them):
        for name, expected in alone.values.items():
            torch.testing.assert_close(other.values[name], expected, rtol=1e-5, atol=1e-6)


def test_scores_do_not_depend_on_the_batch(run_dir: Path, val_shards: Path) -> None:
    one, many = (retrieve(run_dir, val_shards, f"--batch={batch}") for batch in (1, 64))
    for direction in ("audio_to_video", "video_to_audio"):
        assert one[direction] == many[direction]


def test_a_fine_tuned_run_ranks_by_the_encoders_that_its_classifier_has(
    packed_synthetic: Path, val_shards: Path, tmp_path: Path
) -> None:
    save_untrained_classifier(packed_synthetic, tmp_path / "run")
    run, shards = open_trained_classifier(tmp_path / "run"), str(val_shards / "frames")
    model = run.model(torch.device("cpu"))
    found = embed(model, run.config, shards, clips=0, batch=3)
    logits = model.mlp_head(found.values["audio"])
    asked = ClassifyConfig(str(tmp_path / "run"), shards)
    by_sound = classified(run, ("audioonly",), asked).values["audioonly"][:, 0]
    torch.testing.assert_close(logits, by_sound, rtol=1e-5, atol=1e-6)
    assert retrieve(tmp_path / "run", val_shards)["clips"] == 8


def test_of_each_class_the_first_clips_are_ranked() -> None:
    labels = (("a",), ("b", "a"), ("a",), ("a",), ("b",))
    assert first_of_each_class(labels, 2) == [0, 1, 2, 4]
    with pytest.raises(ValueError, match="per_class is 2 and clip 1 of the set has no label"):
        first_of_each_class((("a",), ()), 2)


def test_clips_of_a_class_are_counted_in_the_result(run_dir: Path, val_shards: Path) -> None:
    shards = ShardSet(str(val_shards / "frames"))
    labels = {shards.description(0, clip)["labels"][0] for clip in range(8)}
    assert 2 <= len(labels) < 8
    assert retrieve(run_dir, val_shards, "--per-class=1")["clips"] == len(labels)


def test_a_set_that_was_trained_on_is_refused_unless_that_is_wanted(
    run_dir: Path, packed_synthetic: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", "retrieve", str(run_dir), str(packed_synthetic / "frames")]
    assert cli.main(words) == 1
    error = capsys.readouterr().err
    assert "24 clips" in error and "were trained on" in error and "--allow-leakage" in error
    assert retrieve(run_dir, packed_synthetic, "--allow-leakage")["leakage"] == "not checked"


@pytest.mark.field
def test_a_set_that_was_trained_on_is_known_from_anywhere_and_when_it_is_gone(
    packed_synthetic: Path,
    val_shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train, test = tmp_path / "A/train", tmp_path / "B/test"
    shutil.copytree(val_shards, train)
    shutil.copytree(val_shards, test)
    shutil.copytree(packed_synthetic, tmp_path / "B/train")
    (tmp_path / "link").symlink_to(test / "frames")
    shutil.copytree(test / "frames", tmp_path / "alone")  # without the reports of packing
    run_dir = tmp_path / "A/run"
    save_untrained(train, run_dir)

    def refused(folder: Path, shards: str) -> str:
        monkeypatch.chdir(folder)
        capsys.readouterr()  # where results before this one are
        assert cli.main(["evaluate", "retrieve", str(run_dir), shards]) == 1
        error = capsys.readouterr().err
        assert f"8 clips of {shards} were trained on" in error and error.count("\n") == 1
        return error

    refused(tmp_path / "B", "test/frames")
    refused(test / "frames", ".")
    refused(tmp_path, "link")
    refused(tmp_path, "alone")
    shutil.rmtree(train)
    refused(tmp_path / "B", "test/frames")
    assert retrieve(run_dir, packed_synthetic)["train_sets_now"] == {
        str(train / "frames"): "not there, or not readable"
    }
    shutil.copytree(packed_synthetic, train)  # packed anew in its place
    note = f"(the set at data.train, {train / 'frames'}, is not the one that was trained on)"
    assert note in refused(tmp_path / "B", "test/frames")
    result = retrieve(run_dir, packed_synthetic)
    assert result["leakage"] == "none"
    assert result["train_sets_now"] == {str(train / "frames"): "not the one that was trained on"}
    of_run = ShardSet(str(val_shards / "frames"))
    assert result["trained_on"] == [
        {"name": "train/frames", "clips": 8, "fingerprint": of_run.fingerprint, "modality": "both"}
    ]


@pytest.mark.field
def test_a_training_that_is_not_known_is_told_and_never_none(
    packed_synthetic: Path, val_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_untrained(packed_synthetic, tmp_path / "run")
    (tmp_path / "run/trained_on.npz").unlink()
    result = retrieve(tmp_path / "run", val_shards)
    assert result["leakage"].startswith("unknown of ") and result["trained_on"] == []
    assert list(result["train_sets_now"].values()) == ["unknown"]
    shutil.copytree(val_shards, tmp_path / "set")
    (tmp_path / "set/frames/content.npy").unlink()
    words = ["evaluate", "retrieve", str(tmp_path / "run"), str(tmp_path / "set/frames")]
    assert cli.main(words) == 1
    assert "has no content.npy, so it is unknown whether" in capsys.readouterr().err
    save_untrained(tmp_path / "set", tmp_path / "run2")
    assert retrieve(tmp_path / "run2", packed_synthetic)["leakage"] == (
        "unknown of set/frames; none in trained_on"
    )
    words[2] = str(tmp_path / "run2")
    assert cli.main(words) == 1, "its shards are those that were trained on"


def test_a_run_that_has_not_finished_is_refused(run_dir: Path, tmp_path: Path) -> None:
    shutil.copy(run_dir / "config.json", tmp_path)
    with pytest.raises(ValueError, match="has not finished"):
        open_trained_run(tmp_path)
    with pytest.raises(ValueError, match=r"which has no config\.json"):
        open_trained_run(tmp_path / "nothing")


@pytest.mark.parametrize("field", ["clips", "per_class"])
def test_a_number_out_of_range_is_named(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} is -1; use 0 or more"):
        dataclasses.replace(RetrieveConfig("run", "shards"), **{field: -1})
