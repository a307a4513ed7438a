"""`cavmae bench ablations`: what each choice about the step is worth on this machine.

Our step as runs do it is timed in turn with the same step but for one change, so each ratio is of
neighbouring steps. The record is the before and after of every optimisation, on any machine.
"""

import gc
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
import tyro

from cavmae.benchmarks.harness.process_memory import gpu_peak_bytes
from cavmae.benchmarks.harness.records import RESULTS, extremes, spread, timing, write_record
from cavmae.benchmarks.harness.timing import Device, default_device
from cavmae.benchmarks.step.memory import step_peak_bytes
from cavmae.benchmarks.step.training_step import (
    SIZES,
    Choices,
    Precision,
    Size,
    StepSetting,
    TrainingStep,
    timed_in_turn,
)
from cavmae.field_checks import CheckedFields, PositiveInt
from cavmae.kernels.attention import FLASH_ATTN_IS_INSTALLED

CHANGED: dict[str, Choices] = {
    "attention by sdpa": Choices(attention="sdpa"),
    "attention by flash-attn": Choices(attention="flash-attn"),
    "every patch predicted": Choices(predict_all=True),
    "update not fused": Choices(fused_update=False),
    "blocks compiled": Choices(compile=True),
    "norms and GELU kept": Choices(recompute="none"),
    "blocks recomputed": Choices(recompute="full"),
}


@dataclass(frozen=True)
class AblationsConfig(CheckedFields):
    """Measure what each choice about a step is worth on this machine."""

    model: Size = "base"
    """Sizes of the model."""
    batch: PositiveInt = field(default_factory=lambda: 256 if torch.cuda.is_available() else 8)
    """Samples a step."""
    repeats: PositiveInt = 5
    """Timed steps of each."""
    precision: tuple[Precision, ...] = field(
        default_factory=lambda: ("bf16",) if torch.cuda.is_available() else ("fp32", "bf16")
    )
    """Precision of the steps."""
    only: tuple[str, ...] = ()
    """These changes alone, such as `"every patch predicted"`."""
    device: Device = field(default_factory=default_device)
    """Where the steps run."""
    out: str = RESULTS
    """Folder of the record."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if unknown := set(self.only) - CHANGED.keys():
            raise ValueError(f"only names {', '.join(unknown)}; use some of {', '.join(CHANGED)}")


def possible(device: torch.device) -> list[str]:
    """Return the changes that apply to a device."""
    cuda = device.type == "cuda"
    if cuda and FLASH_ATTN_IS_INSTALLED:
        return list(CHANGED)
    skipped = {"attention by flash-attn"}
    if cuda:
        skipped.add("attention by sdpa")  # which is what runs do there
    return [name for name in CHANGED if name not in skipped]


def main(arguments: list[str]) -> int:
    """Time every change and write a record; returns the exit code."""
    config = tyro.cli(AblationsConfig, prog="cavmae bench ablations", args=arguments)
    device, sizes = torch.device(config.device), SIZES[config.model]
    results: dict[str, Any] = {}
    for precision in config.precision:
        results[precision] = {}
        for name in config.only or possible(device):
            usual = StepSetting("cavmae", sizes, config.batch, precision, device)
            found = change(name, usual, config.repeats)
            results[precision][name] = found
            times, memory = extremes(found["ratio"], ".3f"), f"{found['memory_ratio']:.3f}x"
            print(f"{precision}, {name}: time {times}, memory {memory}", flush=True)
    configuration = asdict(config) | {"sizes": asdict(sizes)}
    print(f"record: {write_record(config.out, 'ablations', device, configuration, results)}")
    return 0


def change(name: str, usual: StepSetting, repeats: int) -> dict[str, Any]:
    """Time a step as runs do it and one with a change, in turn.

    Args:
        name: one of `CHANGED`.
        usual: the step as runs do it.
        repeats: timed steps of each.

    Returns:
        Timings and peak bytes of `as_runs_do` and `changed`; the ratios changed / as runs do.
    """
    settings = {"as_runs_do": usual, "changed": replace(usual, choices=CHANGED[name])}
    steps = {way: TrainingStep(setting) for way, setting in settings.items()}
    timed_in_turn(steps, 1, usual.device)  # makes the optimizer's state, and compiles
    seconds, _ = timed_in_turn(steps, repeats, usual.device)
    steps.clear()  # both have freed their memory before that of either is measured
    gc.collect()
    peaks = {way: _peak_bytes(setting) for way, setting in settings.items()}
    pairs = zip(seconds["changed"], seconds["as_runs_do"], strict=True)
    return {way: timing(seconds[way]) | {"peak_memory_bytes": peaks[way]} for way in seconds} | {
        "ratio": spread([changed / as_runs_do for changed, as_runs_do in pairs]),
        "memory_ratio": peaks["changed"] / peaks["as_runs_do"],
    }


def _peak_bytes(setting: StepSetting) -> int:
    """Return the peak on a CPU of a separate process, on a GPU of two steps here."""
    if setting.device.type == "cpu":
        return step_peak_bytes(setting)
    torch.cuda.empty_cache()

    def two_steps() -> None:
        step = TrainingStep(setting)
        for _ in range(2):
            step()

    return gpu_peak_bytes(two_steps, setting.device)
