"""`cavmae sweep FILE`: fields drawn at random, and trials that fall behind given up early.

Ray Tune draws and decides (asynchronous successive halving, ASHA: Li et al., MLSys 2020). A trial
is a `cavmae train` of its own, whose metrics are followed; one that is given up saves and leaves.
A sweep that is started again goes on: what was decided lies in `tune` of its folder, what was
trained in the trials' run folders.
"""

import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import psutil
import tyro
from rich.console import Console

from cavmae.cluster.config import ClusterConfig
from cavmae.cluster.connection import connected
from cavmae.cluster.experiments.comparison import compare
from cavmae.cluster.experiments.driver import Driver
from cavmae.cluster.experiments.queue_file import Need
from cavmae.cluster.experiments.sweep_file import Sweep, Varied, keep_or_compare, read_sweep
from cavmae.cluster.experiments.yaml_file import words_of
from cavmae.trainer.fault_tolerance.preemption import START_AGAIN_EXIT_CODE
from cavmae.trainer.tracking.tracker import read_metrics

_LOOK_SECONDS = 1.0


@dataclass(frozen=True)
class SweepConfig:
    """Search the fields of a file with Ray Tune (ASHA). Fields after these are of every trial:
    `--data.train SHARDS`, `--workers 8`.

    Raises:
        ValueError: the file is not as it should be.
    """

    file: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """YAML with `recipe`, `fields`, `space`, `metric` and more (docs/training/many-runs.md)."""
    folder: str
    """The trials' run folders go here, with logs of the drivers and the comparison."""
    address: str = ""
    """Ray cluster; empty: the one that RAY_ADDRESS names, else one on this machine's cores that
    ends with the sweep."""


def main(arguments: list[str]) -> int:
    """The command; 0 where no trial has failed, 75 where the sweep was asked to leave."""
    config, words = tyro.cli(
        SweepConfig, prog="cavmae sweep", args=arguments, return_unknown_args=True
    )
    folder = Path(config.folder).absolute()
    sweep = read_sweep(Path(config.file), folder, words)
    cores = max(len(os.sched_getaffinity(0)), sweep.need.cpus)
    own = ClusterConfig(workers=1, cpus_per_worker=cores, address=config.address)
    asked: list[int] = []

    def leave(number: int, _frame: object) -> None:
        asked.append(number)
        print("SIGTERM: the trials are asked to save and leave", file=sys.stderr, flush=True)
        signal.raise_signal(signal.SIGINT)  # on which Tune keeps its state and ends

    with connected(own, threads=1):
        signal.signal(signal.SIGTERM, leave)
        trials = _tune(sweep, folder, asked)
        _wait_for_drivers(folder)
    states = {trial.name: trial.state for trial in trials}
    compare(folder, states, Console())
    measured = [(trial.value, trial) for trial in trials if trial.value is not None]
    if measured:
        value, best = (max if sweep.mode == "max" else min)(measured, key=lambda pair: pair[0])
        print(f"best {sweep.metric}: {value:.4g}, {best.name}: {' '.join(best.words)}")
    if asked:
        return START_AGAIN_EXIT_CODE
    return 1 if "failed" in states.values() else 0


@dataclass(frozen=True)
class Trial:
    """What became of a trial.

    Attributes:
        name: of its run folder.
        state: finished, given up, left (the sweep was asked to leave) or failed.
        value: the metric when it was last measured; None: it never was.
        words: its varied fields.
    """

    name: str
    state: str
    value: float | None
    words: list[str]


