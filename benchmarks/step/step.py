"""`cavmae bench step`: a training step of our model against the published one, over batch sizes.

The two are timed in turn, so that a machine that slows down slows both, and each ratio is of two
neighbouring steps. The peak rates of the machine, measured in the same run, stand beside them.
"""

import statistics
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from cavmae.benchmarks.harness.machine_peaks import measure_rates, utilization
from cavmae.benchmarks.harness.power import power_meter
from cavmae.benchmarks.harness.process_memory import gpu_peak_bytes, no_memory_left
from cavmae.benchmarks.harness.records import RecordedConfig, spread, timing, write_record
from cavmae.benchmarks.harness.timeline import Label, Timeline
from cavmae.benchmarks.harness.timing import Device, default_device
from cavmae.benchmarks.step.ceilings import measure_ceilings, median_ceilings
from cavmae.benchmarks.step.memory import step_peak_bytes
from cavmae.benchmarks.step.training_step import (
    SIZES,
    Choices,
    ModelName,
    Precision,
    Size,
    StepSetting,
    TrainingStep,
    part_seconds,
    timed,
    timed_in_turn,
)
from cavmae.field_checks import PositiveInt
from cavmae.trainer.cost_model.flops import training_flops
from cavmae.trainer.model.blocks import Recompute

MODELS: tuple[ModelName, ...] = ("published", "cavmae")
MEMORY_BAR = 0.7
"""The most that our step may take of the published step's memory."""


