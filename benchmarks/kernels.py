"""`cavmae bench kernels`: our operations against torch, torch.compile and published methods.

All contenders of an operation are timed in turn in one run, and stand beside what the machine can
do at most, measured in the same run: a large copy and a large matrix product. On a GPU ours are the
Triton kernels, on a CPU the torch references, which is what runs there.
"""

import argparse
import itertools
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from cavmae.benchmarks.kernel_cases import Case, cases
from cavmae.benchmarks.records import timing, write_record
from cavmae.kernels import default_backend

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(
        prog="cavmae bench kernels", description="Kernels against torch and published methods."
    )
    arguments.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments.add_argument("--batch", type=int, help="samples; 512 on a GPU, 8 on a CPU")
    arguments.add_argument("--dtype", choices=list(DTYPES), help="bf16 on a GPU, fp32 on a CPU")
    arguments.add_argument(
        "--contrastive",
        type=int,
        nargs="+",
        help="batches of the contrastive loss; 512 4096 32768 on a GPU, 512 on a CPU",
    )
    arguments.add_argument("--repeats", type=int, default=10, help="timed runs of each contender")
    arguments.add_argument("--compile", action="store_true", help="torch.compile on a CPU as well")
    arguments.add_argument("--out", default="benchmarks/results", help="folder of the record")
    return arguments


def main(argv: list[str]) -> int:
    """Time everything, write the record and the plot; returns the exit code."""
    flags = parser().parse_args(argv)
    for name in ("batch", "repeats"):
        if getattr(flags, name) is not None and getattr(flags, name) < 1:
            raise ValueError(f"--{name} is {getattr(flags, name)}; use 1 or more")
    device = torch.device(flags.device)
    results = measure(
        device,
        batch=flags.batch,
        dtype=flags.dtype,
        contrastive=flags.contrastive,
        repeats=flags.repeats,
        compile=flags.compile or device.type == "cuda",
    )
    path = write_record(flags.out, "kernels", device, vars(flags), results)
    print(f"record: {path}")
    print(f"plot: {plot(results, path.with_suffix('.png'))}")
    return 0


