"""The classes of a classifier: which label is which number.

A label file is the published one: CSV with the columns index, mid, display_name. A clip is labelled
by mid; the display name is for people.
"""

import csv
import io
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from cavmae.atomic_write import write_text
from cavmae.dataloaders.packing.statistics import read_statistics
from cavmae.text_table import read_table
from cavmae.trainer.config.configs import FinetuneConfig

_COLUMNS = ["index", "mid", "display_name"]
_LISTED = 5


@dataclass(frozen=True)
class LabelSet:
    """Classes in the order of the classifier's outputs.

    Attributes:
        labels: as clips have them.
        names: for people.
    """

    labels: tuple[str, ...]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {label: number for number, label in enumerate(self.labels)}

    def targets(self, of_clips: Sequence[Sequence[str]], sample_ids: Sequence[str]) -> torch.Tensor:
        """Mark the classes of each clip.

        Args:
            of_clips: labels of each clip.
            sample_ids: of the clips, for errors.

        Returns:
            (clips, classes) float32, 1 where a clip has the class and 0 elsewhere.

        Raises:
            ValueError: a clip without a label, or with one that is no class.
        """
        targets = torch.zeros(len(of_clips), len(self))
        for row, (labels, sample_id) in enumerate(zip(of_clips, sample_ids, strict=True)):
            if not labels:
                raise ValueError(
                    f"clip {sample_id} has no label; pack the videos from a list with labels"
                )
            for label in labels:
                if label not in self._numbers:
                    raise ValueError(
                        f"clip {sample_id} has the label {label!r}, which is none of the "
                        f"{len(self)} classes ({', '.join(self.labels[:_LISTED])}, ...); add it to "
                        "them, or pack the videos with labels that are classes"
                    )
                targets[row, self._numbers[label]] = 1
        return targets

    def as_csv(self) -> str:
        """Return the content of the label file."""
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(_COLUMNS)
        rows = zip(self.labels, self.names, strict=True)
        writer.writerows([number, *row] for number, row in enumerate(rows))
        return text.getvalue()


def read_labels(path: str | Path) -> LabelSet:
    """Read a label file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: other columns, an index out of order, a label twice, or none at all.
    """
    table = read_table(path)
    missing = [name for name in _COLUMNS if name not in table.columns]
    if missing:
        raise ValueError(
            f"{table.place}: the column {missing[0]} is missing; a label file has "
            f"{', '.join(_COLUMNS)}"
        )
    if not table.rows:
        raise ValueError(f"{path} has no classes")
    names: dict[str, str] = {}
    for number, (place, row) in enumerate(table.rows):
        if row["index"].strip() != str(number):
            raise ValueError(
                f"{place}: class {number} has the index {row['index']!r}; number them from 0"
            )
        label, name = row["mid"].strip(), row["display_name"].strip()
        empty = [column for column in _COLUMNS if not row[column].strip()]
        if empty:
            raise ValueError(f"{place}: class {number} has no {empty[0]}; fill it in")
        if label in names:
            raise ValueError(f"{place}: the label {label!r} is there twice")
        names[label] = name
    return LabelSet(tuple(names), tuple(names.values()))


def open_labels(config: FinetuneConfig, run_dir: Path, *, begun: bool) -> LabelSet:
    """Find the classes of a run, those of a label file or the labels of its training set, and keep
    them as `labels.csv` in the run folder.

    Args:
        config: the run.
        run_dir: its folder.
        begun: whether it resumes; its classes must then be those that it began with.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that can't be used, no label file and none can be made, a class without
            a clip, or a set with labels that are no classes.
    """
    labels = _classes(config)
    for name, tiers in (("train", config.data.train_folders), ("validation", _validation(config))):
        unlabelled = clips_without_label(tiers)
        if unlabelled:
            raise ValueError(
                f"{unlabelled} clips of data.{name} have no label; pack the videos from a list "
                "with labels"
            )
        unknown = sorted((label_counts(tiers) or {}).keys() - set(labels.labels))
        if unknown:
            raise ValueError(
                f"data.{name} has {len(unknown)} labels that are no classes, such as "
                f"{_some(unknown)}; add them to the label file (classifier.labels), or pack the "
                "videos with labels of that file"
            )
    saved = run_dir / "labels.csv"
    if begun and saved.exists() and read_labels(saved) != labels:
        raise ValueError(
            f"the run in {run_dir} was started with other classes ({saved}); give the former "
            "label file, or another --run-dir to start anew"
        )
    write_text(saved, labels.as_csv())
    return labels


def label_counts(tiers: Iterable[str]) -> dict[str, int] | None:
    """Return the clips of each label in packed sets as packing counted them; None where its counts
    can't be read.

    Args:
        tiers: of the sets.
    """
    counts: Counter[str] = Counter()
    for statistics in map(read_statistics, tiers):
        if statistics is None:
            return None
        counts.update(statistics["classes"])
    return counts


def clips_without_label(tiers: Iterable[str]) -> int:
    """Count the clips of packed sets that have no label, as far as packing's counts can be read."""
    return sum(found["clips_without_label"] for found in map(read_statistics, tiers) if found)


def _classes(config: FinetuneConfig) -> LabelSet:
    asked = config.classifier
    counts = label_counts(config.data.train_folders)
    if asked.labels:
        labels = read_labels(asked.labels)
        empty = [] if counts is None else [one for one in labels.labels if not counts.get(one)]
        if empty and not asked.allow_empty_classes:
            raise ValueError(
                f"{asked.labels} has {len(empty)} classes of which data.train has no clip, such as "
                f"{_some(empty)}; take them out, or set classifier.allow_empty_classes"
            )
        return labels
    if counts is None:
        raise ValueError(
            "classifier.labels is empty, and what packing counted (statistics.json beside the "
            "folder of the tier) can't be read; give the label file"
        )
    if not counts:
        raise ValueError(
            f"no clip of data.train {config.data.train} has a label; pack the videos from a list "
            "with labels"
        )
    names = tuple(sorted(counts))
    return LabelSet(names, names)


def _validation(config: FinetuneConfig) -> list[str]:
    return [config.data.validation] if config.data.validation else []


def _some(labels: Sequence[str]) -> str:
    return ", ".join(map(repr, labels[:_LISTED]))
