"""`cavmae bench predict`: the time of a training step on a GPU that is not here, by parts.

The kernels of a step are counted (`trainer/cost_model/step_work.py`), and each takes the time that
its operations or bytes need at the speed that GPU is known to reach: a range, a prediction, not a
measurement. `--against` says how far a prediction is from a record of `cavmae bench step`.
"""

import sys
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

import torch
import tyro

from cavmae.benchmarks.harness.records import Record, RecordedConfig, read_record, write_record
from cavmae.benchmarks.report.console import show
from cavmae.benchmarks.step.ceilings import recorded_ceilings, step_config
from cavmae.benchmarks.step.parts import FUNCTIONS, MODULES, REST
from cavmae.benchmarks.step.training_step import Choices, StepSetting
from cavmae.field_checks import NonNegativeInt, PositiveInt
from cavmae.trainer.config.configs import RunConfig
from cavmae.trainer.config.recipes import RECIPES
from cavmae.trainer.config.resolve import resolve
from cavmae.trainer.cost_model.comm_volume import TensorSizes, tensor_sizes
from cavmae.trainer.cost_model.gpus import find_gpu, gpu_ceilings, known_gpu
from cavmae.trainer.cost_model.kernel import ADAM_BYTES, Kernel
from cavmae.trainer.cost_model.kernel_time import Ceilings, Range, kernel_times
from cavmae.trainer.cost_model.memory_advice import largest_micro_batch
from cavmae.trainer.cost_model.rank_time import rank_times, rank_work, step_seconds
from cavmae.trainer.cost_model.step_work import micro_batch_work
from cavmae.trainer.model.blocks import Recompute
from cavmae.trainer.model.config import ModelConfig
from cavmae.trainer.tasks.build_model import build_model

_PARTS = {
    **MODULES,
    **{function.__name__: part for _, function, part in FUNCTIONS},
    "random_mask": "mask",
}
"""Of a step, by `Kernel.part`."""


