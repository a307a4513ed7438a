"""Times, memory and agreement of the contenders of one operation, and what the machine can do.

Contenders are timed in turn, so that a machine that slows down slows all. On a GPU a time is of
calls in a row, long enough together that it has work while Python prepares the next one.
"""

import itertools
import math
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from cavmae.benchmarks.harness.records import timing
from cavmae.benchmarks.kernels.cases import Case, Contender

SECONDS_TOGETHER = 0.02
MOST_CALLS = 100


def ceilings(device: torch.device, dtype: torch.dtype, repeats: int = 7) -> dict[str, float]:
    """Bytes a second of a large copy (read and written) and operations a second of a product.

    Args:
        device: to be measured.
        dtype: of the product's square matrices.
        repeats: timed runs of each, of which the median counts.
    """
    gpu = device.type == "cuda"
    source = torch.zeros((1 << 30) if gpu else (1 << 26), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    side = 8192 if gpu else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    copy_seconds = median_seconds(lambda: target.copy_(source), device, repeats)
    return {
        "bytes_per_second": 2 * source.nbytes / copy_seconds,
        "flops_per_second": 2 * side**3 / median_seconds(lambda: a @ b, device, repeats),
    }


def median_seconds(run: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Of one call, after one that is not timed."""
    run()
    calls = _calls_together(run, device)
    return statistics.median(_seconds(run, calls, device) for _ in range(repeats))


def measured(
    case: Case, device: torch.device, repeats: int, compile: bool, ceiling: dict[str, float]
) -> dict[str, Any]:
    """One case, forward and (where there are gradients) with backward.

    Args:
        case: the operation and its contenders.
        device: where its tensors are.
        repeats: timed runs of each contender.
        compile: torch.compile of `eager` is a contender as well.
        ceiling: from `ceilings`.

    Returns:
        By pass (`forward`, `both`) and contender: times, bytes or operations that the operation
        needs a second and their share of the ceiling, the ratio to ours with its spread, peak
        memory beyond what was in use before, and how far the output is from ours. `failed`: why a
        contender has no times.
    """
    contenders = dict(case.contenders)
    if compile:
        eager = contenders["eager"]
        torch.compiler.reset()  # cases share code, and the number of compiled versions is limited
        compiled = torch.compile(eager.run, fullgraph=True, dynamic=False)
        contenders["compiled"] = Contender(compiled, eager.leaves, eager.as_ours)
    result: dict[str, Any] = {"failed": {}}
    for kind in ("forward", "both") if contenders["ours"].leaves else ("forward",):
        needs = {
            "bytes": case.forward_bytes if kind == "forward" else case.both_bytes,
            "flops": case.forward_flops if kind == "forward" else case.both_flops,
        }
        result[kind] = _one_pass(case, contenders, kind, device, repeats, result["failed"])
        for entry in result[kind].values():
            for what, amount in needs.items():
                rate = amount / entry["median_seconds"] if amount else None
                entry[f"{what}_per_second"] = rate
                share = None if rate is None else rate / ceiling[f"{what}_per_second"]
                entry["share_of_copy" if what == "bytes" else "share_of_product"] = share
    return result


def _one_pass(
    case: Case,
    contenders: dict[str, Contender],
    kind: str,
    device: torch.device,
    repeats: int,
    failed: dict[str, str],
) -> dict[str, dict[str, Any]]:
    """Entries of the contenders that run; the reasons of the others go to `failed`."""
    runs: dict[str, Callable[[], Any]] = {}
    calls: dict[str, int] = {}
    seconds: dict[str, list[float]] = {}
    notes: dict[str, dict[str, Any]] = {}
    expected: torch.Tensor | None = None

    def attempt(name: str, step: Callable[[], None]) -> None:
        try:
            step()
        except Exception as error:  # out of memory, won't compile: a finding, and the others go on
            failed[f"{name} {kind}"] = f"{type(error).__name__}: {error}"
            seconds.pop(name, None)
            if device.type == "cuda":
                torch.cuda.empty_cache()

    def prepare(name: str) -> None:
        nonlocal expected
        with torch.no_grad():
            output = contenders[name].run()
        expected = output if name == "ours" else expected
        difference = None
        if expected is not None and not case.drawn:
            difference = _difference(output, expected)
        run = _pass(contenders[name], torch.ones_like(output) if kind == "both" else None)
        run()  # compiles, and fills caches
        peak = _peak_bytes(run, device)
        notes[name] = {"peak_bytes": peak, "difference_from_ours": difference}
        if case.matrix_bytes:
            gradients = sum(leaf.nbytes for leaf in contenders[name].leaves)
            workspace = peak - (gradients if kind == "both" else 0)
            notes[name] |= {
                "workspace_bytes": workspace,
                "workspace_share_of_matrix": workspace / case.matrix_bytes,
            }
        runs[name], calls[name] = run, _calls_together(run, device)
        seconds[name] = []

    for name in contenders:
        attempt(name, lambda name=name: prepare(name))
    for repeat in range(repeats):
        # The one that goes first changes, so that no one always follows the same other.
        order = list(seconds)
        turn = repeat % len(order) if order else 0
        for name in order[turn:] + order[:turn]:
            attempt(
                name,
                lambda name=name: seconds[name].append(_seconds(runs[name], calls[name], device)),
            )
    return {
        name: timing(times)
        | {"calls_together": calls[name]}
        | notes[name]
        | _ratio(times, seconds.get("ours"))
        for name, times in seconds.items()
    }


def _pass(contender: Contender, upstream: torch.Tensor | None) -> Callable[[], Any]:
    """Forward alone, or with the gradients for this upstream one."""
    if upstream is None:
        return torch.no_grad()(contender.run)
    return lambda: torch.autograd.grad(contender.run(), contender.leaves, upstream)


def _difference(output: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest expected value."""
    scale = expected.double().abs().max().clamp(min=1e-30)
    return float((output.double() - expected.double()).abs().max() / scale)


def _ratio(times: list[float], ours: list[float] | None) -> dict[str, Any]:
    """How many times as long as ours, neighbour by neighbour."""
    if ours is None:
        return {}
    ratios = [theirs / own for theirs, own in zip(times, ours, strict=True)]
    return {
        "times_ours": {
            "median": statistics.median(ratios),
            "minimum": min(ratios),
            "maximum": max(ratios),
        }
    }


def _calls_together(run: Callable[[], Any], device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    once = min(_seconds(run, 1, device) for _ in range(2))
    return min(MOST_CALLS, max(1, math.ceil(SECONDS_TOGETHER / max(once, 1e-9))))


def _seconds(run: Callable[[], Any], calls: int, device: torch.device) -> float:
    """Of one call, from events on a GPU."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - start) / calls
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        run()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1000 / calls


def _peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Most memory in use beyond what was in use before."""
    if device.type != "cuda":
        return _peak_bytes_on_cpu(run)
    torch.cuda.synchronize(device)
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
