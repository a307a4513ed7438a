"""A section of `cavmae bench report` for each kind of record: its tables and plots."""

from collections.abc import Callable
from typing import Any

from matplotlib.figure import Figure

from cavmae.benchmarks.harness.measurements import PASSES
from cavmae.benchmarks.harness.records import Record, extremes
from cavmae.benchmarks.report.parts import (
    Grid,
    Picture,
    Section,
    bars_grid,
    cell,
    drawn,
    gigabytes,
    milliseconds,
    named,
    numbers,
    share,
    table,
    yes_or_no,
)
from cavmae.benchmarks.report.training import (
    ablations,
    details,
    matrix_rates,
    steps,
    throughput,
    train,
)

_SECONDS, _TENTHS, _WHOLE = "{:.2f} s".format, "{:.1f} s".format, "{:,.0f}".format


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
    columns = {
        "stage": cell("name"),
        "outcome": cell("status"),
        "time": cell("seconds", "{:.0f} s".format),
        "key number": cell("key"),
        "reason": cell("reason"),
    }
    found = Section(grids=[table("Stages", columns, named(record.results))])
    rates = matrix_rates(others, record.hardware)
    if step := details(record, "baseline"):
        found += steps(step["precisions"], rates)
    if kernels := details(record, "speed"):
        found += _kernels(kernels)
    measured = [
        row for name in ("eager", "compiled") for row in details(record, name).get("rows", [])
    ]
    rows = [row for row in measured if "tflops" in row]
    if rows:
        found += throughput(rows, rates.get("bf16"))
    if loop := details(record, "loop"):
        found += train(loop)
    if limits := details(record, "limits"):
        found += Section(grids=[Grid("Limits", ("what", "value"), list(numbers(limits)))])
    return found


# ------------------------------------------------------------------------------------ kernels


def _kernels(results: dict[str, Any]) -> Section:
    rows = [
        {"name": f"{name}, {title}", "contenders": case[kind]} | case[kind]["ours"]
        for name, case in results["cases"].items()
        for kind, title in PASSES.items()
        if "ours" in case.get(kind, {})
    ]
    columns = {
        "operation": cell("name"),
        "ours": cell("median_seconds", milliseconds),
        "of a copy": cell("share_of_copy", share),
        "of a product": cell("share_of_product", share),
        "others, times ours": lambda row: "; ".join(
            f"{name} {extremes(one['times_ours'])}, memory "
            f"{one['peak_bytes'] / max(1, row['peak_bytes']):.2f}x"
            for name, one in row["contenders"].items()
            if name != "ours"
        ),
    }
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
    found = Section(words, [table("Operations", columns, rows), bars_grid(results["bars"])])
    points = {
        row["name"]: (row["flops_per_second"] / row["bytes_per_second"], row["flops_per_second"])
        for row in rows
        if row["flops_per_second"] and row["bytes_per_second"]
    }
    return found + Section(pictures=[_roofline(points, ceiling)]) if points else found


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
    columns = {
        "way": cell("name"),
        "clips/s": cell("clips_per_second"),
        "CPU a clip": cell("cpu_seconds_per_clip", milliseconds),
        "first batch after": cell("first_batch_seconds", _SECONDS),
    }
    alone = {
        "tier": cell("name"),
        "decoding": cell("decode_cpu_seconds_per_clip", milliseconds),
        "log-mel": cell("log_mel_cpu_seconds_per_clip", milliseconds),
    }
    first = {position: cell(position, _SECONDS) for position in results["first_batch"]}
    return Section(
        grids=[
            table("Ways to load 10 s clips", columns, named(results["contenders"])),
            table("CPU a clip of each part alone", alone, named(results["parts"])),
            table("First batch by position", first, [results["first_batch"]]),
            bars_grid(results["bars"]),
        ]
    )


