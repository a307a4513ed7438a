"""Times, memory and agreement of the contenders of one operation.

Contenders are timed in turn, so that a machine that slows down slows all of them. On a GPU a timing
is of back-to-back calls, enough of them that the GPU has work while Python prepares the next one.
"""

import itertools
import os
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from cavmae.benchmarks.harness.process_memory import gpu_peak_bytes
from cavmae.benchmarks.harness.records import spread, timing
from cavmae.benchmarks.harness.timing import calls_per_timing, seconds_per_call
from cavmae.benchmarks.kernels.cases import Case, Contender


def measured(
    case: Case, device: torch.device, repeats: int, compile: bool, ceiling: dict[str, float]
) -> dict[str, Any]:
    """Measure one case, forward and (where there are gradients) with backward.

    Args:
        case: the operation and its contenders.
        device: where its tensors are.
        repeats: timed runs of each contender.
        compile: torch.compile of `eager` is a contender as well.
        ceiling: from `ceilings`.

    Returns:
        By pass (`forward`, `both`) and contender: times, the rates of bytes and operations that the
        operation needs and their share of the ceiling, the ratio to ours with its spread, peak
        memory beyond what was in use before, and the difference of the output from ours. `failed`
        has the reason why a contender has no times.
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
            "copy": ("bytes_per_second", getattr(case, f"{kind}_bytes")),
            "product": ("flops_per_second", getattr(case, f"{kind}_flops")),
        }
        result[kind] = _one_pass(case, contenders, kind, device, repeats, result["failed"])
        for entry in result[kind].values():
            for what, (key, amount) in needs.items():
                rate = amount / entry["median_seconds"] if amount else None
                entry[key] = rate
                entry[f"share_of_{what}"] = None if rate is None else rate / ceiling[key]
    return result


def _one_pass(
    case: Case,
    contenders: dict[str, Contender],
    kind: str,
    device: torch.device,
    repeats: int,
    failed: dict[str, str],
) -> dict[str, dict[str, Any]]:
    """Return entries of the contenders that run; the reasons of the others go to `failed`."""
    runs: dict[str, Callable[[], Any]] = {}
    calls: dict[str, int] = {}
    seconds: dict[str, list[float]] = {}
    notes: dict[str, dict[str, Any]] = {}
    expected: torch.Tensor | None = None

    def attempt(name: str, step: Callable[[str], None]) -> None:
        try:
            step(name)
        except Exception as error:  # out of memory, does not compile: a result, and others continue
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
            difference = relative_difference(output, expected)
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
        runs[name], calls[name] = run, calls_per_timing(run, device)
        seconds[name] = []

    def time_once(name: str) -> None:
        seconds[name].append(seconds_per_call(runs[name], calls[name], device))

    for name in contenders:
        attempt(name, prepare)
    for repeat in range(repeats):
        # The first one changes, so that no contender always follows the same other one.
        order = list(seconds)
        turn = repeat % len(order) if order else 0
        for name in order[turn:] + order[:turn]:
            attempt(name, time_once)
    found = {}
    for name, times in seconds.items():
        found[name] = timing(times) | {"calls_together": calls[name]} | notes[name]
        if "ours" in seconds:
            pairs = zip(times, seconds["ours"], strict=True)
            found[name]["times_ours"] = spread([theirs / ours for theirs, ours in pairs])
    return found


def _pass(contender: Contender, upstream: torch.Tensor | None) -> Callable[[], Any]:
    """Return the forward pass alone, or with the gradients for an upstream one."""
    if upstream is None:
        return torch.no_grad()(contender.run)
    return lambda: torch.autograd.grad(contender.run(), contender.leaves, upstream)


def relative_difference(output: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference over the largest expected value."""
    scale = expected.double().abs().max().clamp(min=1e-30)
    return float((output.double() - expected.double()).abs().max() / scale)


def _peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Return the peak memory beyond what was in use before.

    On a CPU it is the running sum of the allocations that torch's profiler records.
    """
    if device.type == "cuda":
        return gpu_peak_bytes(run, device)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it prints when it starts and ends
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    assert profiled.profiler is not None and profiled.profiler.kineto_results is not None
    events: list[Any] = profiled.profiler.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    return max(itertools.accumulate(change for _, change in sorted(changes)), default=0)
