"""`cavmae bench scaling`: what a step would take on 1 to 4,096 GPUs. A model, not a measurement.

Bytes on the wire are those that the tests count in real runs of 2, 4 and 8 ranks. The time of one
GPU is predicted, as `cavmae bench predict` does, so every step is a range; all else is that of its
middle. The speed of links and of loaders, and how often GPUs fail, are the inputs, each printed
with where it comes from. Two series: `weak`, in which each GPU has 128 clips a step however many
there are, and `strong`, in which a global batch is shared out.
"""

import dataclasses
import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from cavmae.benchmarks.harness.plots import plot_beside
from cavmae.benchmarks.harness.records import RecordedConfig, write_record
from cavmae.benchmarks.report.console import show
from cavmae.benchmarks.training.failure_simulation import Month, Run, simulated_month
from cavmae.field_checks import PositiveFloat, PositiveInt
from cavmae.trainer.config.configs import PretrainConfig, WatchdogConfig
from cavmae.trainer.config.recipes import audioset_base
from cavmae.trainer.cost_model.comm_volume import (
    TensorSizes,
    collectives,
    sent_by_purpose,
    tensor_sizes,
)
from cavmae.trainer.cost_model.gpus import gpu_ceilings, known_gpu
from cavmae.trainer.cost_model.kernel import Kernel
from cavmae.trainer.cost_model.kernel_time import Ceilings
from cavmae.trainer.cost_model.memory import state_bytes
from cavmae.trainer.cost_model.rank_time import rank_times, rank_work, step_seconds
from cavmae.trainer.cost_model.step_time import Device, Links, step_time
from cavmae.trainer.cost_model.step_work import micro_batch_work, scaled_work
from cavmae.trainer.model.cavmae import CAVMAE

STAGES = (0, 1, 2, 3)
MONTH_GPUS = (1_000, 16_384)
MONTH_SECONDS = 30 * 86_400.0
_DTYPE = "bf16"
_COUNTED_SAMPLES = (2, 3)
LLAMA_3_GPU_SECONDS_PER_FAILURE = 16_384 * 54 * 86_400 / 419
"""Grattafiori et al., The Llama 3 Herd of Models, 2024, section 3.3.4: 419 unexpected interruptions
in 54 days on 16,384 H100, one every half a million GPU hours."""
# What an input is where no flag says otherwise, and where that comes from.
INPUTS: dict[str, tuple[float, str]] = {
    "gpus_per_node": (8, "an HGX node"),
    "within_node_gbytes": (Links.within_node / 1e9, "NVLink 4, data sheet, one direction"),
    "between_nodes_gbytes": (Links.between_nodes / 1e9, "a 400 Gb/s card for each GPU, data sheet"),
    "share_of_links": (Links.share, "ASSUMED share of both that large collectives reach"),
    "loader_core_seconds": (
        0.008125,
        "measured on CPU, log-mel included: data-20261125T165254-8c4112c768.json",
    ),
    "cores_per_gpu": (14, "a DGX H200: 112 cores, 8 GPUs"),
    "copy_gbytes": (10, "ASSUMED: state to host memory while training stands still, a GPU"),
    "gpu_hours_per_failure": (
        round(LLAMA_3_GPU_SECONDS_PER_FAILURE / 3600),
        "Llama 3 (2024), section 3.3.4: 419 failures in 54 days on 16,384 H100",
    ),
    "restart_seconds": (
        15.0,
        "measured, 2 CPU ranks killed: faults-20261125T153805-060cf2cb92.json",
    ),
    "node_seconds": (300, "ASSUMED: until another node has taken the place of a broken one"),
    "start_seconds": (
        120,
        "ASSUMED, beyond restart_seconds: processes, imports and groups of thousands of ranks",
    ),
    "hang_share": (0.1, "ASSUMED share of failures that only the watchdog notices"),
    "hang_seconds": (WatchdogConfig.min_seconds, "default of watchdog.min_seconds"),
    "write_gbytes": (
        1,
        "ASSUMED: a rank's part of a checkpoint to shared storage, beside the steps",
    ),
}