def _tiers(results: dict[str, Any]) -> Section:
    columns = {
        "way to store": cell("name"),
        "kB a clip": lambda row: f"{row['bytes'] / 1e3:,.0f}",
        "CPU to encode": cell("pack_cpu_seconds", milliseconds),
        "CPU to decode": cell("decode_cpu_seconds", milliseconds),
        "clips/s": cell("decode_clips_per_second"),
        "PSNR, dB": cell("psnr_db"),
        "cropped": cell("cropped", share),
    }
    source = results["source"]
    words = [
        f"{results['clips']} clips of {source['seconds']:.1f} s and {source['frames']:.0f} frames; "
        f"decoding the source of one for packing takes "
        f"{milliseconds(source['decode_cpu_seconds'])} of CPU."
    ]
    for name, one in results["pictures"].items():
        rates = (one["gpu_clips_per_second"] or {}).items()
        cells = [f"{rate:,.0f} clips/s with {count}" for count, rate in rates]
        words += [f"{name} on the GPU: {', '.join(cells)}."] if cells else []
    words += [] if len(words) > 1 else ["Not measured on a GPU."]
    if "mjpeg" in results:
        as_image, as_video = (
            milliseconds(results["mjpeg"][f"{name}_cpu_seconds"]) for name in ("image", "video")
        )
        words.append(
            f"A frame of MJPEG takes {as_image} of CPU as a JPEG and {as_video} by the video "
            f"decoder; the pictures differ by {results['mjpeg']['levels']:.2f} of 255 levels."
        )
    rows = named(results["pictures"]) + named(results["sound"])
    return Section(words, [table("Of a clip", columns, rows)])


# ------------------------------------------------------------------- many GPUs, and their ends


def _scaling(results: dict[str, Any]) -> Section:
    columns = {
        "GPUs": cell("gpus", _WHOLE),
        "clips a step": cell("global_batch", _WHOLE),
        "step": cell("step_seconds", milliseconds),
        "from": cell("low_step_seconds", milliseconds),
        "to": cell("high_step_seconds", milliseconds),
        "sent, GB": cell("sent_gbytes", "{:.2f}".format),
        "samples/s": cell("samples_per_second", _WHOLE),
        "efficiency": cell("efficiency", share),
        **{f"ZeRO {stage}": cell(f"others.{stage}", share) for stage in (0, 2, 3)},
        "goodput": cell("goodput", "{:.2%}".format),
        "lasting/s": lambda row: f"{row['samples_per_second'] * row['goodput']:,.0f}",
    }
    grids, lines = [], {}
    for name in ("weak", "strong"):
        others: dict[int, dict[str, float]] = {}
        for row in results[name]:
            others.setdefault(row["gpus"], {})[str(row["zero_stage"])] = row["efficiency"]
        lines[name] = [row for row in results[name] if row["zero_stage"] == 1]
        rows = [row | {"others": others[row["gpus"]]} for row in lines[name]]
        title = f"{name.capitalize()} scaling, ZeRO 1 with the efficiency of the other stages"
        grids.append(table(title, columns, rows))
    month = {
        "GPUs": cell("gpus", _WHOLE),
        "failures": cell("failures", "{:.1f}".format),
        "goodput": cell("goodput", "{:.2%}".format),
        "of 95% of the months": cell("worst_goodput", "{:.2%}".format),
        "lost by a failure, s": cell("seconds_per_failure", _WHOLE),
    }
    grids.append(table("30 days, simulated failure by failure", month, results["month"]))
    inputs = {"input": cell("name"), "value": cell("value"), "source": cell("source")}
    grids.append(table("Inputs", inputs, named(results["inputs"])))
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
        grids,
        [drawn("Samples a second and goodput over GPUs, computed", figure)],
    )


def _predict(results: dict[str, Any]) -> Section:
    bounds = {
        "from": cell("low_seconds", milliseconds),
        "to": cell("high_seconds", milliseconds),
    }
    if "against" in results:
        columns = {
            "machine": cell("of"),
            "ceilings": cell("ceilings"),
            "setting": cell("setting"),
            "part": cell("part"),
            "measured": cell("measured_seconds", milliseconds),
            "predicted from": bounds["from"],
            "to": bounds["to"],
            "middle / measured": cell("ratio", "{:.2f}".format),
        }
        rows = [
            row | part | {"part": name, "setting": _setting(row)}
            for row in results["against"]
            for name, part in (*row["parts"].items(), ("step", row["step"]))
        ]
        return Section(
            ["Predicted from counted kernels, beside what was measured."],
            [table("Predicted and measured", columns, rows)],
        )
    work = {
        "bound by": cell("bound_by"),
        "kernels": cell("kernels", _WHOLE),
        "TFLOP": cell("tflop", "{:.3g}".format),
        "GB, others": cell("gbytes", "{:.1f}".format),
    }
    step, gpu = results["step"], results["ceilings"]["name"]
    words = (
        f"Predicted for an {gpu}, not measured: a step takes {milliseconds(step['low_seconds'])} "
        f"to {milliseconds(step['high_seconds'])}."
    )
    choices = {"with": cell("name"), **bounds, "middle": cell("ratio", "{:.3f} of it".format)}
    return Section(
        [words],
        [
            table("Passes", {"pass": cell("name"), **bounds, **work}, named(results["passes"])),
            table("Parts", {"part": cell("name"), **bounds, **work}, named(results["parts"])),
            table("Other choices", choices, named(results["choices"])),
        ],
    )


