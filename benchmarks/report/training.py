"""Report sections of training: steps over batch sizes, the loop, and a step by its parts."""

from typing import Any

from matplotlib.figure import Figure

from cavmae.benchmarks.harness.records import Record
from cavmae.benchmarks.report.parts import (
    Grid,
    Picture,
    Section,
    bars_grid,
    drawn,
    gigabytes,
    milliseconds,
    share,
    shown,
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
        if record.suite == "gpu-check" and (measured := details(record, "kernels")):
            found[measured["sizes"]["dtype"]] = measured["ceilings"]["flops_per_second"]
        if record.suite == "train":
            found[settings["precision"]] = results["machine"]["flops_per_second"]
        if record.suite == "step":
            for precision, rates in results.get("machine", {}).items():
                found[precision] = rates["flops_per_second"]
    return found


def details(record: Record, part: str) -> dict[str, Any]:
    """Return the details of a part of a GPU check; empty where it was skipped or failed early."""
    return record.results.get(part, {}).get("details", {})


# --------------------------------------------------------------------------------------- step


def steps(results: dict[str, Any], rates: dict[str, float]) -> Section:
    """Show both models and the ratio of neighbouring steps, by precision and batch size.

    Args:
        results: results of `cavmae bench step`.
        rates: matrix rates by dtype, for records without rates.
    """
    timed = {name: one for name, one in results.items() if name != "machine"}
    rows, words = [], []
    for name, result in timed.items():
        rate = rates.get(result.get("precision", name))
        for model in _MODELS:
            if "tflops" not in (one := result.get(model, {})):
                words += [f"{name}, {model}: {one['skipped']}"] if one else []
                continue
            rows.append(
                (
                    f"{name}, {model}",
                    milliseconds(one["median_seconds"]),
                    shown(one["samples_per_second"]),
                    shown(one["tflops"]),
                    share(_mfu(one, rate)),
                    share(one.get("mfu_of_datasheet")),
                    gigabytes(one["peak_memory_bytes"]),
                    shown(one.get("energy", {}).get("joules_per_sample")),
                )
            )
        if ratio := result.get("speedup"):
            text = (
                f"{name}: {ratio['median']:.2f} times as fast as the published step "
                f"({ratio['minimum']:.2f} to {ratio['maximum']:.2f})"
            )
            if memory := result.get("memory"):
                text += (
                    f", {memory['ratio']:.2f} times its memory (at most {memory['bar']}: "
                    f"{'met' if memory['met'] else 'NOT met'})"
                )
            words.append(f"{text}.")
    if any(row[4] == "-" for row in rows):
        words.append(
            "MFU needs the matrix rate of just this machine in each dtype: run cavmae bench step "
            "on it."
        )
    header = (
        *("step", "median", "samples/s", "TFLOP/s", "MFU", "of datasheet", "peak memory"),
        "J a sample",
    )
    lines = _lines(timed, rates)
    sweep = any(len(points) > 1 for points in lines.values())
    picture = _over_batches("Over batch sizes", lines) if sweep else _boxes(timed)
    return Section(words, [Grid("Training step", header, rows)], [picture])


def _mfu(one: dict[str, Any], rate: float | None) -> float | None:
    return one.get("mfu", one["tflops"] * 1e12 / rate if rate else None)


def _boxes(timed: dict[str, Any]) -> Picture:
    times = {
        f"{name}, {model}": result[model]["all_seconds"]
        for name, result in timed.items()
        for model in _MODELS
        if "all_seconds" in result.get(model, {})
    }
    figure = Figure(figsize=(8, 0.8 + 0.5 * len(times)), layout="constrained")
    axis = figure.subplots()
    axis.boxplot(list(times.values()), orientation="horizontal", tick_labels=list(times))
    axis.invert_yaxis()
    axis.set(xlabel="seconds of a step", xlim=(0, None))
    return drawn("Time of a step", figure)


Point = tuple[int, float, float | None, float | None]
"""Batch, samples a second, MFU, bytes."""


def _lines(timed: dict[str, Any], rates: dict[str, float]) -> dict[str, list[Point]]:
    """Return what changes over batch sizes, by precision and model."""
    lines: dict[str, list[Point]] = {}
    for result in timed.values():
        for model in _MODELS:
            if "tflops" not in (one := result.get(model, {})) or "batch" not in result:
                continue
            mfu = _mfu(one, rates.get(result["precision"]))
            point = (result["batch"], one["samples_per_second"], mfu, one["peak_memory_bytes"])
            lines.setdefault(f"{result['precision']}, {model}", []).append(point)
    return lines


def _over_batches(title: str, lines: dict[str, list[Point]]) -> Picture:
    """Draw throughput, MFU and memory over batch size, as far as they are known."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    throughput, utilization, memory = figure.subplots(1, 3)
    for name, points in lines.items():
        batches = [point[0] for point in points]
        throughput.plot(batches, [point[1] for point in points], "o-", label=name)
        known = [(batch, mfu) for batch, _, mfu, _ in points if mfu is not None]
        utilization.plot([x for x, _ in known], [100 * y for _, y in known], "o-", label=name)
        held = [(batch, peak) for batch, _, _, peak in points if peak is not None]
        memory.plot([x for x, _ in held], [y / 1e9 for _, y in held], "o-", label=name)
    for axis, label in (
        *((throughput, "samples/s"), (utilization, "MFU, % of the measured matrix rate")),
        (memory, "peak memory, GB"),
    ):
        axis.set(xlabel="batch", ylabel=label, ylim=(0, None))
    throughput.legend(fontsize="small")
    return drawn(title, figure)


def throughput(rows: list[dict[str, Any]], matrix_rate: float | None) -> Section:
    """Show our step in bf16 over batch sizes, from a GPU check."""
    cells = [
        (
            f"{row['batch']}{', compiled' if row['compile'] else ''}",
            shown(row["samples_per_second"]),
            shown(row["tflops"]),
            share(_mfu(row, matrix_rate)),
            share(row.get("mfu_of_datasheet")),
            gigabytes(row["peak_memory_bytes"]),
        )
        for row in rows
    ]
    lines: dict[str, list[Point]] = {}
    for row in rows:
        mfu = _mfu(row, matrix_rate)
        point = (row["batch"], row["samples_per_second"], mfu, row["peak_memory_bytes"])
        lines.setdefault("compiled" if row["compile"] else "eager", []).append(point)
    title = "Throughput and memory over batch size, bf16"
    header = ("batch", "samples/s", "TFLOP/s", "MFU", "of datasheet", "peak memory")
    return Section(grids=[Grid(title, header, cells)], pictures=[_over_batches(title, lines)])


# -------------------------------------------------------------------------------------- train


def ablations(results: dict[str, Any]) -> Section:
    """Show time and memory of a step with one change, over those of the step that runs do."""
    header = ("precision", "change", "time, times as much", "from", "to", "memory, times as much")
    rows = [
        (
            precision,
            name,
            *(f"{one['ratio'][key]:.3f}" for key in ("median", "minimum", "maximum")),
            f"{one['memory_ratio']:.3f}",
        )
        for precision, changes in results.items()
        for name, one in changes.items()
    ]
    return Section(grids=[Grid("A step with one thing changed", header, rows)])


def train(results: dict[str, Any]) -> Section:
    """Show the loop on each source of batches, and a step by its parts beside their floors."""
    rates = results["machine"]
    stated = rates["datasheet"]
    sources = {name: one for name, one in results.items() if "parts" in one}
    rows = [
        (
            name,
            milliseconds(one["step"]["median_seconds"]),
            shown(one["samples_per_second"]),
            shown(one["tflops"]),
            share(one["mfu"]),
            share(one["mfu_of_datasheet"]),
            *(f"{one['shares'][part]:.2%}" for part in ("data_wait", "loop")),
            gigabytes(one["peak_memory_bytes"]),
            shown(one["energy"]["joules_per_sample"]),
        )
        for name, one in sources.items()
    ]
    words = [
        f"The machine in the same run: a matrix product {rates['flops_per_second'] / 1e12:.3g} "
        f"TFLOP/s, a copy {rates['bytes_per_second'] / 1e9:.4g} GB/s. Datasheet: "
        f"{stated['name'] + ', ' + stated['source'] if stated else 'none known'}. Energy: "
        f"{', '.join(dict.fromkeys(one['energy']['source'] for one in sources.values()))}."
    ]
    header = (
        *("batches", "median step", "samples/s", "TFLOP/s", "MFU", "of datasheet"),
        *("waits for data", "loop", "peak memory", "J a sample"),
    )
    found = Section(words, [Grid("Training loop", header, rows), bars_grid(results["bars"])])
    for name, one in sources.items():
        if one["parts"]:
            found += _parts(f"A step by parts, {name} batches", one["parts"])
    return found


def _parts(title: str, parts: dict[str, Any]) -> Section:
    rows = []
    for part, kinds in parts.items():
        for kind, one in kinds.items():
            floor = one.get("floor_seconds")
            rows.append(
                (
                    part if kind == "step" else f"{part}, {kind}",
                    milliseconds(one["median_seconds"]),
                    "-" if floor is None else milliseconds(floor),
                    "-" if floor is None else f"{one['median_seconds'] / floor:.2f}",
                    shown(one["flops"] / 1e9) if one.get("flops") else "-",
                    gigabytes(one.get("bytes")),
                )
            )
    figure = Figure(figsize=(9, 0.9 + 0.28 * len(rows)), layout="constrained")
    axis = figure.subplots()
    entries = [one for kinds in parts.values() for one in kinds.values()]
    axis.barh(range(len(rows)), [1e3 * one["median_seconds"] for one in entries], label="measured")
    floors = [(place, one["floor_seconds"]) for place, one in enumerate(entries)
              if "floor_seconds" in one]  # fmt: skip
    axis.barh(
        [place for place, _ in floors],
        [1e3 * floor for _, floor in floors],
        height=0.35,
        color="black",
        label="floor",
    )
    axis.set_yticks(range(len(rows)), [row[0] for row in rows])
    axis.invert_yaxis()
    axis.set_xlabel("ms of a step")
    axis.legend()
    header = ("part", "median", "floor", "times the floor", "GFLOP", "least bytes")
    return Section(grids=[Grid(title, header, rows)], pictures=[drawn(title, figure)])