def measure(
    device: torch.device,
    *,
    batch: int | None = None,
    dtype: str | None = None,
    contrastive: list[int] | None = None,
    repeats: int,
    compile: bool,
    deadline: float = math.inf,
) -> dict[str, Any]:
    """Ceilings, all cases and the bars.

    Args:
        device: where to run.
        batch, dtype, contrastive: None for what fits the device.
        repeats: timed runs of each contender.
        compile: torch.compile of the eager contender as a contender.
        deadline: `time.monotonic()` after which no further case starts.
    """
    gpu = device.type == "cuda"
    dtype = dtype or ("bf16" if gpu else "fp32")
    contrastive = contrastive or ([512, 4096, 32768] if gpu else [512])
    ceiling = ceilings(device, DTYPES[dtype])
    print(
        f"{default_backend(device)} kernels on {device}, {dtype}; ceilings: copy "
        f"{ceiling['bytes_per_second'] / 1e9:.1f} GB/s, product "
        f"{ceiling['flops_per_second'] / 1e12:.3g} TFLOP/s"
    )
    found: dict[str, Any] = {}
    for case in cases(device, batch or (512 if gpu else 8), DTYPES[dtype], contrastive):
        if time.monotonic() > deadline:
            found[case.name] = {"skipped": "the time given was spent before"}
            continue
        found[case.name] = measured(case, device, repeats, compile, ceiling)
        print(line(case.name, found[case.name]), flush=True)
    return {
        "backend": default_backend(device),
        "dtype": dtype,
        "ceilings": ceiling,
        "cases": found,
        "bars": bars(found) if gpu else "judged on a GPU only",
    }


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Bytes a second of a large copy (read and written) and operations a second of a product."""
    gpu = device.type == "cuda"
    source = torch.randn((1 << 30) // 4 if gpu else (1 << 26) // 4, device=device)
    target = torch.empty_like(source)
    side = 8192 if gpu else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    copy = statistics.median(_seconds(lambda: target.copy_(source), device) for _ in range(7))
    product = statistics.median(_seconds(lambda: a @ b, device) for _ in range(7))
    return {
        "bytes_per_second": 2 * source.nbytes / copy,
        "flops_per_second": 2 * side**3 / product,
    }


def measured(
    case: Case, device: torch.device, repeats: int, compile: bool, ceiling: dict[str, float]
) -> dict[str, Any]:
    """One case: each contender's times forward and with backward, ratios to ours, peak memory."""
    contenders = dict(case.contenders)
    if compile:
        contenders["compiled"] = torch.compile(contenders["eager"])
    passes: dict[str, Callable[[Callable[[], torch.Tensor]], None]] = {"forward": _forward}
    if case.leaves:
        passes["both"] = lambda run: _forward_and_backward(run, case.leaves)
    result: dict[str, Any] = {"failed": {}}
    for name, do in passes.items():
        seconds: dict[str, list[float]] = {}
        peaks: dict[str, int] = {}
        for contender, run in contenders.items():
            try:
                do(run)  # compiles, and fills caches
                peaks[contender] = _peak_bytes(lambda run=run, do=do: do(run), device)
                seconds[contender] = []
            except (RuntimeError, ValueError) as error:  # out of memory, or it does not compile
                result["failed"][f"{contender} {name}"] = f"{type(error).__name__}: {error}"
        for repeat in range(repeats):
            order = list(seconds)
            for contender in order[:: 1 if repeat % 2 else -1]:  # no one always follows the other
                run = contenders[contender]
                seconds[contender].append(_seconds(lambda run=run, do=do: do(run), device))
        result[name] = {
            contender: timing(times)
            | {"peak_bytes": peaks[contender]}
            | _ratio(times, seconds.get("ours", []))
            for contender, times in seconds.items()
        }
        if "ours" in seconds:
            median = statistics.median(seconds["ours"])
            moved = case.forward_bytes if name == "forward" else case.both_bytes
            flops = case.forward_flops if name == "forward" else 0
            result[name]["ours"] |= {
                "share_of_copy": moved / median / ceiling["bytes_per_second"] if moved else None,
                "share_of_product": (
                    flops / median / ceiling["flops_per_second"] if flops else None
                ),
            }
            if case.matrix_bytes:
                kept = sum(leaf.nbytes for leaf in case.leaves) if name == "both" else 0
                result[name]["ours"]["workspace_share_of_matrix"] = (
                    max(0, peaks["ours"] - kept) / case.matrix_bytes
                )
    return result


def _ratio(times: list[float], ours: list[float]) -> dict[str, Any]:
    """How many times as long as ours, run by run."""
    if not ours:
        return {}
    ratios = [theirs / own for theirs, own in zip(times, ours, strict=True)]
    return {
        "times_ours": {
            "median": statistics.median(ratios),
            "minimum": min(ratios),
            "maximum": max(ratios),
        }
    }


def _forward(run: Callable[[], torch.Tensor]) -> None:
    with torch.no_grad():
        run()


def _forward_and_backward(run: Callable[[], torch.Tensor], leaves: list[torch.Tensor]) -> None:
    output = run()
    torch.autograd.grad(output, leaves, torch.ones_like(output))


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1000


def _peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Most memory in use beyond what was in use before."""
    if device.type != "cuda":
        return _peak_bytes_on_cpu(run)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _peak_bytes_on_cpu(run: Callable[[], Any]) -> int:
    """From the allocations that torch's profiler notes; they are summed in the order of time."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it announces its start and end
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as noted:
        run()
    assert noted.profiler is not None and noted.profiler.kineto_results is not None
    events: list[Any] = noted.profiler.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    return max(itertools.accumulate(change for _, change in sorted(changes)), default=0)