def _setting(row: dict[str, Any]) -> str:
    return f"{row['precision']}, batch {row['batch']}, recompute {row['recompute']}"


def _overhead(results: dict[str, Any]) -> Section:
    columns = {
        "start": cell("name"),
        "median step": cell("median_seconds", milliseconds),
        "mean of each start, ms": lambda row: ", ".join(
            f"{seconds * 1e3:.1f}" for seconds in row["mean_seconds"]
        ),
        "longer than the plain launcher": cell("longer_by", lambda by: extremes(by, "+.1%", "")),
    }
    return Section(grids=[table("Time of a step", columns, named(results))])


def _memory(results: dict[str, Any]) -> Section:
    columns = {
        "case": cell("case"),
        "tensors predicted": cell("predicted_tensor_bytes", gigabytes),
        "resident predicted": cell("predicted_bytes", gigabytes),
        "peak part": cell("peak_part"),
        "measured": cell("measured_bytes", lambda peaks: gigabytes(max(peaks))),
        "least of a step": cell("measured_bytes", lambda peaks: gigabytes(min(peaks))),
        "predicted / measured": cell("ratio", "{:.3f}".format),
    }
    return Section(grids=[table("Memory of a run", columns, results["rows"])])


def _faults(results: dict[str, Any]) -> Section:
    columns = {
        "fault": cell("name"),
        "noticed": cell("noticed_seconds", _TENTHS),
        "again": cell(
            "again_seconds", lambda seconds: _TENTHS(seconds) if seconds else "continued"
        ),
        "steps lost": lambda row: f"{row['steps_lost']} of {row['steps_allowed']}",
        "samples": cell("samples_equal", lambda equal: "equal" if equal else "DIFFER"),
        "losses": cell(
            "largest_difference", lambda apart: f"{apart:.1e} apart" if apart else "bit for bit"
        ),
        "said": cell("said"),
    }
    rows = []
    for name, row in results.items():
        if "noticed_seconds" in row:
            label = name if row.get("passed", True) else f"{name}: FAILED"
            rows.append(tuple(make({"name": label} | row) for make in columns.values()))
        else:
            why = f"skipped: {row['skipped']}" if "skipped" in row else f"FAILED: {row['failed']}"
            rows.append((name, *[""] * 5, why))
    return Section(grids=[Grid("Faults, done for real", tuple(columns), rows)])


def _soak(results: dict[str, Any]) -> Section:
    passed = all(results["criteria"].values())
    words = [f"Verdict: {'passed' if passed else 'NOT PASSED'}. {results['problem']}".strip()]
    criteria = [
        (name.replace("_", " "), yes_or_no(one)) for name, one in results["criteria"].items()
    ]
    growth, minutes = "{:+.1f} MB", "{:.0f} min"
    kinds = {
        "process": cell("name"),
        "judged": cell("judged"),
        "longest": lambda row: minutes.format(row.get("longest_seconds", 0.0) / 60),
        "memory": cell("median_memory_bytes", gigabytes),
        "grew": cell("median_memory_growth_bytes", lambda value: growth.format(value / 1e6)),
        "at most": cell("largest_memory_growth_bytes", lambda value: growth.format(value / 1e6)),
        "handles grew": cell("largest_handles_growth"),
    }
    first = results["faults"][0]["unix_seconds"] if results["faults"] else 0.0
    faults = {
        "after the first": cell("unix_seconds", lambda when: minutes.format((when - first) / 60)),
        "fault": cell("fault"),
        "again after": cell("again_seconds", _TENTHS),
        "steps lost": cell("steps_lost"),
    }
    return Section(
        words,
        [
            Grid("Criteria", ("what", "met"), criteria),
            table("Processes over their lives", kinds, named(results["kinds"])),
            table("Faults", faults, results["faults"]),
        ],
    )


_SECTIONS: dict[str, Callable[[dict[str, Any]], Section]] = {
    "ablations": ablations,
    "train": train,
    "kernels": _kernels,
    "data": _data,
    "tiers": _tiers,
    "scaling": _scaling,
    "predict": _predict,
    "overhead": _overhead,
    "memory": _memory,
    "faults": _faults,
    "soak": _soak,
}
