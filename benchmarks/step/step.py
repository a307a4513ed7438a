"""`cavmae bench step`: a training step of our model against the published one, over batch sizes.

The two are timed in turn, so that a machine that slows down slows both, and each ratio is of two
neighbouring steps. The peak rates of the machine, measured in the same run, stand beside them.
"""

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from cavmae.benchmarks.harness.machine_peaks import measure_rates, utilization
from cavmae.benchmarks.harness.power import power_meter
from cavmae.benchmarks.harness.process_memory import gpu_peak_bytes
from cavmae.benchmarks.harness.records import RESULTS, extremes, spread, timing, write_record
from cavmae.benchmarks.harness.timing import Device, default_device
from cavmae.benchmarks.step.memory import step_peak_bytes
from cavmae.benchmarks.step.training_step import (
    SIZES,
    Choices,
    ModelName,
    Precision,
    Size,
    StepSetting,
    TrainingStep,
    timed,
    timed_in_turn,
)
from cavmae.field_checks import CheckedFields, PositiveInt
from cavmae.trainer.cost_model.flops import training_flops

MODELS: tuple[ModelName, ...] = ("published", "cavmae")
MEMORY_BAR = 0.7
"""The most that our step may take of the published step's memory."""


@dataclass(frozen=True)
class StepConfig(CheckedFields):
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
    memory: bool = True
    """Measure peak memory on a CPU, in a process for each model."""
    out: str = RESULTS
    """Folder of the record."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.batch) < 1:
            raise ValueError(f"batch is {min(self.batch)}; use 1 or more")


def main(arguments: list[str]) -> int:
    """Run the command; returns its exit code."""
    import tyro  # which a machine lacks that has torch and triton alone

    bench_step(tyro.cli(StepConfig, prog="cavmae bench step", args=arguments))
    return 0


def bench_step(config: StepConfig) -> None:
    """Time the models at every precision and batch size, and write a record."""
    depths = {"modality_depth": config.modality_depth, "decoder_depth": config.decoder_depth}
    sizes = replace(SIZES[config.model], **{k: v for k, v in depths.items() if v is not None})
    device = torch.device(config.device)
    models = (config.only,) if config.only else MODELS
    choices = Choices(compile=config.compile)
    results: dict[str, Any] = {"machine": {}}
    for precision in config.precision:
        rates = measure_rates(device, precision, sizes, max(config.batch))
        results["machine"][precision] = rates
        for batch in config.batch:
            settings: dict[ModelName, StepSetting] = {
                name: StepSetting(name, sizes, batch, precision, device, choices) for name in models
            }
            result = compare(settings, config.repeats, config.warm_up)
            if device.type == "cpu" and config.memory:
                for name, setting in settings.items():
                    result[name]["peak_memory_bytes"] = step_peak_bytes(setting)
            result |= memory_ratio(result)
            for name in models:
                if "tflops" in result[name]:
                    flops_per_second = result[name]["tflops"] * 1e12
                    result[name] |= utilization(flops_per_second, rates, precision)
            # A single batch size has the key of older records, so that they can be compared.
            key = precision if len(config.batch) == 1 else f"{precision} batch {batch}"
            results[key] = {"precision": precision, "batch": batch, **result}
            print(line(results[key]), flush=True)
    batch = config.batch[0] if len(config.batch) == 1 else config.batch
    configuration = asdict(config) | {"batch": batch, "sizes": asdict(sizes)}
    print(f"record: {write_record(config.out, 'step', device, configuration, results)}")


def compare(
    settings: Mapping[ModelName, StepSetting], repeats: int, warm_up: int
) -> dict[str, Any]:
    """Time models in turn.

    Args:
        settings: by model; they differ in the model alone.
        repeats: timed steps of each.
        warm_up: steps before those.

    Returns:
        Per model its timing, samples per second, TFLOP/s of the arithmetic that the losses need,
        peak memory (CUDA), energy and last loss, or why it was skipped; of two models, the ratio
        baseline / ours with its spread.
    """
    one = next(iter(settings.values()))
    config, batch, device = one.config, one.batch, one.device
    steps: dict[str, TrainingStep] = {}
    peaks: dict[str, int | None] = {}
    results: dict[str, Any] = {}

    def prepare(name: ModelName) -> None:
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
                peaks[name] = None  # torch does not count memory on a CPU
        except torch.cuda.OutOfMemoryError as error:  # a result, and the other model continues
            results[name] = {"skipped": str(error)}
            steps.pop(name, None)
            torch.cuda.empty_cache()
    seconds, losses = timed_in_turn(steps, repeats, device)
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
        pairs = zip(seconds["published"], seconds["cavmae"], strict=True)
        results["speedup"] = spread([slow / fast for slow, fast in pairs])
    return results


def memory_ratio(result: dict[str, Any]) -> dict[str, Any]:
    """Return the memory of our step over the published one's, beside its bar; empty where one is
    not known."""
    peaks = [result.get(name, {}).get("peak_memory_bytes") for name in ("cavmae", "published")]
    if None in peaks:
        return {}
    ratio = peaks[0] / peaks[1]
    return {"memory": {"ratio": ratio, "bar": MEMORY_BAR, "met": ratio <= MEMORY_BAR}}


def _energy(step: TrainingStep, steps: int, batch: int, device: torch.device) -> dict[str, Any]:
    """Measure steps after the timed ones; none are run where energy can't be read."""
    meter = power_meter(device)
    meter.start()
    if meter.readable:
        for _ in range(steps):
            timed(step, device)
    return meter.stop().record(steps * batch)


def line(result: dict[str, Any]) -> str:
    """Format the result of one batch size."""
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
        found.append(f"{extremes(ratio)} as fast")
    if memory := result.get("memory"):
        found.append(f"{memory['ratio']:.2f}x the memory")
    return f"{result['precision']} batch {result['batch']}: {', '.join(found)}"
