"""Report sections of training: steps over batch sizes, the loop, and a step by its parts."""

from typing import Any

from matplotlib.figure import Figure

from cavmae.benchmarks.harness.records import Record, extremes
from cavmae.benchmarks.report.parts import (
    Picture,
    Section,
    bars_grid,
    cell,
    drawn,
    gigabytes,
    milliseconds,
    named,
    share,
    shown,
    table,
)

_MODELS = ("cavmae", "published")


def matrix_rates(records: list[Record], hardware: dict[str, Any]) -> dict[str, float]:
    """Return the flops a second of a large matrix product by dtype, as measured on that machine."""
    found = {}
    for record in sorted(records, key=lambda one: one.time):
        if record.hardware != hardware:
            continue
        results, settings = record.results, record.configuration
        if record.suite == "kernels":
            found[settings["dtype"]] = results["ceilings"]["flops_per_second"]
        if record.suite == "gpu-check" and (measured := details(record, "speed")):
            found[measured["sizes"]["dtype"]] = measured["ceilings"]["flops_per_second"]
        if record.suite == "train":
            found[settings["precision"]] = results["machine"]["flops_per_second"]
        if record.suite == "step":
            for precision, rates in results.get("machine", {}).items():
                found[precision] = rates["flops_per_second"]
    return found


def details(record: Record, stage: str) -> dict[str, Any]:
    """Return the details of a stage of a GPU check; empty where it found none."""
    return record.results.get(stage, {}).get("details", {})


# --------------------------------------------------------------------------------------- step


def steps(results: dict[str, Any], rates: dict[str, float]) -> Section:
    """Show both models and the ratio of neighbouring steps, by precision and batch size.

    Args:
        results: results of `cavmae bench step`.
        rates: matrix rates by dtype, for records without rates.
    """
    rows, words = [], []
    for name, result in results.items():
        if name == "machine":
            continue
        precision = result.get("precision", name)
        for model in _MODELS:
            if "tflops" in (one := result.get(model, {})):
                batch, mfu = result.get("batch"), _mfu(one, rates.get(precision))
                line = {"line": f"{precision}, {model}", "batch": batch, "mfu": mfu}
                rows.append(one | line | {"name": f"{name}, {model}"})
            elif one:
                words.append(f"{name}, {model}: {one['skipped']}")
        if ratio := result.get("speedup"):
            text = f"{name}: {extremes(ratio)} as fast as the published step"
            if memory := result.get("memory"):
                text += (
                    f", {memory['ratio']:.2f} times its memory (at most {memory['bar']}: "
                    f"{'met' if memory['met'] else 'NOT met'})"
                )
            words.append(f"{text}.")
    if any(row["mfu"] is None for row in rows):
        words.append(
            "MFU needs the matrix rate of just this machine in each dtype: run cavmae bench step "
            "on it."
        )
    columns = {
        "step": cell("name"),
        "median": cell("median_seconds", milliseconds),
        **_RATES,
        "peak memory": cell("peak_memory_bytes", gigabytes),
        "J a sample": cell("energy.joules_per_sample"),
    }
    points = [row for row in rows if row["batch"] is not None]
    sweep = len({row["line"] for row in points}) < len(points)
    picture = _over_batches("Over batch sizes", points) if sweep else _boxes(rows)
    return Section(words, [table("Training step", columns, rows)], [picture])


_RATES = {
    "samples/s": cell("samples_per_second"),
    "TFLOP/s": cell("tflops"),
    "MFU": cell("mfu", share),
    "of datasheet": cell("mfu_of_datasheet", share),
}


def _mfu(one: dict[str, Any], rate: float | None) -> float | None:
    return one.get("mfu", one["tflops"] * 1e12 / rate if rate else None)


def _boxes(rows: list[dict[str, Any]]) -> Picture:
    figure = Figure(figsize=(8, 0.8 + 0.5 * len(rows)), layout="constrained")
    axis = figure.subplots()
    names, times = [row["name"] for row in rows], [row["all_seconds"] for row in rows]
    axis.boxplot(times, orientation="horizontal", tick_labels=names)
    axis.invert_yaxis()
    axis.set(xlabel="seconds of a step", xlim=(0, None))
    return drawn("Time of a step", figure)


