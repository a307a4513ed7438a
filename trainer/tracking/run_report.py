"""`cavmae report RUN`: one page on a run, which its end writes too.

The page is made of the files in the run folder alone, so it can be written anywhere and at any
time, also while the run trains or after it has failed. It is one file and loads nothing.
"""

import dataclasses
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from cavmae.atomic_write import read_json, write_text
from cavmae.console import clock
from cavmae.credentials import redacted
from cavmae.field_checks import CheckedFields
from cavmae.html_page import element, grid, page, picture
from cavmae.trainer.config.configs import RunConfig
from cavmae.trainer.config.recipes import RECIPES
from cavmae.trainer.config.serialize import load_run_config
from cavmae.trainer.run_status import read_status
from cavmae.trainer.tracking.line_chart import Points, line_chart
from cavmae.trainer.tracking.metrics_file import read_metrics
from cavmae.trainer.tracking.tracker import flatten
from cavmae.trainer.trained_on import TrainedOn

log = logging.getLogger(__name__)

FILE = "report.html"
CLIPS_LISTED = 50
RECORDS_READ = 5000
"""Of the metrics of steps: a tenth of a second."""
_CURVES = {
    "loss": ("loss", "val_loss"),
    "parts of the loss": (
        *("loss_reconstruction_audio", "loss_reconstruction_video", "loss_contrastive"),
    ),
    "validation R@10": ("val_audio_to_video_r10", "val_video_to_audio_r10"),
    "validation mAP and accuracy": ("val_mean_average_precision", "val_accuracy"),
    "gradient norm": ("gradient_norm",),
    "learning rate": ("learning_rate",),
    "samples/s": ("samples_per_second",),
    "tokens/s": ("tokens_per_second",),
    "TFLOP/s of a rank": ("tflops_per_rank",),
    "MFU": ("mfu",),
    "share of the time that waits for data": ("data_wait_share",),
    "peak memory of the first rank, bytes": ("peak_memory_bytes",),
}
_FILLED_IN = ("run_dir", "steps", "lanes", "threads_per_rank", "data.train", "data.validation")
"""Fields that every run has its own values of; the page has them elsewhere, or they follow."""

Records = list[dict[str, float]]


