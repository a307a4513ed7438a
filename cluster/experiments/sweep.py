"""`cavmae sweep FILE`: hyperparameter search with early stopping.

Ray Tune samples the trials and stops them by asynchronous successive halving (ASHA: Li et al.,
MLSys 2020). A trial is a separate `cavmae train`, whose metrics are followed; one that is stopped
early saves a checkpoint first. Rerunning a sweep resumes it: Tune's state is in `tune` of its
folder, the checkpoints in the trials' run folders.
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

from cavmae.cluster.config import ClusterConfig
from cavmae.cluster.connection import connected
from cavmae.cluster.experiments.comparison import compare
from cavmae.cluster.experiments.driver import Driver
from cavmae.cluster.experiments.queue_file import Need
from cavmae.cluster.experiments.sweep_file import Sweep, Varied, keep_or_compare, read_sweep
from cavmae.cluster.experiments.yaml_file import words_of
from cavmae.console import JsonOption
from cavmae.field_checks import CheckedFields
from cavmae.trainer.fault_tolerance.preemption import START_AGAIN_EXIT_CODE
from cavmae.trainer.tracking.metrics_file import read_metrics

_POLL_SECONDS = 1.0


@dataclass(frozen=True)
class SweepConfig(CheckedFields, JsonOption):
    """Search the space of a file with Ray Tune (ASHA). Fields after these apply to every trial:
    `--data.train SHARDS`, `--workers 8`.

    Raises:
        ValueError: the file is invalid.
    """

    file: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """YAML with `recipe`, `fields`, `space`, `metric` and more (docs/training/many-runs.md)."""
    folder: str
    """Folder for the trials' run folders, the drivers' logs and the comparison."""
    address: str = ""
    """Ray cluster; empty: the one that RAY_ADDRESS names, else one on this machine's cores that
    is started and stopped with the sweep."""


def main(arguments: list[str]) -> int:
    """Run the command; returns 0 if no trial failed, 75 if the sweep was preempted."""
    config, words = tyro.cli(
        SweepConfig, prog="cavmae sweep", args=arguments, return_unknown_args=True
    )
    folder = Path(config.folder).absolute()
    sweep = read_sweep(Path(config.file), folder, words)
    cores = max(len(os.sched_getaffinity(0)), sweep.need.cpus)
    own = ClusterConfig(workers=1, cpus_per_worker=cores, address=config.address)
    signals: list[int] = []

    def stop(number: int, _frame: object) -> None:
        signals.append(number)
        print("SIGTERM: stop requested; the trials save and stop", file=sys.stderr, flush=True)
        signal.raise_signal(signal.SIGINT)  # on which Tune saves its state and ends

    with connected(own, threads=1):
        signal.signal(signal.SIGTERM, stop)
        results = _tune(sweep, folder)
        _wait_for_drivers(folder)
    states, measured = {}, []
    for name, result in sorted(results.items()):
        if result.error:
            states[name] = "failed"
        elif (folder / name / "summary.json").exists():
            states[name] = "finished"
        else:
            states[name] = "preempted" if signals else "stopped early"
        value = (result.metrics or {}).get(sweep.metric)
        if value is not None:
            measured.append((value, name))
    compare(folder, states, as_json=config.json)
    if measured:
        value, name = (max if sweep.mode == "max" else min)(measured, key=lambda pair: pair[0])
        words = words_of(results[name].config or {})
        said = f"best {sweep.metric}: {value:.4g}, {name}: {' '.join(words)}"
        print(said, file=sys.stderr)
    if signals:
        return START_AGAIN_EXIT_CODE
    return 1 if "failed" in states.values() else 0


def _tune(sweep: Sweep, folder: Path) -> dict[str, Any]:
    """Run the trials; returns Tune's results by the names of their run folders."""
    os.environ |= {"RAY_CHDIR_TO_TRIAL_DIR": "0", "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1"}
    import ray
    from ray import tune
    from ray.tune.logger import JsonLoggerCallback
    from ray.tune.schedulers import AsyncHyperBandScheduler
    from ray.tune.search.basic_variant import BasicVariantGenerator

    working_folder = Path.cwd()
    address = ray.get_runtime_context().gcs_address

    def trial(fields: dict[str, Any]) -> None:
        name = _trial_name(str(tune.get_context().get_trial_id()))
        words = [
            *(*sweep.words, *words_of(fields)),
            *(f"--run-dir={folder / name}", f"--address={address}"),
        ]
        log = folder / "drivers" / f"{name}.log"
        driver = Driver(words, log, working_folder)
        for step, value in _train(driver, folder / name, sweep.metric):
            tune.report({"step": step, sweep.metric: value})

    # The trials' drivers place the ranks; Tune wants a trial to reserve something: a byte.
    trainable = tune.with_resources(trial, {"memory": 1})
    started = tune.Tuner.can_restore(str(folder / "tune"))
    keep_or_compare(sweep, folder / "sweep.json", started=started)
    if started:
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
                    max_concurrent=_concurrent_trials(sweep.need), random_state=sweep.seed
                ),
                scheduler=AsyncHyperBandScheduler(
                    time_attr="step",
                    max_t=sweep.steps,
                    grace_period=sweep.grace_steps,
                    reduction_factor=sweep.reduction,
                    stop_last_trials=False,  # they save and end on their own
                ),
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=str(folder),
                failure_config=tune.FailureConfig(max_failures=sweep.retries),
                callbacks=[JsonLoggerCallback(), _progress_lines(sweep.metric)],
                verbose=0,
            ),
        )
    return {_trial_name((result.metrics or {})["trial_id"]): result for result in tuner.fit()}