def _about(text: str) -> Any:
    return tyro.conf.arg(help=text)


ScalingConfig = dataclasses.make_dataclass(
    "ScalingConfig",
    [
        *(
            (name, Annotated[PositiveFloat, _about(source)], value)
            for name, (value, source) in INPUTS.items()
        ),
        ("gpu", Annotated[str, _about("GPU, as in `cavmae bench predict`.")], "H200"),
        ("clips_per_gpu", Annotated[PositiveInt, _about("Clips of each GPU, weak series.")], 128),
        ("global_batch", Annotated[PositiveInt, _about("Global batch, strong series.")], 16_384),
    ],
    bases=(RecordedConfig,),
    frozen=True,
)
"""The inputs are options too."""


@dataclass(frozen=True)
class Failures:
    """How often a run fails, and what failures and checkpoints cost.

    Attributes:
        seconds_between: mean time between two failures of the run; inf: none.
        recovery_seconds: from a failure to the next step, without the steps that are repeated.
        checkpoint_seconds: that training stands still for a checkpoint.
    """

    seconds_between: float
    recovery_seconds: float
    checkpoint_seconds: float


def goodput(failures: Failures, interval_seconds: float) -> float:
    """Return the share of the time, 0 to 1, that goes into steps that are not repeated.

    Source: Daly, A higher order estimate of the optimum checkpoint interval for restart dumps,
    2006: failures come at random with a constant rate, also during a restart.

    Args:
        failures: their rate and costs.
        interval_seconds: of training between two checkpoints.
    """
    between, segment = failures.seconds_between, interval_seconds + failures.checkpoint_seconds
    if math.isinf(between):
        return interval_seconds / segment
    exponent = (failures.recovery_seconds + segment) / between
    if exponent > 700:
        return 0.0  # the run reaches its next checkpoint once in the age of the universe
    lasting = math.exp(failures.recovery_seconds / between) * math.expm1(segment / between)
    return interval_seconds / (between * lasting)


def best_interval(failures: Failures) -> float:
    """Return the seconds between checkpoints with the highest goodput (Daly, equation 37); inf
    where nothing fails."""
    between, cost = failures.seconds_between, failures.checkpoint_seconds
    if math.isinf(between):
        return math.inf
    if cost >= 2 * between:
        return between
    ratio = cost / (2 * between)
    return math.sqrt(2 * cost * between) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost


@dataclass(frozen=True)
class Row:
    """A step on so many GPUs.

    Attributes:
        gpus, zero_stage, global_batch: of the run.
        seconds: of the parts of a step, by name; they add up to `step_seconds`.
        step_seconds, low_step_seconds, high_step_seconds: the middle of the predicted range of a
            GPU's time, and its ends.
        sent_gbytes: that each GPU sends in a step.
        samples_per_second: without failures and checkpoints.
        efficiency: samples a second of a GPU, relative to one GPU alone in the same series.
        hours_between_failures: of the whole run.
        goodput: share of the time that goes into steps that last, with the recipe's checkpoints.
        best_interval_seconds: between checkpoints, with which that share would be highest if
            writing one took no time beside the steps.
    """

    gpus: int
    zero_stage: int
    global_batch: int
    seconds: dict[str, float]
    step_seconds: float
    low_step_seconds: float
    high_step_seconds: float
    sent_gbytes: float
    samples_per_second: float
    efficiency: float
    hours_between_failures: float
    goodput: float
    best_interval_seconds: float