@dataclass(frozen=True)
class StepConfig(RecordedConfig):
    """Time a training step of our model and of the published one, with memory and FLOP/s."""

    model: Size = "base"
    """Sizes of the model."""
    modality_depth: int | None = None
    """Blocks of each encoder, instead of the model's."""
    decoder_depth: int | None = None
    """Blocks of the decoder, instead of the model's."""
    batch: tuple[int, ...] = (8,)
    """Samples a step; several sizes are measured one by one."""
    repeats: PositiveInt = 5
    """Timed steps of each model."""
    warm_up: int = 1
    """Steps before the timed ones."""
    precision: tuple[Precision, ...] = ("fp32", "bf16")
    """Precision of the steps."""
    device: Device = field(default_factory=default_device)
    """Where the steps run."""
    only: ModelName | None = None
    """One model, which has the memory alone."""
    compile: bool = False
    """Compile the blocks of our model."""
    recompute: Recompute = "selective"
    """Activations of our model that the backward pass recomputes."""
    memory: bool = True
    """Measure peak memory on a CPU, in a process for each model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.batch) < 1:
            raise ValueError(f"batch is {min(self.batch)}; use 1 or more")


def main(arguments: list[str]) -> int:
    """Time the models at every precision and batch size, print and write the record; returns the
    exit code."""
    import tyro  # which a machine lacks that has torch and triton alone, as it lacks rich

    from cavmae.benchmarks.report.console import show

    config = tyro.cli(StepConfig, prog="cavmae bench step", args=arguments)
    depths = {"modality_depth": config.modality_depth, "decoder_depth": config.decoder_depth}
    sizes = replace(SIZES[config.model], **{k: v for k, v in depths.items() if v is not None})
    device = torch.device(config.device)
    models = (config.only,) if config.only else MODELS
    choices = Choices(compile=config.compile, recompute=config.recompute)
    results: dict[str, Any] = {"machine": {}}
    for precision in config.precision:
        rates = measure_rates(device, precision, sizes, max(config.batch))
        results["machine"][precision] = rates
        for batch in config.batch:
            print(f"{precision} batch {batch} ...", file=sys.stderr, flush=True)
            settings = {
                name: StepSetting(name, sizes, batch, precision, device, choices) for name in models
            }
            result = compare(
                settings,
                config.repeats,
                config.warm_up,
                rates=rates,
                cpu_memory=config.memory,
                with_ceilings=True,
            )
            result |= memory_ratio(result)
            # A single batch size has the key of older records, so that they can be compared.
            key = precision if len(config.batch) == 1 else f"{precision} batch {batch}"
            results[key] = {"precision": precision, "batch": batch, **result}
    batch = config.batch[0] if len(config.batch) == 1 else config.batch
    configuration = asdict(config) | {"batch": batch, "sizes": asdict(sizes)}
    show(write_record(config.out, "step", device, configuration, results))
    return 0


def compare(
    settings: Mapping[str, StepSetting],
    repeats: int,
    warm_up: int,
    *,
    rates: dict[str, Any] | None = None,
    cpu_memory: bool = False,
    with_ceilings: bool = False,
) -> dict[str, Any]:
    """Time steps in turn.

    Args:
        settings: by name; sizes, batch and device are the same.
        repeats: timed steps of each.
        warm_up: steps before those.
        rates: of the machine, from `measure_rates`; None: shares of them are not computed.
        cpu_memory: measure peak memory on a CPU too, in a process for each step.
        with_ceilings: measure what the machine reaches in the kernels of `cavmae` after each round
            of steps: a machine that changes its speed changes that of both.

    Returns:
        Per name its timing, samples per second, TFLOP/s of the arithmetic that the losses need
        and its `utilization`, peak memory, energy, last loss and `parts` (timings of forward pass,
        backward pass and update), or why it was skipped; of two steps, `speedup`: how many times
        as long the first one takes, with its spread; `ceilings`, the median of each.
    """
    device = next(iter(settings.values())).device
    steps: dict[str, TrainingStep] = {}
    peaks: dict[str, int | None] = dict.fromkeys(settings)  # torch does not count a CPU's memory
    results: dict[str, Any] = {}

    def prepare(name: str) -> None:
        steps[name] = TrainingStep(settings[name])
        # The first step makes the optimizer's state: the peak of memory is the second one's.
        for _ in range(max(2, warm_up)):
            steps[name]()

    for name in settings:
        try:
            if device.type == "cuda":
                peaks[name] = gpu_peak_bytes(lambda name=name: prepare(name), device)
            else:
                prepare(name)
        except RuntimeError as error:
            if not no_memory_left(error):
                raise
            # A result, and the other one continues.
            results[name] = {"skipped": str(error)}
            steps.pop(name, None)
            torch.cuda.empty_cache()
    timelines = {name: Timeline(device, Label("before")) for name in steps}
    for name, step in steps.items():
        step.timeline = timelines[name]
    ours = settings["cavmae"] if with_ceilings and "cavmae" in steps else None
    found: list[dict[str, Any]] = []
    seconds, losses = timed_in_turn(
        steps, repeats, device, lambda: found.append(measure_ceilings(ours)) if ours else None
    )
    parts = {name: part_seconds(timelines[name], repeats) for name in steps}
    energies = {name: _energy(step, repeats, device) for name, step in steps.items()}
    steps.clear()  # so that there is room for those of other processes
    if device.type == "cpu" and cpu_memory:
        peaks = {name: step_peak_bytes(setting) for name, setting in settings.items()}
    for name, times in seconds.items():
        setting, rate = settings[name], settings[name].batch / statistics.median(times)
        flops_per_second = training_flops(setting.config) * rate
        results[name] = timing(times) | {
            "samples_per_second": rate,
            "tflops": flops_per_second / 1e12,
            "peak_memory_bytes": peaks[name],
            "energy": energies[name],
            "last_loss": losses[name],
            "parts": {part: timing(spent) for part, spent in parts[name].items()},
        }
        if rates:
            results[name] |= utilization(flops_per_second, rates, setting.precision)
    if len(seconds) == 2:
        pairs = zip(*seconds.values(), strict=True)
        results["speedup"] = spread([slow / fast for slow, fast in pairs])
    if found:
        results["ceilings"] = median_ceilings(found)
    return results


def memory_ratio(result: dict[str, Any]) -> dict[str, Any]:
    """Return the memory of our step over the published one's, beside its bar; empty where one is
    not known."""
    peaks = [result.get(name, {}).get("peak_memory_bytes") for name in ("cavmae", "published")]
    if None in peaks:
        return {}
    ratio = peaks[0] / peaks[1]
    return {"memory": {"ratio": ratio, "bar": MEMORY_BAR, "met": ratio <= MEMORY_BAR}}


def _energy(step: TrainingStep, steps: int, device: torch.device) -> dict[str, Any]:
    """Measure steps after the timed ones; none are run where energy can't be read."""
    meter = power_meter(device)
    meter.start()
    if meter.readable:
        for _ in range(steps):
            timed(step, device)
    return meter.stop().record(steps * step.batch)
