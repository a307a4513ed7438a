"""`cavmae classify RUN FILES...`: the classes of files, by a fine-tuned model."""

import csv
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from cavmae.atomic_write import atomic_write
from cavmae.console import JsonOption, counted, print_json, print_row
from cavmae.field_checks import CheckedFields, PositiveInt
from cavmae.trainer.inference.inputs import Skipped, listed_files
from cavmae.trainer.inference.load import load


@dataclass(frozen=True)
class ClassifyFilesConfig(CheckedFields, JsonOption):
    """Print the classes with the highest scores of sounds, pictures and videos.

    Raises:
        ValueError: a field out of its range.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of a fine-tuned run or of an exported classifier, the name of one on the Hub, or a
    file of published weights."""
    files: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """Paths and URLs; folders, with all files in them; `-`: one in each line of standard input."""
    top: PositiveInt = 5
    """Classes that are printed for each file."""
    out: str = ""
    """CSV file for the scores of all classes, a row for each file."""
    batch: PositiveInt = 16
    """Windows that are classified together."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.out and not self.out.endswith(".csv"):
            raise ValueError(f"out is {self.out}; give the name of a .csv file")


def main(arguments: list[str]) -> int:
    """Run the command; returns its exit code: 1 if no file can be used."""
    config = tyro.cli(ClassifyFilesConfig, prog="cavmae classify", args=arguments)
    if not config.files:
        raise ValueError("no file is given; give paths, folders, URLs, or - for a list")
    model = load(config.model, batch=config.batch)
    names = list(listed_files(config.files))
    rows: list[list[str]] = []
    best: list[dict[str, object]] = []
    skipped = Skipped()

    labels: tuple[str, ...] = ()
    for number, found in model.classify_each(
        counted(names, "classifying", len(names), "files"),
        failed=lambda number, error: skipped.add(names[number], error),
    ):
        labels = found.labels
        for label, score in found.top(config.top):
            best.append({"path": names[number], "score": score, "label": label})
            if not config.json:
                print_row((names[number], f"{score:.4f}", label))
        rows.append([names[number], *(f"{score:.6g}" for score in found.scores.tolist())])
    if config.json:
        print_json(best)
    if config.out:
        Path(config.out).parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(Path(config.out)) as temporary, temporary.open("w", newline="") as file:
            csv.writer(file).writerows([["path", *labels], *rows])
    if skipped.reasons:
        print(f"{len(rows)} files, {len(skipped.reasons)} skipped", file=sys.stderr)
    return 0 if rows else 1
