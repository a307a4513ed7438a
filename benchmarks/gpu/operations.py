"""Stages of a GPU check that time single operations: attention, kernels, decoding."""

import time
from collections.abc import Iterator
from typing import Any

import torch

from cavmae.benchmarks.gpu.setting import Check, Found, Skip, absent
from cavmae.benchmarks.harness.timing import ceilings
from cavmae.benchmarks.kernels.agreement import LIMITS
from cavmae.benchmarks.kernels.bench import KernelsConfig, measure
from cavmae.benchmarks.kernels.cases import attention_cases
from cavmae.benchmarks.kernels.timing import measured

_DECODING_NEEDS = ("nvidia.dali", "av", "PIL", "psutil", "rich", "tyro")


def attention(check: Check) -> Iterator[Found]:
    """Time attention by each backend at hand, and compare it with what the model calls."""
    dtype = torch.bfloat16 if check.device.type == "cuda" else torch.float32
    ceiling = ceilings(check.device, dtype)
    found, fastest = Found("", {"ceilings": ceiling, "cases": {}}), []
    for case in attention_cases(1 if check.small else 512, check.device, dtype):
        name = case.name
        result = measured(case, check.device, check.repeats, False, ceiling)
        found.details["cases"][name] = result
        times = {way: one["median_seconds"] for way, one in result["both"].items()}
        if times:
            best = min(times, key=lambda way: times[way])
            fastest.append(f"{name} {best} {times[best] * 1e3:.3g} ms")
        differences = {
            way: one["difference_from_ours"]
            for way, one in result["forward"].items()
            if one["difference_from_ours"] is not None
        }
        found.beyond += [
            f"{name} by {way}: differs by {difference:.1e}"
            for way, difference in differences.items()
            if not difference <= LIMITS[dtype]
        ]
        found.beyond += [f"{name} {message}" for message in _failures_of_ours(result)]
        found.key = ", ".join(fastest)
        yield found


def decoding(check: Check) -> Iterator[Found]:
    """Run `cavmae bench video-check`: each codec at common sizes, against the CPU's pictures."""
    if missing := absent(_DECODING_NEEDS):
        raise Skip(f"decoding needs {', '.join(missing)}; install cavmae whole")
    from cavmae.benchmarks.gpu.video import check_video, mixed_over_single

    rows = check_video(check.device, check.deadline - time.monotonic())
    measured = [row for row in rows if "frames_per_second" in row]
    fastest = max(measured, key=lambda row: row["frames_per_second"], default=None)
    yield Found(
        f"{len(measured)} of {len(rows)} rows"
        + (f", {fastest['codec']} {fastest['frames_per_second']:,.0f} frames/s" if fastest else ""),
        {"rows": rows, "mixed_over_single": mixed_over_single(rows)},
        [f"{row['codec']}, {row['size']}: {row['failed']}" for row in rows if "failed" in row],
    )


def speed(check: Check) -> Iterator[Found]:
    """Run `cavmae bench kernels` with fewer repeats; a kernel of ours that fails is a failure."""
    config = KernelsConfig(
        "cuda" if check.device.type == "cuda" else "cpu",
        batch=1 if check.small else None,
        contrastive=(64,) if check.small else (),
        repeats=min(3, check.repeats),
        compile=not check.small,
    )
    for results in measure(config, check.deadline):
        cases = results["cases"]
        passes = [case["both"] for case in cases.values() if "ours" in case.get("both", {})]
        fastest = sum(
            all(one["times_ours"]["median"] >= 1 for one in contenders.values())
            for contenders in passes
        )
        beyond = [
            f"{name} {message}"
            for name, case in cases.items()
            for message in _failures_of_ours(case)
        ]
        yield Found(f"fastest in {fastest} of {len(passes)} operations", results, beyond)


def _failures_of_ours(result: dict[str, Any]) -> list[str]:
    failed = result.get("failed", {})
    return [f"{what}: {why}" for what, why in failed.items() if what.startswith("ours ")]