def line(name: str, result: dict[str, Any]) -> str:
    """One case for people."""
    parts = []
    for kind in ("forward", "both"):
        if "ours" not in result.get(kind, {}):
            continue
        ours = result[kind]["ours"]
        ratios = ", ".join(
            f"{contender} {entry['times_ours']['median']:.2f}x the time and "
            f"{entry['peak_bytes'] / max(1, ours['peak_bytes']):.2f}x the memory"
            for contender, entry in result[kind].items()
            if contender != "ours"
        )
        shares = "".join(
            f", {ours[share]:.0%} of {what}"
            for share, what in (("share_of_copy", "copy"), ("share_of_product", "product"))
            if ours[share]
        )
        title = "forward" if kind == "forward" else "with backward"
        parts.append(f"{title} {ours['median_seconds'] * 1e3:.3g} ms{shares} ({ratios})")
    parts += [f"failed: {what} ({why[:80]})" for what, why in result["failed"].items()]
    return f"{name}: " + "; ".join(parts)


def bars(found: dict[str, Any]) -> dict[str, Any]:
    """What is to be reached on one H200, and whether it was: value, bar, met."""
    judged: dict[str, Any] = {}

    def judge(name: str, value: float | None, bar: float, at_least: bool = True) -> None:
        met = None if value is None else (value >= bar if at_least else value <= bar)
        judged[name] = {"value": value, "bar": bar, "met": met}

    for name in ("gather_tokens", "restore_tokens", "reconstruction_audio", "reconstruction_video"):
        for kind in ("forward", "both"):
            judge(f"{name} {kind}: share of copy", _at(found, name, kind, "share_of_copy"), 0.85)
    for name in ("patch_embedding_audio", "patch_embedding_video"):
        judge(f"{name} both: times eager", _against(found, name, "both", "eager"), 3)
    large = "contrastive_32768"
    share = _at(found, large, "forward", "share_of_product")
    judge("contrastive forward: share of product", share, 0.65)
    judge("contrastive both: times tiled", _against(found, large, "both", "tiled"), 2)
    workspace = _at(found, large, "both", "workspace_share_of_matrix")
    judge("contrastive: workspace over matrix", workspace, 0.01, at_least=False)
    for size in (4096, 32768):
        name = f"contrastive_{size}"
        judge(f"{name} both: times eager", _against(found, name, "both", "eager"), 1)
    small = _against(found, "contrastive_512", "both", "compiled")
    judge("contrastive_512 both: times compiled", small, 1)
    return judged


def _at(found: dict[str, Any], name: str, kind: str, key: str) -> float | None:
    return found.get(name, {}).get(kind, {}).get("ours", {}).get(key)


def _against(found: dict[str, Any], name: str, kind: str, contender: str) -> float | None:
    entry = found.get(name, {}).get(kind, {}).get(contender)
    return entry["times_ours"]["median"] if entry else None


def plot(results: dict[str, Any], path: Path) -> str:
    """Draw how many times as long as ours each contender takes; returns where, or why not."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "none: matplotlib is not installed"
    bars_of: dict[str, dict[str, float]] = {}
    for name, case in results["cases"].items():
        for kind in ("forward", "both"):
            for contender, entry in case.get(kind, {}).items():
                if contender != "ours" and "times_ours" in entry:
                    label = f"{name}\n{'forward' if kind == 'forward' else 'with backward'}"
                    bars_of.setdefault(label, {})[contender] = entry["times_ours"]["median"]
    contenders = sorted({contender for row in bars_of.values() for contender in row})
    figure = Figure(figsize=(10, 1 + 0.45 * len(bars_of)), dpi=100, layout="constrained")
    axis = figure.subplots()
    height = 0.8 / max(1, len(contenders))
    for number, contender in enumerate(contenders):
        places = [
            place + number * height
            for place, row in enumerate(bars_of.values())
            if contender in row
        ]
        values = [row[contender] for row in bars_of.values() if contender in row]
        axis.barh(places, values, height=height, label=contender)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_yticks(range(len(bars_of)), list(bars_of), fontsize=7)
    axis.invert_yaxis()
    axis.set_xlabel(f"times as long as ours ({results['backend']}, {results['dtype']})")
    axis.legend(fontsize=8)
    figure.savefig(path)
    return str(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
