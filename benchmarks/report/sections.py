"""A section of `cavmae bench report` for each kind of record: its tables and plots."""

from collections.abc import Callable
from typing import Any

from matplotlib.figure import Figure

from cavmae.benchmarks.harness.measurements import PASSES
from cavmae.benchmarks.harness.records import Record
from cavmae.benchmarks.report.parts import (
    Grid,
    Picture,
    Section,
    bars_grid,
    drawn,
    gigabytes,
    met,
    milliseconds,
    numbers,
    share,
    shown,
)
from cavmae.benchmarks.report.training import (
    ablations,
    details,
    matrix_rates,
    steps,
    throughput,
    train,
)


def section(record: Record, others: list[Record]) -> Section:
    """Make the section of a record; of an unknown kind, its numbers.

    Args:
        record: the record to show.
        others: all records at hand; they may have a matrix rate of the same machine.
    """
    if record.suite == "step":
        return steps(record.results, matrix_rates(others, record.hardware))
    if record.suite == "gpu-check":
        return _gpu_check(record, others)
    if record.suite in _SECTIONS:
        return _SECTIONS[record.suite](record.results)
    raw = Grid("Numbers as recorded", ("name", "value"), list(numbers(record.results)))
    return Section(["This page has no tables for this kind of record."], [raw])


# ---------------------------------------------------------------------------------- GPU check


def _gpu_check(record: Record, others: list[Record]) -> Section:
    parts = [
        (name, part["status"], f"{part['seconds']:.0f} s", part["reason"])
        for name, part in record.results.items()
    ]
    found = Section(grids=[Grid("Parts", ("part", "status", "time", "reason"), parts)])
    rates = matrix_rates(others, record.hardware)
    if step := details(record, "step"):
        found += steps(step["precisions"], rates)
    if kernels := details(record, "kernels"):
        found += _kernels(kernels)
    rows = [row for row in details(record, "throughput").get("rows", []) if "tflops" in row]
    if rows:
        found += throughput(rows, rates.get("bf16"))
    if loop := details(record, "train"):
        found += train(loop)
    if limits := details(record, "limits"):
        found += Section(grids=[Grid("Limits", ("what", "value"), list(numbers(limits)))])
    return found


# ------------------------------------------------------------------------------------ kernels


def _kernels(results: dict[str, Any]) -> Section:
    rows = []
    for name, case in results["cases"].items():
        for kind, title in PASSES.items():
            if "ours" not in case.get(kind, {}):
                continue
            ours = case[kind]["ours"]
            others = ", ".join(
                f"{contender} {one['times_ours']['median']:.2f}x "
                f"({one['times_ours']['minimum']:.2f} to {one['times_ours']['maximum']:.2f})"
                for contender, one in case[kind].items()
                if contender != "ours"
            )
            rows.append(
                (
                    f"{name}, {title}",
                    milliseconds(ours["median_seconds"]),
                    share(ours["share_of_copy"]),
                    share(ours["share_of_product"]),
                    others,
                )
            )
    ceiling = results["ceilings"]
    words = [
        f"Ours are the {results['backend']} kernels. Ceilings measured in the same run: a copy "
        f"{ceiling['bytes_per_second'] / 1e9:.1f} GB/s, a matrix product "
        f"{ceiling['flops_per_second'] / 1e12:.3g} TFLOP/s."
    ]
    words += [
        f"{name}: {what}, {why}."
        for name, case in results["cases"].items()
        for what, why in case.get("failed", {}).items()
    ]
    header = ("operation", "ours", "of a copy", "of a product", "others, times ours")
    found = Section(words, [Grid("Operations", header, rows)])
    points = _roofline_points(results["cases"])
    return found + Section(pictures=[_roofline(points, ceiling)]) if points else found


