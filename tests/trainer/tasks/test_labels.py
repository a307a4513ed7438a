"""Which label is which class, and what does not fit."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_run import tiny_finetuning

from cavmae.trainer.config.configs import ClassifierConfig, FinetuneConfig
from cavmae.trainer.tasks.labels import LabelSet, label_counts, open_labels, read_labels

LABELS = LabelSet(("/m/1", "/m/2", "/m/3"), ("Dog", "Bell, ringing", "Speech"))


def test_a_label_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text(LABELS.as_csv())
    assert read_labels(tmp_path / "labels.csv") == LABELS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("index,mid\n0,/m/1\n", "the column display_name is missing"),
        ("index,mid,display_name\n", "has no classes"),
        ("index,mid,display_name\n1,/m/1,Dog\n", "class 0 has the index '1'"),
        ("index,mid,display_name\n0,/m/1,Dog\n1,/m/1,Cat\n", "'/m/1' is there twice"),
        ("index,mid,display_name\n0,/m/1,\n", "line 2: class 0 has no display_name"),
        ("index,mid,display_name\n0,/m/1,Male speech, man\n", "line 2: 4 columns, the header has"),
    ],
)
def test_a_label_file_that_cannot_be_used_is_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(ValueError, match=rf"labels.csv.*{message}"):
        read_labels(tmp_path / "labels.csv")


def test_a_label_file_of_a_spreadsheet_begins_with_a_mark(tmp_path: Path) -> None:
    text = LABELS.as_csv()
    (tmp_path / "labels.csv").write_text(text, encoding="utf-8-sig")
    assert read_labels(tmp_path / "labels.csv") == LABELS
    semicolons = text.replace(",", ";").replace("Bell; ringing", "Bell, ringing")
    (tmp_path / "labels.csv").write_text(semicolons, encoding="utf-16")
    assert read_labels(tmp_path / "labels.csv") == LABELS


def test_targets_are_at_the_numbers_of_the_labels() -> None:
    targets = LABELS.targets([("/m/3", "/m/1"), ("/m/2",)], ["a", "b"])
    assert torch.equal(targets, torch.tensor([[1.0, 0, 1], [0, 1, 0]]))


@pytest.mark.parametrize(
    ("labels", "message"), [((), "clip a has no label"), (("/m/9",), "clip a has the label '/m/9'")]
)
def test_a_clip_that_no_class_fits_is_named(labels: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LABELS.targets([labels], ["a"])


@pytest.fixture
def run(packed_synthetic: Path, tmp_path: Path) -> FinetuneConfig:
    (tmp_path / "run").mkdir()
    return tiny_finetuning(packed_synthetic, tmp_path / "run")


def with_labels(run: FinetuneConfig, text: str, *, allow_empty: bool = False) -> FinetuneConfig:
    path = Path(run.run_dir).parent / "labels.csv"
    path.write_text(text)
    return dataclasses.replace(
        run, classifier=ClassifierConfig(labels=str(path), allow_empty_classes=allow_empty)
    )


def test_without_a_file_the_classes_are_the_labels_of_the_training_set(
    run: FinetuneConfig, packed_synthetic: Path
) -> None:
    counted = json.loads((packed_synthetic / "statistics.json").read_text())["classes"]
    labels = open_labels(run, Path(run.run_dir), begun=False)
    assert labels.labels == tuple(sorted(counted))
    assert read_labels(Path(run.run_dir) / "labels.csv") == labels


def test_a_class_without_a_clip_is_refused_unless_allowed(run: FinetuneConfig) -> None:
    own = open_labels(run, Path(run.run_dir), begun=False)
    more = LabelSet((*own.labels, "yodel"), (*own.names, "yodel")).as_csv()
    with pytest.raises(ValueError, match=r"1 classes of which data.train has no clip.*'yodel'"):
        open_labels(with_labels(run, more), Path(run.run_dir), begun=False)
    allowed = with_labels(run, more, allow_empty=True)
    assert open_labels(allowed, Path(run.run_dir), begun=False).labels[-1] == "yodel"


def test_labels_that_are_no_classes_are_told_before_the_first_step(
    run: FinetuneConfig, val_shards: Path
) -> None:
    own = open_labels(run, Path(run.run_dir), begun=False)
    fewer = LabelSet(own.labels[1:], own.names[1:]).as_csv()
    with pytest.raises(ValueError, match=f"data.train has 1 labels.*{own.labels[0]}"):
        open_labels(with_labels(run, fewer), Path(run.run_dir), begun=False)


def test_clips_without_a_label_are_told_before_the_first_step(
    run: FinetuneConfig, packed_synthetic: Path, tmp_path: Path
) -> None:
    statistics = json.loads((packed_synthetic / "statistics.json").read_text())
    copy = tmp_path / "unlabelled"
    shutil.copytree(packed_synthetic / "frames", copy / "frames")
    (copy / "statistics.json").write_text(json.dumps(statistics | {"clips_without_label": 2}))
    data = dataclasses.replace(run.data, validation=str(copy / "frames"))
    with pytest.raises(ValueError, match=r"2 clips of data.validation have no label"):
        open_labels(dataclasses.replace(run, data=data), Path(run.run_dir), begun=False)


def test_a_run_goes_on_with_the_classes_that_it_began_with(run: FinetuneConfig) -> None:
    folder = Path(run.run_dir)
    own = open_labels(run, folder, begun=False)
    moved = with_labels(run, own.as_csv())
    assert open_labels(moved, folder, begun=True) == own
    turned = LabelSet(own.labels[::-1], own.names[::-1]).as_csv()
    with pytest.raises(ValueError, match="was started with other classes"):
        open_labels(with_labels(run, turned), folder, begun=True)


@pytest.mark.field
def test_counts_are_of_the_tier_and_not_of_the_folder_that_it_lies_in(
    run: FinetuneConfig, packed_synthetic: Path, val_shards: Path, tmp_path: Path
) -> None:
    expected = label_counts([str(packed_synthetic / "frames")])
    assert expected
    shutil.copytree(val_shards, tmp_path / "other")
    (tmp_path / "other/link").symlink_to(packed_synthetic / "frames")
    shutil.copytree(packed_synthetic / "frames", tmp_path / "other/copy")
    assert label_counts([str(tmp_path / "other/link")]) == expected
    assert label_counts([str(tmp_path / "other/copy")]) is None, "its set's are not beside it"
    own = open_labels(run, Path(run.run_dir), begun=False)
    data = dataclasses.replace(run.data, train=str(tmp_path / "other/link"))
    linked = with_labels(dataclasses.replace(run, data=data), f"{own.as_csv()}15,yodel,Yodel\n")
    with pytest.raises(ValueError, match=r"1 classes of which data.train has no clip.*'yodel'"):
        open_labels(linked, tmp_path, begun=False)
