"""Starts a run whose steps are timed (`timed_rank.py`) in processes of its own."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from cavmae.atomic_write import read_json
from cavmae.benchmarks.harness.processes import Start, deepspeed_command, module_command
from cavmae.benchmarks.training.timed_plan import TimedPlan
from cavmae.trainer.config.configs import PretrainConfig
from cavmae.trainer.config.serialize import save_config


def timed_run(
    config: PretrainConfig, folder: Path, plan: TimedPlan, *, ranks: int, within_seconds: float
) -> dict[str, Any]:
    """Train until all steps are timed; returns the results of the first rank.

    Args:
        config: of the run; its folder and number of steps are set here.
        folder: created, for the files of the run and its `log`.
        plan: what is timed.
        ranks: on this machine; each has a GPU if it has any.
        within_seconds: a run that takes longer is killed.

    Raises:
        RuntimeError: the run failed or took too long; with the end of its log.
    """
    folder.mkdir()
    run = dataclasses.replace(config, run_dir=str(folder / "run"), steps=plan.all_steps)
    save_config(run, folder / "config.json")
    save_config(plan, folder / "plan.json")
    words = ("cavmae.benchmarks.training.timed_rank", str(folder))
    command = module_command(*words), {}
    if ranks > 1:
        command = deepspeed_command(*words, ranks=ranks, gpus=torch.cuda.is_available())
    with Start([command], folder / "log") as start:
        start.finish(within_seconds)
    return read_json(folder / "result.json")
