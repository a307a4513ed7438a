"""`cavmae bench step`: a training step of our model against the published one, over batch sizes.

The two are timed in turn, so that a machine that slows down slows both, and each ratio is of two
neighbouring steps. Beside them stands what the machine can do at most, measured in the same run.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from cavmae.benchmarks.harness.machine_peaks import measure_rates, utilization
from cavmae.benchmarks.harness.power import power_meter
from cavmae.benchmarks.harness.records import timing, write_record
from cavmae.benchmarks.step.memory import step_peak_bytes
from cavmae.benchmarks.step.training_step import Choices, ModelName, Precision, TrainingStep
from cavmae.trainer.config.recipes import audioset_huge, audioset_large
from cavmae.trainer.cost_model.flops import training_flops
from cavmae.trainer.model.config import ModelConfig

SIZES = {
    "base": ModelConfig(),
    "large": audioset_large().model,
    "huge": audioset_huge().model,
    "tiny": ModelConfig(
        audio_frames=128,
        image_size=64,
        width=48,
        modality_depth=2,
        heads=4,
        decoder_width=32,
        decoder_depth=2,
        decoder_heads=4,
    ),
}
MODELS: tuple[ModelName, ...] = ("published", "cavmae")
MEMORY_BAR = 0.7
"""Of the published step's memory, at most."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(
        prog="cavmae bench step", description="Time of a training step, with memory and FLOP/s."
    )
    arguments.add_argument("--model", choices=list(SIZES), default="base", help="sizes")
    arguments.add_argument("--modality-depth", type=int, help="instead of the model's")
    arguments.add_argument("--decoder-depth", type=int, help="instead of the model's")
    arguments.add_argument(
        "--batch", type=int, nargs="+", default=[8], help="samples a step; several: one by one"
    )
    arguments.add_argument("--repeats", type=int, default=5, help="timed steps of each model")
    arguments.add_argument("--warm-up", type=int, default=1, help="steps before the timed ones")
    arguments.add_argument(
        "--precision",
        nargs="+",
        choices=["fp32", "bf16"],
        default=["fp32", "bf16"],
        help="of the steps that are timed",
    )
    arguments.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="`cuda` or `cpu`; a GPU where there is one",
    )
    arguments.add_argument("--only", choices=MODELS, help="one model, which has the memory alone")
    arguments.add_argument("--compile", action="store_true", help="compile our model's blocks")
    arguments.add_argument(
        "--memory",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="peak memory on a CPU, in a process for each model",
    )
    arguments.add_argument("--out", default="benchmarks/results", help="folder of the record")
    return arguments


def main(argv: list[str]) -> int:
    """Time the models and write a record; returns the exit code."""
    flags = parser().parse_args(argv)
    for name, values in (("batch", flags.batch), ("repeats", [flags.repeats])):
        for value in values:
            if value < 1:
                raise ValueError(f"--{name} is {value}; use 1 or more")
    depths = {
        name: depth
        for name in ("modality_depth", "decoder_depth")
        if (depth := getattr(flags, name)) is not None
    }
    config = replace(SIZES[flags.model], **depths)
    device = torch.device(flags.device)
    models = (flags.only,) if flags.only else MODELS
    choices = Choices(compile=flags.compile)
    results: dict[str, Any] = {"machine": {}}
    for precision in flags.precision:
        rates = measure_rates(device, precision, config, max(flags.batch))
        results["machine"][precision] = rates
        for batch in flags.batch:
            result = compare(
                config,
                batch,
                precision,
                device,
                repeats=flags.repeats,
                warm_up=flags.warm_up,
                choices=choices,
                models=models,
            )
            if device.type == "cpu" and flags.memory:
                for name in models:
                    result[name]["peak_memory_bytes"] = step_peak_bytes(
                        name, config, batch, precision, choices
                    )
            result |= memory_ratio(result)
            for name in models:
                if "tflops" in result[name]:
                    flops_per_second = result[name]["tflops"] * 1e12
                    result[name] |= utilization(flops_per_second, rates, precision)
            # Of a single batch size as in older records, so that they can be compared.
            key = precision if len(flags.batch) == 1 else f"{precision} batch {batch}"
            results[key] = {"precision": precision, "batch": batch, **result}
            print(line(results[key]), flush=True)
    batch = flags.batch[0] if len(flags.batch) == 1 else flags.batch
    configuration = vars(flags) | {"batch": batch, "sizes": asdict(config)}
    path = write_record(flags.out, "step", device, configuration, results)
    print(f"record: {path}")
    return 0