def main(arguments: list[str]) -> int:
    """Compute both series, print, write a record and a plot; returns the exit code.

    Raises:
        ValueError: an input that is not above 0, or a GPU that is not known.
    """
    config = tyro.cli(
        ScalingConfig,
        prog="cavmae bench scaling",
        args=arguments,
        description="Compute a step on 1 to 4,096 GPUs.",
    )
    gpu = gpu_ceilings(known_gpu(config.gpu), _DTYPE)
    values = {name: getattr(config, name) for name in INPUTS}
    inputs = {
        name: {"value": values[name], "source": source if values[name] == default else "given"}
        for name, (default, source) in INPUTS.items()
    }
    model = CAVMAE(audioset_base().model)
    model.freeze_unused(reconstruct=True, contrast=True)
    tensors = tensor_sizes(model)
    series = {
        "weak": rows(values, gpu, tensors, config.clips_per_gpu),
        "strong": rows(values, gpu, tensors, config.clips_per_gpu, config.global_batch),
    }
    results: dict[str, Any] = {
        "inputs": inputs,
        "ceilings": dataclasses.asdict(gpu),
        **{name: [dataclasses.asdict(row) for row in found] for name, found in series.items()},
        "month": [
            dataclasses.asdict(one) for one in months(values, gpu, tensors, config.clips_per_gpu)
        ],
    }
    path = write_record(config.out, "scaling", torch.device("cpu"), vars(config), results)
    show(path)
    _plot(series, path)
    return 0


def rows(
    values: dict[str, float],
    gpu: Ceilings,
    tensors: TensorSizes,
    clips_per_gpu: int,
    global_batch: int = 0,
) -> list[Row]:
    """Compute a series: every stage on 1, 2, 4, ... GPUs, as long as they divide the batch.

    Args:
        values: of `INPUTS`.
        gpu: what one reaches.
        tensors: of the model of `audioset_base`.
        clips_per_gpu: that a GPU takes at once, at most.
        global_batch: clips of a step; 0: `clips_per_gpu` for each GPU.
    """
    found: list[Row] = []
    for stage in STAGES:
        alone = 0.0
        for gpus in (2**power for power in range(13)):
            batch = global_batch or gpus * clips_per_gpu
            if batch % gpus == 0:
                config = _config(stage, batch, gpus, clips_per_gpu)
                row = _row(values, gpu, tensors, config, gpus, alone)
                alone = alone or row.samples_per_second
                found.append(row)
    return found


def months(
    values: dict[str, float], gpu: Ceilings, tensors: TensorSizes, clips_per_gpu: int
) -> list[Month]:
    """Simulate 30 days of the weak series on `MONTH_GPUS`, in stage 1 with the recipe's
    checkpoints.

    Args:
        values: of `INPUTS`.
        gpu: what one reaches.
        tensors: of the model of `audioset_base`.
        clips_per_gpu: of a step.
    """
    found = []
    for gpus in MONTH_GPUS:
        config = _config(1, gpus * clips_per_gpu, gpus, clips_per_gpu)
        row = _row(values, gpu, tensors, config, gpus, 0.0)
        failures = _failures(values, config, tensors, gpus)
        run = Run(
            between_failures=failures.seconds_between,
            hang_share=values["hang_share"],
            hang=values["hang_seconds"],
            recovery=failures.recovery_seconds,
            interval=config.checkpoint.every_steps * row.step_seconds,
            stall=failures.checkpoint_seconds,
            write=failures.checkpoint_seconds * values["copy_gbytes"] / values["write_gbytes"],
        )
        found.append(simulated_month(run, gpus, MONTH_SECONDS))
    return found


def _failures(
    values: dict[str, float], config: PretrainConfig, tensors: TensorSizes, gpus: int
) -> Failures:
    state = state_bytes(config, tensors, gpus, gpu=True)
    return Failures(
        seconds_between=values["gpu_hours_per_failure"] * 3600 / gpus,
        recovery_seconds=sum(values[f"{name}_seconds"] for name in ("restart", "start", "node")),
        checkpoint_seconds=(state.weights + state.optimizer) / (values["copy_gbytes"] * 1e9),
    )


