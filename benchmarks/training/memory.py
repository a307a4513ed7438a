"""`cavmae bench memory`: the predicted memory of a run beside that of real processes.

Each case trains a few steps in new processes. Predicted are all tensors at the peak of a step
without the clips, and the heap slack (`trainer/cost_model/memory.py`). Measured is the peak of a
process's resident memory, less what is resident after the same steps with a tiny model. A run's
peak is that of its worst step: gloo's threads may hold gradients into the update, or not.
"""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from cavmae.atomic_write import read_json
from cavmae.benchmarks.harness.processes import Start, deepspeed_command
from cavmae.benchmarks.harness.records import RecordedConfig, write_record
from cavmae.benchmarks.harness.work_folder import work_folder
from cavmae.benchmarks.report.console import show
from cavmae.dataloaders.sampling.sample_plan import default_lanes
from cavmae.trainer.config.configs import DataConfig, EngineConfig, PretrainConfig
from cavmae.trainer.config.recipes import PRETRAIN_RECIPES
from cavmae.trainer.config.serialize import save_config
from cavmae.trainer.cost_model.memory import footprint, model_sizes

Case = tuple[str, int, str, int, int, int]
"""Recipe, ranks, dtype, ZeRO stage, micro-batch of a rank, micro-batches per step."""

CASES: tuple[Case, ...] = (
    *(("audioset_base", 1, "fp32", 1, batch, 1) for batch in (2, 8)),
    *(("audioset_base", 1, "bf16", stage, 8, 1) for stage in (0, 1, 2, 3)),
    ("audioset_base", 1, "bf16", 0, 24, 1),
    ("audioset_base", 1, "bf16", 2, 2, 2),
    *(("audioset_base", 2, "bf16", stage, 4, 1) for stage in (1, 3)),
    *(("demo", ranks, "fp32", stage, 64, 1) for ranks in (1, 2) for stage in (0, 1, 2, 3)),
    ("demo", 1, "bf16", 1, 128, 1),
)
_PATIENCE_SECONDS = 3600.0


@dataclass(frozen=True)
class MemoryBenchConfig(RecordedConfig):
    """Compare the predicted memory of runs with what their processes use."""

    recipes: tuple[Literal["audioset_base", "demo"], ...] = ("audioset_base", "demo")
    """Recipes whose cases are measured."""


def main(arguments: list[str]) -> int:
    """Measure, print and write the record; returns the exit code."""
    config = tyro.cli(MemoryBenchConfig, prog="cavmae bench memory", args=arguments)
    rows: list[dict[str, Any]] = []
    with work_folder("memory") as work:
        for number, case in enumerate(case for case in CASES if case[0] in config.recipes):
            rows.append(_row(case, work / str(number)))
            ratio = f"predicted / measured {rows[-1]['ratio']:.3f}"
            print(f"{_name(case)}: {ratio}", file=sys.stderr, flush=True)
    show(write_record(config.out, "memory", torch.device("cpu"), vars(config), {"rows": rows}))
    return 0


def config_of(case: Case) -> PretrainConfig:
    """Build a run that needs no data."""
    recipe, ranks, dtype, stage, micro_batch, times = case
    global_batch = ranks * micro_batch * times
    return dataclasses.replace(
        PRETRAIN_RECIPES[recipe](),
        global_batch=global_batch,
        micro_batch=micro_batch,
        lanes=default_lanes(global_batch, ranks),
        threads_per_rank=1,
        data=DataConfig(prefetch_batches=1),
        engine=EngineConfig(zero_stage=stage, dtype=dtype),  # pyright: ignore[reportArgumentType]
    )


def _row(case: Case, folder: Path) -> dict[str, Any]:
    config, ranks = config_of(case), case[1]
    predicted = footprint(config, model_sizes(config), ranks, gpu=False)
    measured = _measured(config, ranks, folder)
    predicted_bytes = predicted.tensors + predicted.heap_slack - predicted.clips
    peaks = [peak - measured["before_bytes"] for peak in measured["peak_bytes"]]
    return {
        "case": _name(case),
        "predicted_bytes": predicted_bytes,
        "predicted_tensor_bytes": predicted.tensors - predicted.clips,
        "predicted": dataclasses.asdict(predicted),
        "peak_part": predicted.peak_part,
        "before_bytes": measured["before_bytes"],
        "measured_bytes": peaks,
        "ratio": predicted_bytes / max(peaks),
    }


def _measured(config: PretrainConfig, ranks: int, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    save_config(config, folder / "config.json")
    words = (str(folder / "config.json"), str(folder / "found.json"))
    rank_module = "cavmae.benchmarks.training.memory_rank"
    launch = deepspeed_command(rank_module, *words, ranks=ranks, gpus=False)
    with Start([launch], folder / "log") as start:
        start.finish(_PATIENCE_SECONDS)
    return read_json(folder / "found.json")


def _name(case: Case) -> str:
    recipe, ranks, dtype, stage, micro_batch, times = case
    accumulated = f" x {times} accumulated" if times > 1 else ""
    return f"{recipe}, {ranks} ranks, {dtype}, ZeRO {stage}, batch {micro_batch}{accumulated}"
