"""`cavmae bench report`: the newest record of each benchmark on one page.

The page is Markdown, and the same as one self-contained HTML file with its pictures. The plot that
a benchmark wrote beside its record is among them.
"""

import base64
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tyro
from markdown_it import MarkdownIt

from cavmae.atomic_write import write_bytes, write_text
from cavmae.benchmarks.harness.records import RESULTS, Record, read_record
from cavmae.benchmarks.report.parts import Grid, Picture, Section, gigabytes
from cavmae.benchmarks.report.sections import section
from cavmae.html_page import page
from cavmae.trainer.tracking.tracker import flatten

ORDER = (
    *("step", "ablations", "train", "gpu-check", "kernels", "data", "tiers", "predict"),
    *("scaling", "overhead", "faults", "soak"),
)
"""The order of the sections; other kinds come after them."""


@dataclass(frozen=True)
class ReportConfig:
    """Write the newest record of each benchmark as a page with tables and plots."""

    results: str = RESULTS
    """Folder of the records."""
    out: str = "report.html"
    """HTML file; a Markdown file is written beside it."""


def main(arguments: list[str]) -> int:
    """Write the page; returns the exit code."""
    config = tyro.cli(ReportConfig, prog="cavmae bench report", args=arguments)
    for path in write_report(Path(config.results), Path(config.out)):
        print(f"report: {path}")
    return 0


def write_report(results: Path, out: Path) -> list[Path]:
    """Write the page of all records in a folder.

    Args:
        results: the folder.
        out: HTML file. `<name>.md` is written beside it, with its pictures in `<name>_files`.

    Returns:
        The HTML file and the Markdown file.

    Raises:
        ValueError: no record in the folder, or `out` is not an HTML file.
        OSError: a file can't be read or written.
    """
    if out.suffix != ".html":
        raise ValueError(f"out is {out}; name an HTML file, such as report.html")
    records, refused = _read_all(results)
    if not records:
        raise ValueError(f"results is {results}, which has no record; run a benchmark first")
    sections = _sections(records)
    out.parent.mkdir(parents=True, exist_ok=True)
    body = _markdown(sections, refused, _embedded)
    write_text(out, page("cavmae benchmarks", MarkdownIt("js-default").render(body)))
    text = out.with_suffix(".md")
    write_text(text, _markdown(sections, refused, lambda one: _beside(one, out)))
    return [out, text]


def _read_all(folder: Path) -> tuple[list[Record], list[str]]:
    """Read all records of a folder, the newest first, and why other JSON files are not records."""
    records, refused = [], []
    for path in sorted(folder.glob("*.json")):
        try:
            records.append(read_record(path))
        except ValueError as error:
            refused.append(str(error))
    return sorted(records, key=lambda one: one.time, reverse=True), refused


def _sections(records: list[Record]) -> dict[str, tuple[Record, list[Record], Section]]:
    """Make for each kind the newest record, the older ones, and the section of the newest."""
    kinds: dict[str, list[Record]] = {}
    for record in records:
        kinds.setdefault(record.suite, []).append(record)
    order = [kind for kind in ORDER if kind in kinds] + sorted(kinds.keys() - set(ORDER))
    found = {}
    for kind in order:
        newest, *older = kinds[kind]
        picture = newest.path.with_suffix(".png")
        made = section(newest, records)
        if picture.exists():
            made += Section(
                pictures=[Picture(f"{kind}, drawn with the record", picture.read_bytes())]
            )
        found[kind] = (newest, older, made)
    return found


# ----------------------------------------------------------------------------------- Markdown


def _markdown(
    sections: dict[str, tuple[Record, list[Record], Section]],
    refused: list[str],
    place: Callable[[Picture], str],
) -> str:
    """Format the page; `place` returns the URL of a picture."""
    overview = Grid(
        "Records",
        ("benchmark", "time", "commit", "on"),
        [(kind, one.time, one.commit, _machine(one)) for kind, (one, _, _) in sections.items()],
    )
    blocks = ["# Benchmarks of cavmae", *_grid(overview)]
    blocks += [f"Not a record: {_escaped(reason)}" for reason in refused]
    for kind, (record, older, made) in sections.items():
        blocks += [f"## {_escaped(kind)}", *_provenance(record, older)]
        blocks += [_escaped(words) for words in made.words]
        for grid in made.grids:
            blocks += _grid(grid)
        blocks += [f"![{_escaped(one.title)}]({place(one)})" for one in made.pictures]
    return "\n\n".join(blocks) + "\n"


def _provenance(record: Record, older: list[Record]) -> list[str]:
    """Format what makes the numbers comparable: commit, machine, versions, settings."""
    packages = [f"{name} {version}" for name, version in record.versions.items() if version]
    settings = [
        f"{name} {value}"
        for name, value in flatten(record.configuration).items()
        if value not in (None, "")
    ]
    lines = [
        f"Record: `{record.path.name}`, {record.time}, commit {record.commit}.",
        f"Machine: {_escaped(_machine(record))}. Versions: {_escaped(', '.join(packages))}.",
        f"Settings: {_escaped(', '.join(settings))}.",
    ]
    if older:
        names = ", ".join(f"`{one.path.name}`" for one in older)
        lines.append(f"Older records, not shown: {names}.")
    return lines


def _machine(record: Record) -> str:
    found = record.hardware
    where = f"{found.get('cores', '?')} cores of {found.get('processor', 'unknown processor')}"
    if "memory_bytes" in found:
        where += f", {gigabytes(found['memory_bytes'])}"
    if "gpu" in found:
        where = f"{found.get('gpu_count', 1)} x {found['gpu']}, CUDA {found.get('cuda')}; {where}"
    return where


def _grid(grid: Grid) -> list[str]:
    if not grid.rows:
        return [f"### {_escaped(grid.title)}", "No rows."]
    rows = [grid.header, tuple("---" for _ in grid.header), *grid.rows]
    lines = [
        "| " + " | ".join(cells if place == 1 else map(_escaped, cells)) + " |"
        for place, cells in enumerate(rows)
    ]
    return [f"### {_escaped(grid.title)}", "\n".join(lines)]


def _escaped(text: str) -> str:
    """Escape text for Markdown, on one line."""
    return re.sub(r"([\\`*_\[\]<>|#~])", r"\\\1", " ".join(text.split()))


def _embedded(picture: Picture) -> str:
    return f"data:image/png;base64,{base64.b64encode(picture.png).decode()}"


def _beside(picture: Picture, out: Path) -> str:
    """Write a picture to the folder beside the page; returns its URL relative to the page."""
    folder = out.with_name(f"{out.stem}_files")
    folder.mkdir(exist_ok=True)
    name = re.sub(r"\W+", "-", picture.title.lower()) + ".png"
    write_bytes(folder / name, picture.png)
    return f"{folder.name}/{name}"
