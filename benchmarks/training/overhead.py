"""`cavmae bench overhead`: what Ray, and checkpoints beside the steps, add to the time of a step.

The same run of two CPU ranks is started by the plain `deepspeed` launcher, by `cavmae train` on
Ray, and by the launcher with checkpoints, in turn, so that a machine that slows down slows all of
them; each ratio is of runs that followed each other.
"""

import dataclasses
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from cavmae.benchmarks.harness.processes import Start, deepspeed_command, module_command
from cavmae.benchmarks.harness.records import RecordedConfig, spread, timing, write_record
from cavmae.benchmarks.harness.synthetic_shards import synthetic_shards
from cavmae.benchmarks.harness.work_folder import work_folder
from cavmae.benchmarks.report.console import show
from cavmae.field_checks import PositiveInt, at_least
from cavmae.trainer.config.configs import CheckpointConfig, PretrainConfig, TrackingConfig
from cavmae.trainer.config.recipes import demo
from cavmae.trainer.config.serialize import save_config
from cavmae.trainer.tracking.metrics_file import read_metrics

RANKS = 2
CLIPS = 48
WARM_UP_STEPS = 20
INTERVAL = 50
"""Steps between checkpoints where there are any."""
CONTENDERS = ("deepspeed", "ray", "deepspeed with checkpoints")


@dataclass(frozen=True)
class OverheadConfig(RecordedConfig):
    """Measure what Ray and checkpoints add to a step.

    Raises:
        ValueError: an option out of its range.
    """

    steps: Annotated[int, at_least(WARM_UP_STEPS + INTERVAL + 10)] = 180
    """Steps of each run."""
    repeats: PositiveInt = 3
    """Runs of each kind."""
    batch: Annotated[int, at_least(RANKS)] = 16
    """Clips in a step, over both ranks."""


def main(arguments: list[str]) -> int:
    """Measure, print and write the record; returns the exit code."""
    config = tyro.cli(OverheadConfig, prog="cavmae bench overhead", args=arguments)
    seconds: dict[str, list[list[float]]] = {name: [] for name in CONTENDERS}
    with work_folder("overhead") as work:
        shards = synthetic_shards(work, CLIPS)
        for repeat in range(config.repeats):
            # Another contender goes first each time, so that none always follows the same one.
            for name in CONTENDERS[repeat % 3 :] + CONTENDERS[: repeat % 3]:
                print(f"{name}, {repeat + 1} of {config.repeats} ...", file=sys.stderr, flush=True)
                run_dir = work / f"{CONTENDERS.index(name)}-{repeat}"
                seconds[name].append(
                    _step_seconds(name, _run_config(config, name, run_dir, shards))
                )
    results = summarize(seconds)
    show(write_record(config.out, "overhead", torch.device("cpu"), vars(config), results))
    return 0


def _run_config(
    config: OverheadConfig, contender: str, run_dir: Path, shards: Path
) -> PretrainConfig:
    recipe = demo()
    saves = contender.endswith("checkpoints")
    return dataclasses.replace(
        recipe,
        run_dir=str(run_dir),
        steps=config.steps,
        global_batch=config.batch,
        micro_batch=config.batch // RANKS,
        data=dataclasses.replace(recipe.data, train=str(shards), validation=""),
        checkpoint=CheckpointConfig(every_steps=INTERVAL if saves else 10 * config.steps),
        tracking=TrackingConfig(every_steps=1),
        threads_per_rank=1,
    )


def _step_seconds(contender: str, config: PretrainConfig) -> list[float]:
    """Seconds of each step after the warm-up, except the last, which waits for its checkpoint."""
    path = Path(config.run_dir).with_suffix(".json")
    save_config(config, path)
    plain = deepspeed_command("cavmae.trainer.pretrain", str(path), ranks=RANKS, gpus=False)
    ray = module_command("cavmae.cluster.train", str(path), "--workers", str(RANKS)), plain[1]
    command = ray if contender == "ray" else plain
    with Start([command], path.with_suffix(".log")) as start:
        start.finish()
    times = [one["unix_seconds"] for one in read_metrics(Path(config.run_dir) / "metrics.jsonl")]
    pairs = zip(times[WARM_UP_STEPS:-2], times[WARM_UP_STEPS + 1 : -1], strict=True)
    return [after - before for before, after in pairs]


def summarize(seconds: dict[str, list[list[float]]]) -> dict[str, dict[str, Any]]:
    """Timing of each contender, and by how much its steps are longer than the plain launcher's.

    Args:
        seconds: for each contender and run, of each step. The means of the runs are compared one by
            one, as they followed each other; means, because a checkpoint costs few steps much.

    Returns:
        For each contender `timing` of all its steps and, the plain launcher apart, `longer_by`:
        median, minimum and maximum share over the runs.
    """
    results: dict[str, dict[str, Any]] = {}
    means = {name: [statistics.fmean(one) for one in runs] for name, runs in seconds.items()}
    for name, runs in seconds.items():
        every_step = [second for one in runs for second in one]
        results[name] = timing(every_step) | {"mean_seconds": means[name]}
        if name != CONTENDERS[0]:
            shares = [a / b - 1 for a, b in zip(means[name], means[CONTENDERS[0]], strict=True)]
            results[name]["longer_by"] = spread(shares)
    return results