def _trial_name(trial_id: str) -> str:
    """Name a trial's run folder; Tune's own `a1b2c_00003` starts with random letters."""
    return f"trial-{trial_id.rpartition('_')[2]}"


def _progress_lines(metric: str) -> Any:
    """Return a callback that prints each measurement and each end of a trial."""
    from ray.tune import Callback

    class ProgressLines(Callback):
        def on_trial_result(
            self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any
        ) -> None:
            if metric in result:
                _print(trial, f"step {result['step']}, {metric} {result[metric]:.4g}")

        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            _print(trial, f"ended at step {trial.last_result.get('step', 0)}")

        def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            _print(trial, "failed")

    def _print(trial: Any, text: str) -> None:
        print(f"{_trial_name(trial.trial_id)}: {text}", file=sys.stderr, flush=True)

    return ProgressLines()


def _train(driver: Driver, run_dir: Path, metric: str) -> Iterator[tuple[int, float]]:
    """Yield steps and values of a run's metric as they are written, until the driver ends.

    Raises:
        RuntimeError: the driver failed.
        ValueError: the run has no such metric.
    """
    path, seen = run_dir / "metrics.jsonl", 0
    records: list[dict[str, float]] = []
    code = None
    while code is None:
        code = driver.exit_code  # first, so that the last read sees every record
        records = list(read_metrics(path)) if path.exists() else []
        found = [record for record in records if metric in record]
        for record in found[seen:]:
            yield int(record["step"]), record[metric]
        seen = len(found)
        time.sleep(_POLL_SECONDS if code is None else 0)
    if code not in (0, START_AGAIN_EXIT_CODE):
        raise RuntimeError(driver.failure(run_dir))
    if not seen:
        names = ", ".join(sorted({name for record in records for name in record}))
        raise ValueError(
            f"metric is {metric!r}, which {run_dir.name} does not have; use one of {names}"
        )


def _domain(varied: Varied) -> Any:
    from ray import tune

    sample = {
        "choice": tune.choice,
        "grid": tune.grid_search,
        "uniform": lambda bounds: tune.uniform(*bounds),
        "log_uniform": lambda bounds: tune.loguniform(*bounds),
        "whole": lambda bounds: tune.randint(bounds[0], bounds[1] + 1),
    }[varied.distribution]
    return sample(list(varied.values))


def _concurrent_trials(need: Need) -> int:
    """Return how many trials fit on the cluster at once; one where none does, as it may grow."""
    import ray

    resources = ray.cluster_resources()
    trials = int(resources.get("CPU", 0)) // need.cpus
    if need.gpus:
        trials = min(trials, int(resources.get("GPU", 0)) // need.gpus)
    return max(1, trials)


def _wait_for_drivers(folder: Path) -> None:
    """Wait for drivers of trials that were stopped early: their ranks are saving, for which a
    cluster started by us must stay up. On other nodes they use a cluster that outlives us."""
    prefix = f"--run-dir={folder}{os.sep}"
    drivers = [
        process
        for process in psutil.process_iter(["cmdline"])
        if any(word.startswith(prefix) for word in process.info["cmdline"] or ())
    ]
    psutil.wait_procs(drivers)
