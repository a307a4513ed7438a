"""Comparison of many runs: a table and a plot, both also logged to MLflow."""

import csv
import io
from pathlib import Path

from cavmae.atomic_write import read_json, write_text
from cavmae.console import print_json, print_rows
from cavmae.trainer.tracking.metrics_file import read_metrics
from cavmae.trainer.tracking.tracker import log_files

_OMITTED_SUFFIXES = ("_low", "_high", "_chance", "_p_value")


def compare(folder: Path, states: dict[str, str], *, as_json: bool) -> None:
    """Print a table of the runs; write `comparison.csv`, `comparison.png` and an MLflow run
    `comparison` beside the runs.

    Args:
        folder: folder of the run folders.
        states: state of each run, by name.
        as_json: print it as JSON.
    """
    runs = {name: _metrics(folder / name) for name in states}
    finals = {name: _final(folder / name, records) for name, records in runs.items()}
    columns = sorted({column for final in finals.values() for column in final})
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["run", "state", *columns])
    rows = []
    for name, state in states.items():
        values = [finals[name].get(column) for column in columns]
        rows.append((name, state, *("" if value is None else f"{value:.4g}" for value in values)))
        writer.writerow([name, state, *("" if value is None else value for value in values)])
    if as_json:
        print_json([{"run": name, "state": states[name], **finals[name]} for name in states])
    else:
        print_rows(("run", "state", *columns), rows)
    files = [folder / "comparison.csv", folder / "comparison.png"]
    write_text(files[0], text.getvalue())
    _plot(runs, finals, files[1])
    for name in states:
        if (folder / name / "run.json").exists():
            log_files(read_json(folder / name / "run.json"), "comparison", files)
            return


def _metrics(run_dir: Path) -> list[dict[str, float]]:
    path = run_dir / "metrics.jsonl"
    return list(read_metrics(path)) if path.exists() else []


def _final(run_dir: Path, records: list[dict[str, float]]) -> dict[str, float]:
    """Return the last step, the last loss, and the validation scores."""
    losses = [record for record in records if "loss" in record]
    final = {"step": losses[-1]["step"], "loss": losses[-1]["loss"]} if losses else {}
    summary = run_dir / "summary.json"
    if summary.exists():
        scores = read_json(summary)["scores"]
        final |= {
            name: score for name, score in scores.items() if not name.endswith(_OMITTED_SUFFIXES)
        }
    return final


def _plot(
    runs: dict[str, list[dict[str, float]]], finals: dict[str, dict[str, float]], path: Path
) -> None:
    """Plot losses over steps, and R@10 of each run where it was measured."""
    from matplotlib.figure import Figure

    from cavmae.trainer.tracking.figures import save_figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, records in runs.items():
        losses = [(record["step"], record["loss"]) for record in records if "loss" in record]
        left.plot(*zip(*sorted(losses), strict=True) if losses else ([], []), label=name)
    left.set(xlabel="step", ylabel="loss (weights differ between runs)")
    left.legend(fontsize="small")
    scores = sorted({name for final in finals.values() for name in final if name.endswith("r10")})
    for index, score in enumerate(scores):
        places = [place + 0.4 * index for place in range(len(finals))]
        heights = [final.get(score, 0.0) for final in finals.values()]
        right.barh(places, heights, height=0.4, label=score)
    right.set(yticks=range(len(finals)), yticklabels=list(finals), xlabel="validation R@10")
    if scores:
        right.legend(fontsize="small")
    save_figure(figure, path)