def _roofline_points(cases: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Return operations a byte and operations a second, where both are known."""
    return {
        f"{name}, {title}": (one["flops_per_second"] / one["bytes_per_second"],
                             one["flops_per_second"])
        for name, case in cases.items()
        for kind, title in PASSES.items()
        if (one := case.get(kind, {}).get("ours"))
        and one["flops_per_second"] and one["bytes_per_second"]
    }  # fmt: skip


def _roofline(points: dict[str, tuple[float, float]], ceiling: dict[str, float]) -> Picture:
    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.subplots()
    copy, product = ceiling["bytes_per_second"], ceiling["flops_per_second"]
    ridge = product / copy
    reach = [ridge / 20, ridge, max(20 * ridge, *(2 * x for x, _ in points.values()))]
    axis.plot(reach, [min(product, x * copy) for x in reach], color="black", label="ceilings")
    for name, (x, y) in points.items():
        axis.plot([x], [y], "o", label=name)
    axis.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="operations a second")
    axis.legend(fontsize="small")
    return drawn("Roofline of operations that have both flops and bytes", figure)


# --------------------------------------------------------------------------------------- data


def _data(results: dict[str, Any]) -> Section:
    ways = [
        (
            name,
            shown(one["clips_per_second"]),
            milliseconds(one["cpu_seconds_per_clip"]),
            f"{one['first_batch_seconds']:.2f} s",
        )
        for name, one in results["contenders"].items()
    ]
    header = ("way", "clips/s", "CPU a clip", "first batch after")
    grids = [Grid("Ways to load 10 s clips", header, ways), bars_grid(results["bars"])]
    return Section(grids=grids)


def _tiers(results: dict[str, Any]) -> Section:
    header = ("way to store", "kB a clip", "CPU to encode", "CPU to decode", "clips/s", "PSNR, dB")
    rows = [
        (
            name,
            f"{one['bytes'] / 1e3:,.0f}",
            milliseconds(one["pack_cpu_seconds"]),
            milliseconds(one["decode_cpu_seconds"]),
            shown(one.get("decode_clips_per_second")),
            shown(one.get("psnr_db")),
        )
        for kind in ("pictures", "sound")
        for name, one in results[kind].items()
    ]
    words = []
    for name, one in results["pictures"].items():
        rates = (one["gpu_clips_per_second"] or {}).items()
        cells = [f"{rate:,.0f} clips/s with {count} pipelines" for count, rate in rates]
        words += [f"{name} on the GPU: {', '.join(cells)}."] if cells else []
    return Section(words or ["Not measured on a GPU."], [Grid("Of a clip", header, rows)])


# ------------------------------------------------------------------- many GPUs, and their ends


def _scaling(results: dict[str, Any]) -> Section:
    inputs = [(name, shown(one["value"]), one["source"]) for name, one in results["inputs"].items()]
    header = ("GPUs", "clips a step", "step", "samples/s", "efficiency", "goodput", "lasting/s")
    grids, lines = [], {}
    for name in ("weak", "strong"):
        line = [row for row in results[name] if row["zero_stage"] == 1]
        lines[name] = line
        rows = [
            (
                f"{row['gpus']:,}",
                f"{row['global_batch']:,}",
                milliseconds(row["step_seconds"]),
                f"{row['samples_per_second']:,.0f}",
                share(row["efficiency"]),
                share(row["goodput"]),
                f"{row['samples_per_second'] * row['goodput']:,.0f}",
            )
            for row in line
        ]
        grids.append(Grid(f"{name.capitalize()} scaling, ZeRO 1", header, rows))
    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    for name, line in lines.items():
        gpus = [row["gpus"] for row in line]
        axes[0].plot(gpus, [row["samples_per_second"] for row in line], "o-", label=name)
        axes[1].plot(gpus, [row["goodput"] for row in line], "o-", label=name)
    axes[0].set(xscale="log", yscale="log", xlabel="GPUs", ylabel="samples/s")
    axes[1].set(xscale="log", xlabel="GPUs", ylabel="goodput")
    axes[0].legend()
    return Section(
        ["Computed from the inputs below, not measured."],
        [*grids, Grid("Inputs", ("input", "value", "source"), inputs)],
        [drawn("Samples a second and goodput over GPUs, computed", figure)],
    )


def _overhead(results: dict[str, Any]) -> Section:
    rows = []
    for name, one in results.items():
        longer = one.get("longer_by")
        change = "-"
        if longer:
            low, high = longer["minimum"], longer["maximum"]
            change = f"{longer['median']:+.1%} ({low:+.1%} to {high:+.1%})"
        means = ", ".join(f"{seconds * 1e3:.1f}" for seconds in one["mean_seconds"])
        rows.append((name, milliseconds(one["median_seconds"]), means, change))
    header = ("start", "median step", "mean of each start, ms", "longer than the plain launcher")
    return Section(grids=[Grid("Time of a step", header, rows)])


def _faults(results: dict[str, Any]) -> Section:
    header = ("fault", "noticed", "again", "steps lost", "samples", "losses", "said")
    rows = []
    for name, row in results.items():
        if "noticed_seconds" not in row:
            reason = (
                f"skipped: {row['skipped']}" if "skipped" in row else f"FAILED: {row['failed']}"
            )
            rows.append((name, "", "", "", "", "", reason))
            continue
        apart = row["largest_difference"]
        equal = row.get("samples_equal")
        rows.append(
            (
                name,
                f"{row['noticed_seconds']:.1f} s",
                f"{row['again_seconds']:.1f} s" if row["again_seconds"] else "went on",
                f"{row['steps_lost']} of {row['steps_allowed']}",
                "-" if equal is None else "equal" if equal else "DIFFER",
                f"{apart:.1e} apart" if apart else "bit for bit",
                row["said"],
            )
        )
    return Section(grids=[Grid("Faults, done for real", header, rows)])


def _soak(results: dict[str, Any]) -> Section:
    criteria = [(name.replace("_", " "), met(one)) for name, one in results["criteria"].items()]
    passed = all(results["criteria"].values())
    words = [f"Verdict: {'passed' if passed else 'NOT PASSED'}. {results['problem']}".strip()]
    kinds = [
        (
            kind,
            shown(one["judged"]),
            f"{one.get('longest_seconds', 0.0) / 60:.0f} min",
            gigabytes(one.get("median_memory_bytes")),
            *(
                "-" if key not in one else f"{one[key] / 1e6:+.1f} MB"
                for key in ("median_memory_growth_bytes", "largest_memory_growth_bytes")
            ),
            shown(one.get("largest_handles_growth")),
        )
        for kind, one in results["kinds"].items()
    ]
    faults = [
        (
            f"{(one['unix_seconds'] - results['faults'][0]['unix_seconds']) / 60:.0f} min",
            one["fault"],
            f"{one['again_seconds']:.1f} s",
            shown(one["steps_lost"]),
        )
        for one in results["faults"]
    ]
    header = ("process", "judged", "longest", "memory", "grew", "at most", "handles grew")
    return Section(
        words,
        [
            Grid("Criteria", ("what", "met"), criteria),
            Grid("Processes over their lives", header, kinds),
            Grid("Faults", ("after the first", "fault", "again after", "steps lost"), faults),
        ],
    )


_SECTIONS: dict[str, Callable[[dict[str, Any]], Section]] = {
    "ablations": ablations,
    "train": train,
    "kernels": _kernels,
    "data": _data,
    "tiers": _tiers,
    "scaling": _scaling,
    "overhead": _overhead,
    "faults": _faults,
    "soak": _soak,
}