def _tune(sweep: Sweep, folder: Path, asked: list[int]) -> list[Trial]:
    os.environ |= {"RAY_CHDIR_TO_TRIAL_DIR": "0", "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1"}
    import ray
    from ray import tune
    from ray.tune.logger import JsonLoggerCallback
    from ray.tune.schedulers import AsyncHyperBandScheduler
    from ray.tune.search.basic_variant import BasicVariantGenerator

    from cavmae.cluster.experiments.trial_lines import TrialLines, trial_name

    here = Path.cwd()
    address = ray.get_runtime_context().gcs_address

    def trial(fields: dict[str, Any]) -> None:
        name = trial_name(str(tune.get_context().get_trial_id()))
        words = [
            *(*sweep.words, *words_of(fields)),
            *(f"--run-dir={folder / name}", f"--address={address}"),
        ]
        log = folder / "drivers" / f"{name}.log"
        for step, value in _train(Driver(words, log, here), folder / name, sweep.metric):
            tune.report({"step": step, sweep.metric: value})

    # The ranks are placed by the trials' own drivers; a trial itself must take something, a byte.
    trainable = tune.with_resources(trial, {"memory": 1})
    begun = tune.Tuner.can_restore(str(folder / "tune"))
    keep_or_compare(sweep, folder / "sweep.json", begun=begun)
    if begun:
        tuner = tune.Tuner.restore(
            str(folder / "tune"), trainable, resume_unfinished=True, resume_errored=True
        )
    else:
        tuner = tune.Tuner(
            trainable,
            param_space={name: _domain(varied) for name, varied in sweep.space.items()},
            tune_config=tune.TuneConfig(
                metric=sweep.metric,
                mode=sweep.mode,
                num_samples=sweep.trials,
                search_alg=BasicVariantGenerator(
                    max_concurrent=_at_once(sweep.need), random_state=sweep.seed
                ),
                scheduler=AsyncHyperBandScheduler(
                    time_attr="step",
                    max_t=sweep.steps,
                    grace_period=sweep.grace_steps,
                    reduction_factor=sweep.reduction,
                    stop_last_trials=False,  # they save and end by themselves
                ),
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=str(folder),
                failure_config=tune.FailureConfig(max_failures=sweep.retries),
                callbacks=[JsonLoggerCallback(), TrialLines(sweep.metric)],
                verbose=0,
            ),
        )
    trials = []
    for result in tuner.fit():
        metrics = result.metrics or {}
        name = trial_name(str(metrics["trial_id"]))
        if result.error:
            state = "failed"
        elif (folder / name / "summary.json").exists():
            state = "finished"
        else:
            state = "left" if asked else "given up"
        words = words_of(result.config or {})
        trials.append(Trial(name, state, metrics.get(sweep.metric), words))
    return sorted(trials, key=lambda trial: trial.name)


def _train(driver: Driver, run_dir: Path, metric: str) -> Iterator[tuple[int, float]]:
    """Yield the metric of a run with its step, as it comes, until the driver has ended.

    Raises:
        RuntimeError: the driver has failed.
        ValueError: the run has no such metric.
    """
    path, seen = run_dir / "metrics.jsonl", 0
    records: list[dict[str, float]] = []
    code = None
    while code is None:
        code = driver.exit_code  # before the look, so that the last one sees all
        records = list(read_metrics(path)) if path.exists() else []
        found = [record for record in records if metric in record]
        for record in found[seen:]:
            yield int(record["step"]), record[metric]
        seen = len(found)
        time.sleep(_LOOK_SECONDS if code is None else 0)
    if code not in (0, START_AGAIN_EXIT_CODE):
        raise RuntimeError(driver.failure(run_dir))
    if not seen:
        names = ", ".join(sorted({name for record in records for name in record}))
        raise ValueError(
            f"metric is {metric!r}, which {run_dir.name} does not have; use one of {names}"
        )


def _domain(varied: Varied) -> Any:
    from ray import tune

    values = list(varied.values)
    if varied.distribution == "choice":
        return tune.choice(values)
    if varied.distribution == "grid":
        return tune.grid_search(values)
    low, high = values
    if varied.distribution == "whole":
        return tune.randint(low, high + 1)
    return (
        tune.uniform(low, high) if varied.distribution == "uniform" else tune.loguniform(low, high)
    )


def _at_once(need: Need) -> int:
    """Trials whose ranks fit the cluster together; one where none does, as it may grow."""
    import ray

    there = ray.cluster_resources()
    at_once = int(there.get("CPU", 0)) // need.cpus
    if need.gpus:
        at_once = min(at_once, int(there.get("GPU", 0)) // need.gpus)
    return max(1, at_once)


def _wait_for_drivers(folder: Path) -> None:
    """Of trials that were given up: their ranks save, for which a cluster of our own must be there.
    On other nodes they have a cluster that stays."""
    here = f"--run-dir={folder}{os.sep}"
    drivers = [
        process
        for process in psutil.process_iter(["cmdline"])
        if any(word.startswith(here) for word in process.info["cmdline"] or ())
    ]
    psutil.wait_procs(drivers)
