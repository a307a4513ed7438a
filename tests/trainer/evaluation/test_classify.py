"""`cavmae evaluate classify`: scores that no batch, no order and no leak has a part in."""

import csv
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from starts import Start
from tiny_run import save_untrained, save_untrained_classifier, tiny_finetuning

from cavmae import cli
from cavmae.dataloaders.packing.pack import PackConfig, pack
from cavmae.dataloaders.shards.shard_set import ShardSet
from cavmae.dataloaders.tools.synthetic import CLASSES, generate
from cavmae.trainer.config.configs import ClassifierConfig, FinetuneConfig
from cavmae.trainer.evaluation.classify import ClassifyConfig, classified, score_modes
from cavmae.trainer.evaluation.trained_run import open_trained_classifier
from cavmae.trainer.metrics.classification import classification_scores
from cavmae.trainer.model.classifier import STREAMS
from cavmae.trainer.tasks.labels import LabelSet

SCORES = ("mean_average_precision", "mean_auc", "d_prime", "accuracy")


@pytest.fixture(scope="module")
def run_dir(packed_synthetic: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classify") / "run"
    save_untrained_classifier(packed_synthetic, folder)
    return folder


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """9 clips, every third one of half the length: the packed set, and the same backwards."""
    folder = tmp_path_factory.mktemp("uneven")
    lists = [
        generate(folder / "long", 6, seed=3, start_index=200, seconds=2.0, workers=1),
        generate(folder / "short", 3, seed=3, start_index=206, seconds=1.0, workers=1),
    ]
    header, *_ = lists[0].read_text().splitlines()
    long, short = (
        [f"{one.parent}/{row}" for row in one.read_text().splitlines()[1:]] for one in lists
    )
    rows = [row for place in range(3) for row in (*long[2 * place : 2 * place + 2], short[place])]
    for name, some in (("forward", rows), ("backward", rows[::-1])):
        (folder / f"{name}.csv").write_text("\n".join([header, *some]) + "\n")
        pack(PackConfig(str(folder / f"{name}.csv"), str(folder / name), tiers="frames", workers=1))
    return folder / "forward", folder / "backward"


def words(run_dir: Path, shards: Path, *more: str) -> list[str]:
    return ["evaluate", "classify", str(run_dir), str(shards / "frames"), *more]


def classify(run_dir: Path, shards: Path, *more: str) -> dict[str, Any]:
    out = run_dir / f"{len(list(run_dir.iterdir()))}.json"
    more = ("--allow-empty-classes", "--resamples=20", f"--out={out}", *more)
    assert cli.main(words(run_dir, shards, *more)) == 0
    return json.loads(out.read_text())


def test_every_mode_is_scored_and_every_class_has_its_row(run_dir: Path, val_shards: Path) -> None:
    result = classify(run_dir, val_shards)
    assert result["modes"].keys() == STREAMS.keys()
    assert (result["clips"], sum(result["clips_of_class"])) == (8, 8)
    of_both = result["modes"]["multimodal"]
    assert of_both["mean_auc_low"] <= of_both["mean_auc"] <= of_both["mean_auc_high"]
    here = {label for label, count in zip(CLASSES, result["clips_of_class"], strict=True) if count}
    assert set(of_both["classes_skipped"]) == set(CLASSES) - here
    assert (
        result["weights_sha256"]
        == hashlib.sha256((run_dir / "weights.pt").read_bytes()).hexdigest()
    )
    assert result["shards_fingerprint"] == ShardSet(str(val_shards / "frames")).fingerprint
    assert [one["clips"] for one in result["trained_on"]] == [24]

    out = Path(result["options"]["out"])
    rows = list(csv.DictReader(out.with_suffix(".csv").open(encoding="utf-8")))
    assert [row["label"] for row in rows] == list(CLASSES) * len(STREAMS)
    for row, precision in zip(rows, of_both["average_precision"], strict=False):
        assert row["mode"] == "multimodal"
        assert row["average_precision"] == ("" if precision is None else str(precision))
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_the_sixth_of_ten_frames_is_the_one_frame_of_training(
    run_dir: Path, val_shards: Path
) -> None:
    one, ten = (classify(run_dir, val_shards, f"--frames={count}")["modes"] for count in (1, 10))
    assert one["audioonly"]["frames"] == ten["audioonly"]["frames"] == 1, "it sees none"
    assert ten["audioonly"]["by_frame"] == []
    of_frames = ten["multimodal"]["by_frame"]
    assert (ten["multimodal"]["frames"], len(of_frames)) == (10, 10)
    for name in SCORES:
        assert of_frames[5][name] == pytest.approx(one["multimodal"][name], abs=1e-6)
    assert of_frames[0] != of_frames[9]


def test_probabilities_of_frames_are_averaged_and_one_frame_is_scored_by_its_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    targets = torch.eye(4).repeat(5, 1)
    logits = torch.randn(20, 3, 4, generator=generator) + targets[:, None]
    run = FinetuneConfig(classifier=ClassifierConfig(loss="cross_entropy"))
    scores = score_modes({"multimodal": logits, "videoonly": logits[:, :1]}, targets, run, 0)
    mean = classification_scores(logits.softmax(2).mean(1), targets, resamples=0)
    first = classification_scores(logits[:, 0], targets, resamples=0)
    assert scores["multimodal"].scores.average_precision == mean.average_precision
    assert scores["multimodal"].by_frame[0].average_precision == first.average_precision
    assert scores["videoonly"].scores.average_precision == first.average_precision


def test_a_run_of_one_modality_is_asked_for_that_alone(
    packed_synthetic: Path, val_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = ClassifierConfig(mode="audioonly")
    save_untrained_classifier(packed_synthetic, tmp_path / "run", classifier=one)
    result = classify(tmp_path / "run", val_shards, "--resamples=0")
    assert list(result["modes"]) == ["audioonly"]
    assert "mean_auc_low" not in result["modes"]["audioonly"]
    assert cli.main(words(tmp_path / "run", val_shards, "--modes=multimodal")) == 1
    assert "can be scored in audioonly" in capsys.readouterr().err
    shards = str(val_shards / "frames")
    assert cli.main(["evaluate", "retrieve", str(tmp_path / "run"), shards]) == 1
    assert "trained on audio alone" in capsys.readouterr().err


# ----------------------------------------------------------------------------------- trust


def test_a_clip_is_classified_alike_whatever_lies_beside_it_and_in_any_order(
    run_dir: Path, uneven: tuple[Path, Path]
) -> None:
    """Clips of two lengths: no clip's padding may depend on the others of its batch."""
    run = open_trained_classifier(run_dir)
    modes = tuple(STREAMS)

    def logits(shards: Path, batch: int) -> dict[str, torch.Tensor]:
        config = ClassifyConfig(str(run_dir), str(shards / "frames"), batch=batch)
        return classified(run, modes, config).values

    alone, seven, backward = (
        logits(uneven[0], 1),
        logits(uneven[0], 7),
        logits(uneven[1], 7),
    )
    assert len(alone["targets"]) == 9
    for name, values in alone.items():
        torch.testing.assert_close(seven[name], values, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(backward[name].flip(0), values, rtol=1e-6, atol=1e-6)


def test_scores_depend_neither_on_the_batch_nor_on_the_order(
    run_dir: Path, uneven: tuple[Path, Path]
) -> None:
    results = [
        classify(run_dir, shards, f"--batch={batch}")["modes"]["multimodal"]
        for shards, batch in ((uneven[0], 1), (uneven[0], 7), (uneven[1], 7))
    ]
    for other in results[1:]:
        for name in SCORES:
            assert other[name] == pytest.approx(results[0][name], abs=1e-6)


@pytest.mark.slow
def test_scores_of_two_ranks_during_a_run_are_those_of_its_weights_afterwards(
    packed_synthetic: Path, val_shards: Path, tmp_path: Path
) -> None:
    labels = tmp_path / "labels.csv"
    labels.write_text(LabelSet(CLASSES, CLASSES).as_csv())
    config = tiny_finetuning(packed_synthetic, tmp_path / "run", steps=6)
    config = replace(
        config,
        classifier=replace(config.classifier, labels=str(labels), allow_empty_classes=True),
        data=replace(config.data, validation=str(val_shards / "frames")),
    )
    Start(config, 2, tmp_path).finish()
    during = json.loads((tmp_path / "run/summary.json").read_text())["scores"]
    after = classify(tmp_path / "run", val_shards)["modes"]["multimodal"]
    for name in SCORES:
        assert after[name] == pytest.approx(during[f"val_{name}"], abs=1e-5)


def test_what_a_run_started_from_counts_as_trained_on(
    packed_synthetic: Path, val_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_untrained(val_shards, tmp_path / "pretrained")
    start = str(tmp_path / "pretrained/weights.pt")
    save_untrained_classifier(packed_synthetic, tmp_path / "run", initial_weights=start)
    shutil.rmtree(tmp_path / "pretrained")
    sets = [ShardSet(str(one / "frames")) for one in (packed_synthetic, val_shards)]
    training = open_trained_classifier(tmp_path / "run").training
    assert [one.fingerprint for one in training.sets] == [one.fingerprint for one in sets]
    assert training.leakage("both") == "none"
    assert cli.main(words(tmp_path / "run", val_shards)) == 1
    assert "8 clips of" in (error := capsys.readouterr().err) and "were trained on" in error


# ------------------------------------------------------------------------------- bad input


def of_another_architecture(run_dir: Path) -> None:
    config = json.loads((run_dir / "config.json").read_text())
    config["model"]["width"] = 64
    (run_dir / "config.json").write_text(json.dumps(config))


def without_a_classifier(run_dir: Path) -> None:
    state = torch.load(run_dir / "weights.pt")
    encoders = {name: tensor for name, tensor in state.items() if "mlp_head" not in name}
    torch.save(encoders, run_dir / "weights.pt")


def not_finite(run_dir: Path) -> None:
    state = torch.load(run_dir / "weights.pt")
    state["blocks_u.0.mlp.fc1.weight"][0, 0] = torch.nan
    torch.save(state, run_dir / "weights.pt")


def of_other_labels(run_dir: Path) -> None:
    names = tuple(f"/m/{number}" for number in range(len(CLASSES)))
    (run_dir / "labels.csv").write_text(LabelSet(names, names).as_csv())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (of_another_architecture, "weights.pt does not fit the model"),
        (without_a_classifier, "has no classifier (mlp_head"),
        (not_finite, "tensor blocks_u.0.mlp.fc1.weight has 1 NaN or infinite values"),
        (of_other_labels, "which is none of the 20 classes"),
    ],
)
def test_a_run_that_does_not_fit_is_one_line(
    run_dir: Path,
    val_shards: Path,
    tmp_path: Path,
    damage: Callable[[Path], None],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(run_dir, tmp_path / "run")
    damage(tmp_path / "run")
    assert cli.main(words(tmp_path / "run", val_shards, "--allow-empty-classes")) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), "has no clip of"),
        (("--modes=sound",), "modes has 'sound'"),
    ],
)
def test_what_can_not_be_scored_is_one_line(
    run_dir: Path,
    val_shards: Path,
    more: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(words(run_dir, val_shards, *more)) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("clips", -1, "clips is -1; use 0 or more"),
        ("resamples", 1, "resamples is 1; use 2 or more"),
        ("out", "scores.csv", r"out is scores.csv; give the name of a \.json file"),
    ],
)
def test_a_field_out_of_range_is_named(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(ClassifyConfig("run", "shards"), **{field: value})


def test_clips_without_labels_are_one_line(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generate(tmp_path / "videos", 2, seed=4, start_index=300, workers=1)
    pack(PackConfig(str(tmp_path / "videos"), str(tmp_path / "set"), tiers="frames", workers=1))
    capsys.readouterr()  # what packing says
    assert cli.main(words(run_dir, tmp_path / "set", "--allow-empty-classes")) == 1
    error = capsys.readouterr().err
    assert "clip 000000/000000000 has no label" in error and error.count("\n") == 1


def test_the_set_that_was_trained_on_is_refused(
    run_dir: Path, packed_synthetic: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words(run_dir, packed_synthetic)) == 1
    assert "24 clips of" in (error := capsys.readouterr().err) and "were trained on" in error


def test_a_run_of_the_other_kind_is_one_line(
    run_dir: Path,
    packed_synthetic: Path,
    val_shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_untrained(packed_synthetic, tmp_path / "pretrained")
    assert cli.main(words(tmp_path / "pretrained", val_shards)) == 1
    assert "a pretraining run, which has no classifier" in capsys.readouterr().err
    shards, out = str(val_shards / "frames"), str(tmp_path / "out")
    assert cli.main(["reconstruct", str(run_dir), shards, out]) == 1
    assert "a fine-tuning run; give the folder of a pretraining run" in capsys.readouterr().err