@dataclass(frozen=True)
class PredictConfig(RecordedConfig):
    """Predict the time of a training step on a GPU, by parts."""

    recipe: str = "audioset_base"
    """Recipe of the run, for pretraining or fine-tuning."""
    gpu: str = "H200"
    """GPU by the driver's name, or a part of it such as `H100`."""
    global_batch: NonNegativeInt = 0
    """Samples of a step; 0: as the recipe has it."""
    micro_batch: NonNegativeInt = 0
    """Samples that a GPU takes at once; 0: as the recipe has it, or the most that fit."""
    workers: PositiveInt = 1
    """GPUs that share the step. The time they wait for each other is left out: see
    `cavmae train RECIPE --dry-run` and `cavmae bench scaling`."""
    recompute: Recompute | None = None
    """Activations that the backward pass recomputes; None: as the recipe has it."""
    against: tuple[str, ...] = ()
    """Records of `cavmae bench step` or `gpu-check` to compare with instead: of a GPU with what its
    data sheet promises, of any machine with the ceilings in the record."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.recipe not in RECIPES:
            raise ValueError(f"recipe is {self.recipe!r}; use one of {', '.join(RECIPES)}")
        known_gpu(self.gpu)


def main(arguments: list[str]) -> int:
    """Predict, print and write the record; returns the exit code.

    Raises:
        ValueError: a record of another benchmark, or one without ceilings.
        OSError: a record can't be read.
    """
    config = tyro.cli(PredictConfig, prog="cavmae bench predict", args=arguments)
    if config.against:
        records = [one for path in config.against for one in step_records(read_record(path))]
        results: dict[str, Any] = {"against": [row for one in records for row in compare(one)]}
    else:
        results = predict(run_config(config), config.workers, config.gpu)
    show(write_record(config.out, "predict", torch.device("cpu"), vars(config), results))
    return 0


def run_config(config: PredictConfig) -> RunConfig:
    """Return the run that the options describe, resolved.

    Raises:
        ValueError: batches that do not divide each other.
    """
    recipe = RECIPES[config.recipe]()
    engine = replace(recipe.engine, dtype="bf16")
    if config.recompute:
        engine = replace(engine, activation_checkpointing=config.recompute)
    run = replace(
        recipe,
        global_batch=config.global_batch or recipe.global_batch,
        micro_batch=config.micro_batch or recipe.micro_batch,
        engine=engine,
    )
    run = resolve(run, world_size=config.workers, samples=run.global_batch, threads=1)
    if run.micro_batch:
        return run
    memory = int(known_gpu(config.gpu).memory_bytes)
    return replace(run, micro_batch=largest_micro_batch(run, config.workers, memory, gpu=True))


def predict(run: RunConfig, workers: int, gpu: str) -> dict[str, Any]:
    """Predict a step of a rank, and what other choices would change.

    Args:
        run: resolved.
        workers: ranks.
        gpu: of `GPUS`.

    Returns:
        For the record: `ceilings` of the GPU; the range of the `step`; its `passes`, each with what
        bounds it and how many kernels it has; its `parts`; and `choices`.
    """
    ceilings = gpu_ceilings(known_gpu(gpu), str(run.engine.dtype))
    tensors = _tensors(run)
    print("counting ...", file=sys.stderr, flush=True)
    work = rank_work(run, tensors, workers)
    step = step_seconds(rank_times(work, ceilings))
    choices = {}
    for name, other in _choices(run, workers).items():
        print(f"counting with {name} ...", file=sys.stderr, flush=True)
        found = step_seconds(rank_times(rank_work(other, tensors, workers), ceilings))
        choices[name] = _seconds(found) | {"ratio": found.middle / step.middle}
    return {
        "ceilings": asdict(ceilings),
        "step": _seconds(step) | {"samples_per_second": run.global_batch / workers / step.middle},
        "passes": {name: _row(kernels, ceilings) for name, kernels in work.items()},
        "parts": {
            f"{part}, {name}": _row(kernels, ceilings)
            for name in ("embedding", "forward", "backward")
            for part, kernels in _by_part(work.get(name, [])).items()
        },
        "choices": choices,
    }


def compare(record: Record) -> list[dict[str, Any]]:
    """Predict the steps of our model in a record, and say how far off that is.

    Args:
        record: of `cavmae bench step`.

    Returns:
        A row for each step and source of ceilings: `parts` and `step` with what was measured, the
        predicted range, and its middle over what was measured.

    Raises:
        ValueError: the record is of another benchmark, or of a version without ceilings.
    """
    rows = []
    gpu = find_gpu(record.hardware.get("gpu", ""))
    for found in record.results.values():
        if "parts" not in found.get("cavmae", {}) or "ceilings" not in found:
            continue
        setting = StepSetting(
            "cavmae",
            ModelConfig(**record.configuration["sizes"]),
            found["batch"],
            found["precision"],
            torch.device(record.hardware["device"]),
            Choices(recompute=record.configuration["recompute"]),
        )
        machine = record.hardware.get("gpu") or record.hardware["processor"]
        sources = [recorded_ceilings(found["ceilings"], machine)]
        sources += [gpu_ceilings(gpu, setting.precision)] if gpu else []
        work = step_work(setting)
        rows += [_compared(found, setting, work, one) | {"of": machine} for one in sources]
    if not rows:
        raise ValueError(
            f"{record.path} has no step of our model by parts with ceilings; give a record of "
            "`cavmae bench step`"
        )
    return rows


def step_records(record: Record) -> list[Record]:
    """Return the record as records of `cavmae bench step`: a GPU check holds several."""
    if record.suite != "gpu-check":
        return [record]
    steps = record.results.get("prediction", {}).get("details", {}).get("steps", [])
    return [replace(record, **one) for one in steps] or [record]


def step_work(setting: StepSetting) -> dict[str, list[Kernel]]:
    """Count the kernels of our step in `cavmae bench step`: `forward`, `backward`, `update`."""
    run = step_config(setting)
    passes = micro_batch_work(run, gpu=setting.device.type == "cuda")
    trainable = _tensors(run).trainable
    # Masters, where there are some, get their gradients in float32, and give weights in bf16.
    copies = [6, 6] if setting.precision == "bf16" else []
    update = [
        Kernel("update", "", "other", name, (), "", 0, bytes_each * size)
        for name, bytes_each in zip(("adam", "float", "copy"), [ADAM_BYTES, *copies], strict=False)
        for size in trainable
    ]
    return {
        during: [one for one in (*passes, *update) if one.during == during]
        for during in ("forward", "backward", "update")
    }


def _compared(
    found: dict[str, Any],
    setting: StepSetting,
    work: dict[str, list[Kernel]],
    ceilings: Ceilings,
) -> dict[str, Any]:
    times = {name: kernel_times(kernels, ceilings) for name, kernels in work.items()}
    measured = {name: one["median_seconds"] for name, one in found["cavmae"]["parts"].items()}
    rows = {
        name: {"measured_seconds": measured[name]}
        | _seconds(one)
        | {"ratio": one.middle / measured[name]}
        for name, one in ((name, times[name].total) for name in measured)
    }
    whole, seconds = step_seconds(times), found["cavmae"]["median_seconds"]
    return {
        "ceilings": ceilings.source,
        "precision": setting.precision,
        "batch": setting.batch,
        "recompute": setting.choices.recompute,
        "parts": rows,
        "step": {"measured_seconds": seconds} | _seconds(whole) | {"ratio": whole.middle / seconds},
    }


def _tensors(run: RunConfig) -> TensorSizes:
    with torch.device("meta"):
        return tensor_sizes(build_model(run))


def _seconds(one: Range) -> dict[str, float]:
    return {"low_seconds": one.low, "high_seconds": one.high}


def _row(kernels: list[Kernel], ceilings: Ceilings) -> dict[str, Any]:
    times = kernel_times(kernels, ceilings)
    kinds = times.by_kind()
    return _seconds(times.total) | {
        "bound_by": max(kinds, key=lambda name: kinds[name].low + kinds[name].high),
        "kinds": {name: _seconds(one) for name, one in kinds.items()},
        "kernels": sum(one.calls for one in kernels),
        "tflop": sum(one.calls * one.flops for one in kernels) / 1e12,
        "gbytes": sum(one.calls * one.bytes for one in kernels if one.kind == "other") / 1e9,
    }


def _by_part(kernels: list[Kernel]) -> dict[str, list[Kernel]]:
    found: dict[str, list[Kernel]] = defaultdict(list)
    for one in kernels:
        found[_PARTS.get(one.part, one.part or REST)].append(one)
    return found


def _choices(run: RunConfig, workers: int) -> dict[str, RunConfig]:
    """Return the run with each of its choices changed, one at a time."""
    engine = run.engine
    others: dict[str, dict[str, Any]] = {
        f"recompute {how}": {"activation_checkpointing": how}
        for how in get_args(Recompute)
        if how != engine.activation_checkpointing
    }
    found = {name: replace(run, engine=replace(engine, **one)) for name, one in others.items()}
    rows, batch = run.global_batch // workers, run.micro_batch
    sizes = [rows, *(size for size in (batch // 2, batch * 2) if size and rows % size == 0)]
    for size in dict.fromkeys(sizes):
        if size != batch:
            found[f"micro-batch {size}"] = replace(run, micro_batch=size)
    return found
