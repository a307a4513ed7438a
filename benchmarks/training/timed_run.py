"""Starts a run whose steps are timed (`timed_rank.py`) in processes of its own."""

import dataclasses
from pathlib import Path
from typing import Any

from cavmae.atomic_write import read_json
from cavmae.benchmarks.harness.processes import Start, deepspeed_command, module_command
from cavmae.benchmarks.training.timed_rank import TimedPlan
from cavmae.trainer.config.configs import PretrainConfig
from cavmae.trainer.config.serialize import save_config


def timed_run(
    config: PretrainConfig,
    folder: Path,
    *,
    ranks: int,
    gpus: bool,
    synthetic: bool,
    warm_up: int,
    steps: int,
    part_steps: int,
    within_seconds: float,
) -> dict[str, Any]:
    """Train until all steps are timed; returns the results of the first rank.

    Args:
        config: of the run; its folder and number of steps are set here.
        folder: created, for the files of the run and its `log`.
        ranks: on this machine.
        gpus: whether each rank has one.
        synthetic, warm_up, steps, part_steps: as in `TimedPlan`.
        within_seconds: a run that takes longer is killed.

    Raises:
        RuntimeError: the run failed or took too long; with the end of its log.
    """
    folder.mkdir()
    plan = TimedPlan(
        config=str(folder / "config.json"),
        synthetic=synthetic,
        warm_up=warm_up,
        steps=steps,
        part_steps=part_steps,
        result=str(folder / "result.json"),
    )
    run = dataclasses.replace(config, run_dir=str(folder / "run"), steps=plan.all_steps)
    save_config(run, plan.config)
    save_config(plan, folder / "plan.json")
    words = ("cavmae.benchmarks.training.timed_rank", str(folder / "plan.json"))
    command = module_command(*words), {}
    if ranks > 1:
        command = deepspeed_command(*words, ranks=ranks, gpus=gpus)
    with Start([command], folder / "log") as start:
        start.finish(within_seconds)
    return read_json(plan.result)
