"""Stages of a GPU check that time single operations."""

from collections.abc import Iterator

from cavmae.benchmarks.gpu.setting import Check, Found
from cavmae.benchmarks.kernels.bench import KernelsConfig, measure


def speed(check: Check) -> Iterator[Found]:
    """Run `cavmae bench kernels` with fewer repeats; a kernel of ours that fails is a failure."""
    config = KernelsConfig(
        "cuda" if check.device.type == "cuda" else "cpu",
        batch=1 if check.small else None,
        contrastive=(64,) if check.small else (),
        repeats=min(3, check.repeats),
        compile=not check.small,
    )
    results = measure(config, check.deadline)
    measured = [
        case["both"] for case in results["cases"].values() if "ours" in case.get("both", {})
    ]
    faster = sum(
        all(one["times_ours"]["median"] >= 1 for name, one in case.items() if name != "ours")
        for case in measured
    )
    beyond = [
        f"{case} {what}: {why}"
        for case, result in results["cases"].items()
        for what, why in result.get("failed", {}).items()
        if what.startswith("ours ")
    ]
    yield Found(f"fastest in {faster} of {len(measured)} operations", results, beyond)
