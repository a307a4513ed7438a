"""`cavmae bench ablations`: what each choice about the step is worth on this machine.

Our step as runs do it is timed in turn with the same step but for one change, so each ratio is of
neighbouring steps. The record is the before and after of every optimisation, on any machine; and of
designs that train another model, for their cost alone.
"""

import sys
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
import tyro

from cavmae.benchmarks.harness.records import RecordedConfig, write_record
from cavmae.benchmarks.harness.timing import Device, default_device
from cavmae.benchmarks.report.console import show
from cavmae.benchmarks.step.step import compare
from cavmae.benchmarks.step.training_step import SIZES, Choices, Precision, Size, StepSetting
from cavmae.field_checks import PositiveInt
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
DESIGNS: dict[str, dict[str, Any]] = {
    "cross-attention decoder": {"decoder": "cross", "decoded_share": 1 / 3},
}
"""Other models: what they change of `ModelConfig`."""


@dataclass(frozen=True)
class AblationsConfig(RecordedConfig):
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

    def __post_init__(self) -> None:
        super().__post_init__()
        known = [*CHANGED, *DESIGNS]
        if unknown := set(self.only) - set(known):
            raise ValueError(f"only names {', '.join(unknown)}; use some of {', '.join(known)}")


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
    """Time a step as runs do it in turn with each change, print and write the record; returns the
    exit code."""
    config = tyro.cli(AblationsConfig, prog="cavmae bench ablations", args=arguments)
    device, sizes = torch.device(config.device), SIZES[config.model]
    results: dict[str, Any] = {}
    for precision in config.precision:
        results[precision] = {}
        usual = StepSetting("cavmae", sizes, config.batch, precision, device)
        for name in config.only or [*possible(device), *DESIGNS]:
            print(f"{precision}, {name} ...", file=sys.stderr, flush=True)
            changed = replace(
                usual,
                config=replace(sizes, **DESIGNS.get(name, {})),
                choices=CHANGED.get(name, usual.choices),
            )
            settings = {"changed": changed, "as_runs_do": usual}
            found = compare(settings, config.repeats, warm_up=1, cpu_memory=True)
            if "speedup" in found:  # neither was skipped
                found["ratio"] = found.pop("speedup")
                peaks = [found[way]["peak_memory_bytes"] for way in settings]
                found["memory_ratio"] = peaks[0] / peaks[1]
            results[precision][name] = found
    configuration = asdict(config) | {"sizes": asdict(sizes)}
    show(write_record(config.out, "ablations", device, configuration, results))
    return 0
