"""`cavmae bench choices`: what each choice about the step is worth on this machine.

Our step as runs do it is timed in turn with the same step but for one thing, so each ratio is of
neighbouring steps. The record is the before and after of every optimisation, on any machine.
"""

import argparse
import gc
import statistics
from dataclasses import asdict
from typing import Any

import torch

from cavmae.benchmarks.harness.records import timing, write_record
from cavmae.benchmarks.step.memory import step_peak_bytes
from cavmae.benchmarks.step.step import SIZES, timed
from cavmae.benchmarks.step.training_step import Choices, Precision, TrainingStep
from cavmae.kernels.attention import FLASH_ATTN_IS_INSTALLED
from cavmae.trainer.model.config import ModelConfig

CHANGED: dict[str, Choices] = {
    "attention by sdpa": Choices(attention="sdpa"),
    "attention by flash-attn": Choices(attention="flash-attn"),
    "every patch predicted": Choices(predict_all=True),
    "update not fused": Choices(fused_update=False),
    "blocks compiled": Choices(compile=True),
    "norms and GELU kept": Choices(recompute="none"),
    "blocks recomputed": Choices(recompute="full"),
}


def possible(device: torch.device) -> list[str]:
    """The changes that say something on a device."""
    cuda = device.type == "cuda"
    if cuda and FLASH_ATTN_IS_INSTALLED:
        return list(CHANGED)
    left_out = {"attention by flash-attn"}
    if cuda:
        left_out.add("attention by sdpa")  # which is what runs do there
    return [name for name in CHANGED if name not in left_out]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    cuda = torch.cuda.is_available()
    arguments = argparse.ArgumentParser(
        prog="cavmae bench choices", description="What each choice about a step is worth here."
    )
    arguments.add_argument("--model", choices=list(SIZES), default="base", help="sizes")
    arguments.add_argument("--batch", type=int, default=256 if cuda else 8, help="samples a step")
    arguments.add_argument("--repeats", type=int, default=5, help="timed steps of each")
    arguments.add_argument(
        "--precision",
        nargs="+",
        choices=["fp32", "bf16"],
        default=["bf16"] if cuda else ["fp32", "bf16"],
        help="of the steps that are timed",
    )
    arguments.add_argument("--only", nargs="+", choices=list(CHANGED), help="these changes alone")
    arguments.add_argument("--device", default="cuda" if cuda else "cpu", help="`cuda` or `cpu`")
    arguments.add_argument("--out", default="benchmarks/results", help="folder of the record")
    return arguments


def main(argv: list[str]) -> int:
    """Time every change and write a record; returns the exit code."""
    flags = parser().parse_args(argv)
    for name in ("batch", "repeats"):
        if getattr(flags, name) < 1:
            raise ValueError(f"--{name} is {getattr(flags, name)}; use 1 or more")
    device, config = torch.device(flags.device), SIZES[flags.model]
    results: dict[str, Any] = {}
    for precision in flags.precision:
        results[precision] = {}
        for name in flags.only or possible(device):
            found = change(name, config, flags.batch, precision, device, repeats=flags.repeats)
            results[precision][name] = found
            time_ratio, memory_ratio = found["ratio"], found["memory_ratio"]
            print(
                f"{precision}, {name}: {time_ratio['median']:.3f}x the time "
                f"({time_ratio['minimum']:.3f} to {time_ratio['maximum']:.3f}), "
                f"{memory_ratio:.3f}x the memory",
                flush=True,
            )
    configuration = vars(flags) | {"sizes": asdict(config)}
    path = write_record(flags.out, "choices", device, configuration, results)
    print(f"record: {path}")
    return 0


def change(
    name: str,
    config: ModelConfig,
    batch: int,
    precision: Precision,
    device: torch.device,
    *,
    repeats: int,
) -> dict[str, Any]:
    """Time a step as runs do it and one with a change, in turn.

    Args:
        name: one of `CHANGED`.
        config, batch, precision, device: as `TrainingStep` takes them.
        repeats: of each.

    Returns:
        Timings and peak bytes of `as_runs_do` and `changed`; the ratios changed / as runs do.
    """
    choices = {"as_runs_do": Choices(), "changed": CHANGED[name]}
    steps = {
        way: TrainingStep("cavmae", config, batch, precision, device, choices=choice)
        for way, choice in choices.items()
    }
    seconds: dict[str, list[float]] = {way: [] for way in steps}
    for repeat in range(-1, repeats):
        for way in list(steps)[:: 1 if repeat % 2 else -1]:
            elapsed, _ = timed(steps[way], device)
            if repeat >= 0:  # the first steps make the optimizer's state, and compile
                seconds[way].append(elapsed)
    steps.clear()  # both have let go of their memory before that of either is measured
    gc.collect()
    peaks = {
        way: _peak_bytes(config, batch, precision, device, choice)
        for way, choice in choices.items()
    }
    pairs = zip(seconds["changed"], seconds["as_runs_do"], strict=True)
    ratios = [changed / usual for changed, usual in pairs]
    return {way: timing(seconds[way]) | {"peak_memory_bytes": peaks[way]} for way in seconds} | {
        "ratio": {
            "median": statistics.median(ratios),
            "minimum": min(ratios),
            "maximum": max(ratios),
        },
        "memory_ratio": peaks["changed"] / peaks["as_runs_do"],
    }


def _peak_bytes(
    config: ModelConfig, batch: int, precision: Precision, device: torch.device, choices: Choices
) -> int:
    """On a CPU of a process of its own; on a GPU of two steps here."""
    if device.type == "cpu":
        return step_peak_bytes("cavmae", config, batch, precision, choices)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step = TrainingStep("cavmae", config, batch, precision, device, choices=choices)
    for _ in range(2):
        step()
    return torch.cuda.max_memory_allocated(device) - before


if __name__ == "__main__":
    import sys

    sys.exit(main(sys.argv[1:]))
