"""`cavmae bench step`: a training step of our model against the published one, in one run.

The two are timed in turn, so that a machine that slows down slows both, and each ratio is of two
neighbouring steps.
"""

import argparse
import statistics
import time
from dataclasses import asdict, replace
from typing import Any

import torch

from cavmae.benchmarks.records import timing, write_record
from cavmae.benchmarks.training_step import ModelName, Precision, TrainingStep
from cavmae.trainer.flops import training_flops
from cavmae.trainer.model.config import ModelConfig

SIZES = {
    "base": ModelConfig(),
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
_MODELS: tuple[ModelName, ...] = ("published", "cavmae")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(
        prog="cavmae bench step", description="Time of a training step, with memory and FLOP/s."
    )
    arguments.add_argument("--model", choices=list(SIZES), default="base", help="sizes")
    arguments.add_argument("--modality-depth", type=int, help="instead of the model's")
    arguments.add_argument("--decoder-depth", type=int, help="instead of the model's")
    arguments.add_argument("--batch", type=int, default=8, help="samples a step")
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
    arguments.add_argument("--compile", action="store_true", help="compile our model's blocks")
    arguments.add_argument("--out", default="benchmarks/results", help="folder of the record")
    return arguments


def main(argv: list[str]) -> int:
    """Time both models and write a record; returns the exit code."""
    flags = parser().parse_args(argv)
    for name in ("batch", "repeats"):
        if getattr(flags, name) < 1:
            raise ValueError(f"--{name} is {getattr(flags, name)}; use 1 or more")
    depths = {
        name: depth
        for name in ("modality_depth", "decoder_depth")
        if (depth := getattr(flags, name)) is not None
    }
    config = replace(SIZES[flags.model], **depths)
    device = torch.device(flags.device)
    results = {}
    for precision in flags.precision:
        results[precision] = compare(
            config,
            flags.batch,
            precision,
            device,
            repeats=flags.repeats,
            warm_up=flags.warm_up,
            compile=flags.compile,
        )
        print(_line(precision, flags.batch, results[precision]))
    path = write_record(flags.out, "step", device, vars(flags) | {"sizes": asdict(config)}, results)
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
    compile: bool = False,
) -> dict[str, Any]:
    """Time both models in turn.

    Returns:
        Per model its timing, samples per second, TFLOP/s of the arithmetic that the losses need,
        peak memory (CUDA) and last loss; the ratio baseline / ours with its spread.
    """
    steps: dict[ModelName, TrainingStep] = {}
    peaks: dict[ModelName, int | None] = {}
    for name in _MODELS:
        before = _start_of_peak(device)
        steps[name] = TrainingStep(name, config, batch, precision, device, compile=compile)
        for _ in range(max(1, warm_up)):
            steps[name]()
        peaks[name] = _peak_since(before, device)
    seconds: dict[str, list[float]] = {name: [] for name in _MODELS}
    losses = {}
    for repeat in range(repeats):
        # The one that goes first changes, so that neither always follows the other.
        for name in _MODELS[:: 1 if repeat % 2 else -1]:
            elapsed, losses[name] = _timed(steps[name], device)
            seconds[name].append(elapsed)
    results: dict[str, Any] = {}
    for name in _MODELS:
        median = statistics.median(seconds[name])
        results[name] = timing(seconds[name]) | {
            "samples_per_second": batch / median,
            "tflops": training_flops(config) * batch / median / 1e12,
            "peak_memory_bytes": peaks[name],
            "last_loss": losses[name],
        }
    ratios = [
        slow / fast for slow, fast in zip(seconds["published"], seconds["cavmae"], strict=True)
    ]
    results["speedup"] = {
        "median": statistics.median(ratios),
        "minimum": min(ratios),
        "maximum": max(ratios),
    }
    return results


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


def _timed(step: TrainingStep, device: torch.device) -> tuple[float, float]:
    """Seconds and loss of one step, the device idle before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    loss = step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, float(loss)


def _line(precision: str, batch: int, result: dict[str, Any]) -> str:
    ours, published, ratio = result["cavmae"], result["published"], result["speedup"]
    return (
        f"{precision} batch {batch}: {ours['median_seconds']:.4g} s a step "
        f"({ours['samples_per_second']:.4g} samples/s, {ours['tflops']:.3g} TFLOP/s), published "
        f"{published['median_seconds']:.4g} s: {ratio['median']:.2f}x "
        f"({ratio['minimum']:.2f} to {ratio['maximum']:.2f})"
    )


if __name__ == "__main__":
    import sys

    sys.exit(main(sys.argv[1:]))