def compare(
    config: ModelConfig,
    batch: int,
    precision: Precision,
    device: torch.device,
    *,
    repeats: int,
    warm_up: int,
    choices: Choices | None = None,
    models: Sequence[ModelName] = MODELS,
) -> dict[str, Any]:
    """Time models in turn.

    Returns:
        Per model its timing, samples per second, TFLOP/s of the arithmetic that the losses need,
        peak memory (CUDA), energy and last loss, or why it has none; of two models, the ratio
        baseline / ours with its spread.
    """
    steps: dict[ModelName, TrainingStep] = {}
    peaks: dict[ModelName, int | None] = {}
    results: dict[str, Any] = {}
    for name in models:
        before = _start_of_peak(device)
        try:
            steps[name] = TrainingStep(name, config, batch, precision, device, choices=choices)
            # The first step makes the optimizer's state: the peak of memory is the second one's.
            for _ in range(max(2, warm_up)):
                steps[name]()
        except torch.cuda.OutOfMemoryError as error:  # a finding, and the other model goes on
            results[name] = {"skipped": str(error)}
            steps.pop(name, None)
            torch.cuda.empty_cache()
        peaks[name] = _peak_since(before, device)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    losses = {}
    for repeat in range(repeats):
        # The one that goes first changes, so that neither always follows the other.
        for name in list(steps)[:: 1 if repeat % 2 else -1]:
            elapsed, losses[name] = timed(steps[name], device)
            seconds[name].append(elapsed)
    for name, step in steps.items():
        median = statistics.median(seconds[name])
        results[name] = timing(seconds[name]) | {
            "samples_per_second": batch / median,
            "tflops": training_flops(config) * batch / median / 1e12,
            "peak_memory_bytes": peaks[name],
            "energy": _energy(step, repeats, batch, device),
            "last_loss": losses[name],
        }
    if len(steps) == len(MODELS):
        ratios = [
            slow / fast for slow, fast in zip(seconds["published"], seconds["cavmae"], strict=True)
        ]
        results["speedup"] = {
            "median": statistics.median(ratios),
            "minimum": min(ratios),
            "maximum": max(ratios),
        }
    return results


def memory_ratio(result: dict[str, Any]) -> dict[str, Any]:
    """Memory of our step over the published one's, beside its bar; empty where one is not known."""
    peaks = [result.get(name, {}).get("peak_memory_bytes") for name in ("cavmae", "published")]
    if None in peaks:
        return {}
    ratio = peaks[0] / peaks[1]
    return {"memory": {"ratio": ratio, "bar": MEMORY_BAR, "met": ratio <= MEMORY_BAR}}


def _energy(step: TrainingStep, steps: int, batch: int, device: torch.device) -> dict[str, Any]:
    """Of steps after the timed ones; none are run where it can't be read."""
    meter = power_meter(device)
    meter.start()
    if meter.readable:
        for _ in range(steps):
            timed(step, device)
    return meter.stop().record(steps * batch)


def _start_of_peak(device: torch.device) -> int:
    """Bytes in use by what was built before."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _peak_since(before: int, device: torch.device) -> int | None:
    """Most bytes in use beyond `before`; None on a CPU, where torch does not count them."""
    if device.type != "cuda":
        return None
    return torch.cuda.max_memory_allocated(device) - before


def timed(step: TrainingStep, device: torch.device) -> tuple[float, float]:
    """Seconds and loss of one step, the device idle before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    loss = step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, float(loss)


def line(result: dict[str, Any]) -> str:
    """One batch size for people."""
    found = []
    for name in ("cavmae", "published"):
        one = result.get(name)
        if one is None:
            continue
        if "skipped" in one:
            found.append(f"{name}: {one['skipped'].splitlines()[0]}")
            continue
        peak = one["peak_memory_bytes"]
        found.append(
            f"{name} {one['median_seconds']:.4g} s a step ({one['samples_per_second']:.4g} "
            f"samples/s, {one['tflops']:.3g} TFLOP/s, MFU {one['mfu']:.1%}"
            + (")" if peak is None else f", {peak / 2**30:.2f} GiB)")
        )
    if ratio := result.get("speedup"):
        found.append(
            f"{ratio['median']:.2f}x ({ratio['minimum']:.2f} to {ratio['maximum']:.2f}) as fast"
        )
    if memory := result.get("memory"):
        found.append(f"{memory['ratio']:.2f}x the memory")
    return f"{result['precision']} batch {result['batch']}: {', '.join(found)}"


if __name__ == "__main__":
    import sys

    sys.exit(main(sys.argv[1:]))