@dataclass(frozen=True)
class ReportConfig(CheckedFields):
    """Write one page on a run, finished or not: command, configuration, data, curves, pictures,
    scores, hardware, time by part, faults.

    Raises:
        ValueError: it is no run folder, or a file in it is damaged.
    """

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of the run."""
    out: str = ""
    """HTML file; empty: report.html in the run folder."""


def main(arguments: list[str]) -> int:
    """Run the command; returns its exit code."""
    config = tyro.cli(ReportConfig, prog="cavmae report", args=arguments)
    out = Path(config.out or Path(config.run) / FILE)
    write_report(Path(config.run), out)
    print(f"report: {out}")
    return 0


def report_or_warn(run_dir: Path) -> None:
    """Write the page of a run that has ended; whatever goes wrong is only logged."""
    try:
        write_report(run_dir, run_dir / FILE)
    except Exception as error:  # the run is worth more than a page on it
        log.warning("%s could not be written: %s", run_dir / FILE, error)


def write_report(run_dir: Path, out: Path) -> None:
    """Write the page.

    Raises:
        ValueError: it is no run folder, or a file in it is damaged.
        OSError: a file can't be read or written.
    """
    if not (run_dir / "config.json").is_file():
        raise ValueError(f"run is {run_dir}, which has no config.json; give the folder of a run")
    config = load_run_config(run_dir / "config.json")
    record, summary = (_read(run_dir / name) for name in ("run.json", "summary.json"))
    metrics = run_dir / "metrics.jsonl"
    records = read_metrics(metrics, RECORDS_READ) if metrics.exists() else []
    sections = {
        "Command": _command(record),
        "Configuration": _configuration(config, record),
        "Data": _data(config, run_dir),
        "Scores": _scores(run_dir, records),
        "Curves": _curves(records),
        "Pictures": _pictures(run_dir),
        "Time": _time(records, summary),
        "Hardware": _hardware(record),
        "Faults": _faults(run_dir, records, summary),
    }
    name = run_dir.resolve().name
    status = read_status(run_dir)
    state = f"{status.describe()}, step {status.progress()}" if status else "no status"
    written = time.strftime("%Y-%m-%d %H:%M:%S %z")
    body = [element("h1", name), element("p", f"{state}. Written {written}.")]
    for title, parts in sections.items():
        body += [element("h2", title), *(parts or [element("p", "Nothing on record.")])]
    write_text(out, page(f"{name}: a run of cavmae", redacted("\n".join(body))))


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _command(record: dict[str, Any]) -> list[str]:
    commands = record.get("commands", [])
    return [element("pre", one) for one in dict.fromkeys(commands)]


def _configuration(config: RunConfig, record: dict[str, Any]) -> list[str]:
    """The fields that differ from the recipe of the newest command, else from the defaults."""
    words = (record.get("commands") or [""])[-1].split()
    recipe = next((word for word in words if word in RECIPES), "")
    base = RECIPES[recipe]() if recipe else type(config)()
    before, now = (flatten(dataclasses.asdict(one)) for one in (base, config))
    rows = [
        (name, before.get(name, ""), value)
        for name, value in now.items()
        if before.get(name) != value and name not in _FILLED_IN
    ]
    own = [(name, now[name]) for name in _FILLED_IN]
    beside = f"recipe {recipe}" if recipe else "defaults"
    return [grid((), own), grid(("field", beside, "this run"), rows)]


def _data(config: RunConfig, run_dir: Path) -> list[str]:
    trained = TrainedOn.beside(run_dir)
    rows = [(one.name, one.clips, one.fingerprint) for one in trained.sets]
    rows += [(name, "unknown", "unknown") for name in trained.unknown]
    validation = element("p", f"Validated on {config.data.validation or 'nothing'}.")
    return [grid(("trained on", "clips", "fingerprint"), rows), validation]


def _scores(run_dir: Path, records: Records) -> list[str]:
    documents: dict[str, dict[str, Any]] = {}
    for kind, prefix in (("validation", "val_"), ("averaged weights", "averaged_")):
        scored = (one for one in reversed(records) if any(name.startswith(prefix) for name in one))
        if last := next(scored, None):
            documents[f"{kind} at step {last['step']:g}"] = dict(last)
    for path in sorted((run_dir / "evaluation").glob("*.json")):
        documents[f"evaluation/{path.name}"] = read_json(path)
    parts = []
    for name, document in documents.items():
        values = flatten(document)
        rows = list(_score_rows(values))
        if rows:
            of = f" on {values['options.shards']}" if "options.shards" in values else ""
            header = ("score", "value", "95% interval", "chance")
            parts += [element("h3", f"{name}{of}"), grid(header, rows)]
    return parts


def _score_rows(values: dict[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """Yield the numbers that have an interval, and those whose name says that they have none."""
    for name, value in values.items():
        whole = name.endswith(("loss", "median_rank")) and "chance" not in name
        if not isinstance(value, float) or not (whole or f"{name}_low" in values):
            continue
        low, high, chance = (values.get(f"{name}_{end}") for end in ("low", "high", "chance"))
        interval = "" if None in (low, high) else f"{low:.4g} to {high:.4g}"
        yield name, f"{value:.4g}", interval, "" if chance is None else f"{chance:.4g}"


def _curves(records: Records) -> list[str]:
    parts = []
    for title, names in _CURVES.items():
        found: dict[str, Points] = {}
        for name in names:
            points = [(one["step"], one[name]) for one in records if name in one]
            if any(value - value == 0 for _, value in points):  # is finite
                found[name] = points
        if found:
            parts.append(picture(line_chart(title, found).encode(), title, "svg+xml"))
    return parts


def _pictures(run_dir: Path) -> list[str]:
    """The newest picture of each kind, and those of evaluations."""
    newest = {
        path.name.partition("-step-")[0]: path
        for path in sorted((run_dir / "figures").glob("*.png"))
    }
    return [
        element("h3", path.relative_to(run_dir)) + picture(path.read_bytes(), path.name)
        for path in [*newest.values(), *sorted((run_dir / "evaluation").glob("*.png"))]
    ]


def _time(records: Records, summary: dict[str, Any]) -> list[str]:
    """Seconds by part of all attempts, as far as they were logged."""
    ended = records and summary.get("step", -1) >= records[-1]["step"]
    counted = [*records, summary.get("times", {})] if ended else records
    total = _increase(counted, "attempt_seconds")
    if not total:
        return []
    parts = {
        "waiting for data": _increase(counted, "data_wait_seconds"),
        "validation": _increase(counted, "validation_seconds"),
        "checkpoints": _increase(counted, "checkpoint_seconds"),
    }
    parts["training"] = total - sum(parts.values())
    rows = [(name, clock(value), f"{value / total:.1%}") for name, value in parts.items()]
    note = "On the first rank, in the training loops up to the last logged step of each attempt."
    return [grid(("part", "time", "share"), [*rows, ("all", clock(total), "")]), element("p", note)]


def _hardware(record: dict[str, Any]) -> list[str]:
    machines = [flatten(one) for one in record.get("hardware", [])]
    different = [one for n, one in enumerate(machines) if one not in machines[:n]]
    return [grid((), one.items()) for one in different]


def _faults(run_dir: Path, records: Records, summary: dict[str, Any]) -> list[str]:
    status = read_status(run_dir)
    states = sorted((run_dir / "checkpoints").glob("step-*/attempt-*/run_state.json"))
    quarantine = read_json(states[-1])["quarantine"] if states else []
    rows = [
        ("attempts", status.attempt if status else "unknown"),
        ("last error", (status.last_error if status else "") or "none"),
        ("skipped updates", f"{_increase(records, 'skipped_updates'):g}"),
        ("failed checkpoints", f"{_increase(records, 'checkpoint_failures'):g}"),
        ("quarantined clips", max(len(quarantine), summary.get("quarantined", 0))),
        ("hangs that the watchdog ended", len(list((run_dir / "hangs").glob("*")))),
        ("snapshots of full memory", len(list((run_dir / "out-of-memory").glob("*")))),
    ]
    parts = [grid((), rows)]
    if quarantine:
        parts.append(grid(("clip", "reason"), quarantine[:CLIPS_LISTED]))
    return parts


def _increase(records: Records, name: str) -> float:
    """Add up a count, or seconds, that begin anew with each attempt."""
    total, before = 0.0, 0.0
    for value in (one[name] for one in records if name in one):
        total += value - before if value >= before else value
        before = value
    return total
