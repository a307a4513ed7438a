"""`cavmae bench train`: the real training loop, and what the time of a step goes to.

The real run with its engine, loop and loader trains a few steps: on clips that are already on the
device, and on packed shards, so that the difference is the cost of the loader. Then a few
steps are timed by parts of the model, each beside its floor on this machine.
"""

import dataclasses
import sys
from dataclasses import dataclass
from typing import Literal

import torch
import tyro

from cavmae.benchmarks.harness.machine_peaks import measure_rates
from cavmae.benchmarks.harness.records import RecordedConfig, write_record
from cavmae.benchmarks.harness.synthetic_shards import synthetic_shards
from cavmae.benchmarks.harness.work_folder import work_folder
from cavmae.benchmarks.report.console import show
from cavmae.benchmarks.step.training_step import SIZES
from cavmae.benchmarks.training.summary import SOURCES, Source, summarize
from cavmae.benchmarks.training.timed_plan import TimedPlan
from cavmae.benchmarks.training.timed_run import timed_run
from cavmae.field_checks import NonNegativeInt, PositiveInt
from cavmae.trainer.config.configs import EngineConfig, PretrainConfig, TrackingConfig
from cavmae.trainer.config.recipes import audioset_base

CLIP_SECONDS, CLIP_SIDE = 10.0, 256
"""Of generated clips: what the base model takes, and what packing keeps of a frame."""
_PATIENCE_SECONDS = 3600.0
_GPU = torch.cuda.is_available()


@dataclass(frozen=True)
class TrainBenchConfig(RecordedConfig):
    """Time the training loop, and a step by the parts of the model.

    Raises:
        ValueError: an option out of its range.
    """

    model: Literal["base", "large", "huge", "tiny"] = "base"
    """Sizes of the model."""
    batch: PositiveInt = 256 if _GPU else 8
    """Clips of each rank in a step."""
    ranks: PositiveInt = 1
    """Ranks on this machine."""
    precision: Literal["fp32", "bf16"] = "bf16" if _GPU else "fp32"
    """Of parameters and activations."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """ZeRO stage."""
    compile: bool = _GPU
    """Compile the model's blocks."""
    activation_checkpointing: Literal["none", "selective", "full"] = (
        EngineConfig().activation_checkpointing
    )
    """Activations that the backward pass recomputes."""
    steps: PositiveInt = 20 if _GPU else 5
    """Timed steps."""
    part_steps: NonNegativeInt = 3
    """Steps timed by parts; 0: none."""
    warm_up: PositiveInt = 5 if _GPU else 1
    """Steps before the timed ones."""
    only: tuple[Source, ...] = SOURCES
    """Where batches come from."""
    data: str = ""
    """Folder of a packed tier; empty: clips are generated."""
    clips: PositiveInt = 64 if _GPU else 16
    """Clips to generate."""
    readers: PositiveInt = PretrainConfig().data.reader_workers
    """Reader processes of each rank."""


def main(arguments: list[str]) -> int:
    """Measure, print and write the record; returns the exit code."""
    config = tyro.cli(TrainBenchConfig, prog="cavmae bench train", args=arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run, found = _run_config(config), {}
    with work_folder("train") as work:
        shards = config.data or str(
            synthetic_shards(work, config.clips, size=CLIP_SIDE, seconds=CLIP_SECONDS)
        )
        run = dataclasses.replace(run, data=dataclasses.replace(run.data, train=shards))
        for source in config.only:
            print(f"{source} ...", file=sys.stderr, flush=True)
            found[source] = timed_run(
                run,
                work / f"run-{source}",
                TimedPlan(source == "synthetic", config.warm_up, config.steps, config.part_steps),
                ranks=config.ranks,
                within_seconds=_PATIENCE_SECONDS,
            )
    # The ranks have ended: the machine is idle, and a GPU's memory is free.
    rates = measure_rates(device, config.precision, run.model, config.batch)
    results = summarize(found, run, device, rates, judged=config.model == "base")
    configuration = vars(config) | {"sizes": dataclasses.asdict(run.model)}
    show(write_record(config.out, "train", device, configuration, results))
    return 0


def _run_config(config: TrainBenchConfig) -> PretrainConfig:
    """The recipe `audioset_base` at the batch, sizes and engine of the options."""
    recipe = audioset_base()
    return dataclasses.replace(
        recipe,
        model=SIZES[config.model],
        global_batch=config.batch * config.ranks,
        micro_batch=config.batch,
        data=dataclasses.replace(recipe.data, validation="", reader_workers=config.readers),
        engine=EngineConfig(
            zero_stage=config.zero_stage,
            dtype=config.precision,
            clip_grad_norm=recipe.engine.clip_grad_norm,
            compile=config.compile,
            activation_checkpointing=config.activation_checkpointing,
        ),
        # At least one report is among the timed steps.
        tracking=TrackingConfig(every_steps=min(TrackingConfig().every_steps, config.steps)),
    )
