"""`cavmae curve RUN_DIR PUBLISHED`: a run's metrics over those of a published training log.

The log is what the published code prints (the `.txt` files of its repository), or a table with a
row an epoch under the same names. Its pretraining losses are sums over four GPUs, which
`loss.scale` of the published recipes stands for, and its contrastive losses have their weight.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from cavmae.field_checks import CheckedFields
from cavmae.text_table import read_table, read_text
from cavmae.trainer.config.configs import PretrainConfig, RunConfig
from cavmae.trainer.config.serialize import load_run_config
from cavmae.trainer.tracking.metrics_file import read_metrics

# Of the published log, and of a run.
_COLUMNS = {
    "mAP": "val_mean_average_precision",
    "acc": "val_accuracy",
    "AUC": "val_mean_auc",
    "d_prime": "val_d_prime",
    "train_loss": "loss",
    "valid_loss": "val_loss",
    "Train Audio MAE Loss": "loss_reconstruction_audio",
    "Train Visual MAE Loss": "loss_reconstruction_video",
    "Train Contrastive Loss": "loss_contrastive",
    "Eval Audio MAE Loss": "val_loss_reconstruction_audio",
    "Eval Visual MAE Loss": "val_loss_reconstruction_video",
    "Eval Contrastive Loss": "val_loss_contrastive",
    "Eval Contrastive Accuracy": "val_contrastive_accuracy",
}
_END_OF_EPOCH = re.compile(r"Epoch-(\d+) lr: ")
_PANELS_A_ROW = 3


@dataclass(frozen=True)
class CurveConfig(CheckedFields):
    """Plot the metrics of a run, finished or not, over those of a published log."""

    run_dir: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")]
    """Folder of the run."""
    published: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PUBLISHED")]
    """Log of the published code (.txt), or a CSV file: `epoch`, then columns such as mAP, acc, AUC,
    d_prime, train_loss, valid_loss, Train Audio MAE Loss, Eval Contrastive Accuracy."""
    out: str = ""
    """PNG file; empty: in `figures` of the run folder."""


@dataclass(frozen=True)
class Curve:
    """A metric over epochs, of the run and of the log.

    Attributes:
        name: of the metric, as the run has it.
        run, published: epochs and values.
    """

    name: str
    run: list[tuple[float, float]]
    published: list[tuple[float, float]]


def curves(config: RunConfig, records: list[dict[str, float]], log: Path) -> list[Curve]:
    """Find the metrics that both have, in units of the run.

    Raises:
        ValueError: a log without epochs, or with no metric of the run.
        FileNotFoundError: no such log.
    """
    rows = _epochs(log)
    found = []
    for column, metric in _COLUMNS.items():
        of_run = [(one["epoch"], one[metric]) for one in records if {metric, "epoch"} <= one.keys()]
        of_log = [
            (
                _number(place, "epoch", row["epoch"]),
                _number(place, column, row[column]) / _units(config, metric),
            )
            for place, row in rows
            if row.get(column)
        ]
        if of_run and of_log:
            found.append(Curve(metric, sorted(of_run, key=lambda point: point[0]), of_log))
    if not found:
        raise ValueError(
            f"{log} has no metric that the run in {config.run_dir} has logged; its columns are "
            f"{', '.join(rows[0][1])}"
        )
    return found


def _epochs(log: Path) -> list[tuple[str, dict[str, str]]]:
    """Place and metrics of each epoch of a log."""
    rows: list[tuple[str, dict[str, str]]] = []
    printed: dict[str, str] = {}
    for number, line in enumerate(read_text(log).split("\n"), start=1):
        name, _, value = line.partition(": ")
        if name in _COLUMNS:
            printed[name] = value
        elif end := _END_OF_EPOCH.match(line):
            rows.append((f"{log}, epoch that ends in line {number}", {"epoch": end[1], **printed}))
            printed = {}
    if rows:
        return rows
    table = read_table(log)
    if not table.rows or "epoch" not in table.columns:
        raise ValueError(
            f"{log} has no rows with a column epoch; give a log of the published code, or a table"
        )
    return table.rows


def _number(place: str, column: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{place}: {column} is {text!r}, which is not a number") from None


def _units(config: RunConfig, metric: str) -> float:
    """Return the factor by which a published value is larger."""
    if not isinstance(config, PretrainConfig) or "loss" not in metric:
        return 1.0
    weight = config.loss.contrastive_weight if metric.endswith("loss_contrastive") else 1.0
    return config.loss.scale * weight


def plot(found: list[Curve], title: str, path: Path) -> None:
    """Draw a panel for each curve."""
    from matplotlib.figure import Figure

    from cavmae.trainer.tracking.figures import save_figure

    rows = -(-len(found) // _PANELS_A_ROW)
    figure = Figure(figsize=(5 * _PANELS_A_ROW, 3.5 * rows), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(rows, _PANELS_A_ROW, squeeze=False).flat
    for panel, curve in zip(panels, found, strict=False):
        panel.plot(*zip(*curve.published, strict=True), color="0.6", marker="o", label="published")
        panel.plot(*zip(*curve.run, strict=True), label="this run")
        panel.set(title=curve.name.replace("_", " "), xlabel="epoch")
        panel.legend(fontsize="small")
    for panel in list(panels)[len(found) :]:
        panel.set_axis_off()
    save_figure(figure, path)


def main(arguments: list[str]) -> int:
    """Run the command; returns its exit code."""
    asked = tyro.cli(CurveConfig, prog="cavmae curve", args=arguments)
    run_dir, log = Path(asked.run_dir), Path(asked.published)
    for name in ("config.json", "metrics.jsonl"):
        if not (run_dir / name).is_file():
            raise ValueError(f"run_dir is {run_dir}, which has no {name}; give a run's folder")
    config = load_run_config(run_dir / "config.json")
    found = curves(config, read_metrics(run_dir / "metrics.jsonl"), log)
    path = Path(asked.out or run_dir / "figures" / f"curve-{log.stem}.png")
    plot(found, f"{run_dir.name} and {log.stem}", path)
    for curve in found:
        epoch, value = curve.run[-1]
        nearest = min(curve.published, key=lambda point: abs(point[0] - epoch))
        print(
            f"{curve.name}: {value:.4g} at epoch {epoch:.4g}; published {nearest[1]:.4g} at "
            f"epoch {nearest[0]:g}"
        )
    print(f"plot: {path}")
    return 0