def _over_batches(title: str, rows: list[dict[str, Any]]) -> Picture:
    """Draw throughput, MFU and memory over batch size, as far as they are known, a line for each
    name of a `line`."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    axes = figure.subplots(1, 3)
    panels = (
        ("samples_per_second", "samples/s", 1),
        ("mfu", "MFU, % of the measured matrix rate", 100),
        ("peak_memory_bytes", "peak memory, GB", 1e-9),
    )
    for axis, (key, label, scale) in zip(axes, panels, strict=True):
        for name in dict.fromkeys(row["line"] for row in rows):
            known = [row for row in rows if row["line"] == name and row[key] is not None]
            values = [scale * row[key] for row in known]
            axis.plot([row["batch"] for row in known], values, "o-", label=name)
        axis.set(xlabel="batch", ylabel=label, ylim=(0, None))
    axes[0].legend(fontsize="small")
    return drawn(title, figure)


def throughput(rows: list[dict[str, Any]], matrix_rate: float | None) -> Section:
    """Show our step in bf16 over batch sizes, from a GPU check."""
    rows = [
        row | {"line": "compiled" if row["compile"] else "eager", "mfu": _mfu(row, matrix_rate)}
        for row in rows
    ]
    columns = {
        "batch": lambda row: f"{row['batch']}{', compiled' if row['compile'] else ''}",
        **_RATES,
        "peak memory": cell("peak_memory_bytes", gigabytes),
    }
    title = "Throughput and memory over batch size, bf16"
    return Section(grids=[table(title, columns, rows)], pictures=[_over_batches(title, rows)])


# -------------------------------------------------------------------------------------- train


def ablations(results: dict[str, Any]) -> Section:
    """Show time and memory of a step with one change, over those of the step that runs do."""
    factor = "{:.3f}".format
    columns = {
        "precision": cell("precision"),
        "change": cell("name"),
        "time, times as much": cell("ratio.median", factor),
        "from": cell("ratio.minimum", factor),
        "to": cell("ratio.maximum", factor),
        "memory, times as much": cell("memory_ratio", factor),
    }
    rows = [
        {"precision": precision} | change
        for precision, changes in results.items()
        for change in named(changes)
    ]
    return Section(grids=[table("A step with one thing changed", columns, rows)])


def train(results: dict[str, Any]) -> Section:
    """Show the loop on each source of batches, and a step by its parts beside their floors."""
    rates = results["machine"]
    stated = rates["datasheet"]
    sources = {name: one for name, one in results.items() if "parts" in one}
    words = [
        f"The machine in the same run: a matrix product {rates['flops_per_second'] / 1e12:.3g} "
        f"TFLOP/s, a copy {rates['bytes_per_second'] / 1e9:.4g} GB/s. Datasheet: "
        f"{stated['name'] + ', ' + stated['source'] if stated else 'none known'}. Energy: "
        f"{', '.join(dict.fromkeys(one['energy']['source'] for one in sources.values()))}."
    ]
    columns = {
        "batches": cell("name"),
        "median step": cell("step.median_seconds", milliseconds),
        **_RATES,
        "waits for data": cell("shares.data_wait", "{:.2%}".format),
        "loop": cell("shares.loop", "{:.2%}".format),
        "peak memory": cell("peak_memory_bytes", gigabytes),
        "J a sample": cell("energy.joules_per_sample"),
    }
    grids = [table("Training loop", columns, named(sources)), bars_grid(results["bars"])]
    found = Section(words, grids)
    for name, one in sources.items():
        if one["parts"]:
            found += _parts(f"A step by parts, {name} batches", one["parts"])
    return found


def _parts(title: str, parts: dict[str, Any]) -> Section:
    rows = [
        one | {"name": part if kind == "step" else f"{part}, {kind}"}
        for part, kinds in parts.items()
        for kind, one in kinds.items()
    ]
    for row in rows:
        if "floor_seconds" in row:
            row["times_floor"] = row["median_seconds"] / row["floor_seconds"]
    columns = {
        "part": cell("name"),
        "median": cell("median_seconds", milliseconds),
        "floor": cell("floor_seconds", milliseconds),
        "times the floor": cell("times_floor", "{:.2f}".format),
        "GFLOP": lambda row: shown(row["flops"] / 1e9) if row.get("flops") else "-",
        "least bytes": cell("bytes", gigabytes),
    }
    figure = Figure(figsize=(9, 0.9 + 0.28 * len(rows)), layout="constrained")
    axis = figure.subplots()
    for key, label, style in (
        ("median_seconds", "measured", {}),
        ("floor_seconds", "floor", {"height": 0.35, "color": "black"}),
    ):
        places = [place for place, row in enumerate(rows) if key in row]
        axis.barh(places, [1e3 * rows[place][key] for place in places], label=label, **style)
    axis.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axis.invert_yaxis()
    axis.set_xlabel("ms of a step")
    axis.legend()
    return Section(grids=[table(title, columns, rows)], pictures=[drawn(title, figure)])