def _config(stage: int, global_batch: int, gpus: int, clips_per_gpu: int) -> PretrainConfig:
    recipe = audioset_base()
    settings: dict[str, Any] = {"zero_stage": stage, "dtype": _DTYPE, "compile": False}
    return dataclasses.replace(
        recipe,
        global_batch=global_batch,
        micro_batch=math.gcd(clips_per_gpu, global_batch // gpus),
        lanes=gpus,
        engine=dataclasses.replace(recipe.engine, **settings),
    )


def _count(config: PretrainConfig, *, gpu: bool, embeddings_alone: bool = False) -> list[Kernel]:
    """Count as `micro_batch_work` does, which takes seconds for each size."""
    return scaled_work(_counts(gpu, embeddings_alone), config.micro_batch)


@functools.cache
def _counts(gpu: bool, embeddings_alone: bool) -> dict[int, list[Kernel]]:
    return {
        samples: micro_batch_work(
            _config(1, samples, 1, samples), gpu=gpu, embeddings_alone=embeddings_alone
        )
        for samples in _COUNTED_SAMPLES
    }


def _row(
    values: dict[str, float],
    gpu: Ceilings,
    tensors: TensorSizes,
    config: PretrainConfig,
    gpus: int,
    alone_samples_per_second: float,
) -> Row:
    compute = step_seconds(rank_times(rank_work(config, tensors, gpus, _count), gpu))
    products = gpu.flops_per_second
    links = Links(
        ranks_per_node=int(values["gpus_per_node"]),
        within_node=values["within_node_gbytes"] * 1e9,
        between_nodes=values["between_nodes_gbytes"] * 1e9,
        share=values["share_of_links"],
    )
    low, step, high = (
        step_time(
            config,
            tensors,
            gpus,
            Device(seconds, rate, values["cores_per_gpu"] / values["loader_core_seconds"]),
            links,
        )
        for seconds, rate in (
            (compute.low, products.high),
            (compute.middle, products.middle),
            (compute.high, products.low),
        )
    )
    failures = _failures(values, config, tensors, gpus)
    samples_per_second = config.global_batch / step.total
    sent = sent_by_purpose(collectives(config, tensors, gpus), gpus)
    return Row(
        gpus=gpus,
        zero_stage=config.engine.zero_stage,
        global_batch=config.global_batch,
        seconds=dataclasses.asdict(step),
        step_seconds=step.total,
        low_step_seconds=low.total,
        high_step_seconds=high.total,
        sent_gbytes=sum(sent.values()) / 1e9,
        samples_per_second=samples_per_second,
        efficiency=samples_per_second / gpus / (alone_samples_per_second or samples_per_second),
        hours_between_failures=failures.seconds_between / 3600,
        goodput=goodput(failures, config.checkpoint.every_steps * step.total),
        best_interval_seconds=best_interval(failures),
    )


def _plot(series: dict[str, list[Row]], record: Path) -> None:
    with plot_beside(record, 14, 4) as figure:
        figure.suptitle("Computed, not measured")
        axes = figure.subplots(1, 3)
        for axis, (name, found) in zip(axes, series.items(), strict=False):
            for stage in STAGES:
                line = [one for one in found if one.zero_stage == stage]
                axis.plot(
                    [one.gpus for one in line],
                    [one.efficiency for one in line],
                    label=f"ZeRO {stage}",
                )
            axis.set(xlabel="GPUs", title=f"{name} scaling: efficiency", ylim=(0, 1.2))
            axis.set_xscale("log", base=2)
        axes[0].legend(fontsize="small")
        line = [one for one in series["weak"] if one.zero_stage == 1]
        parts = [name for name in line[0].seconds if any(one.seconds[name] for one in line)]
        axes[2].stackplot(
            [one.gpus for one in line],
            [[one.seconds[name] * 1e3 for one in line] for name in parts],
            labels=parts,
        )
        axes[2].set_xscale("log", base=2)
        axes[2].set(xlabel="GPUs", title="weak, ZeRO 1: ms of a step")
        axes[2].legend(fontsize="small", loc="lower right")
