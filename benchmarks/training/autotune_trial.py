"""One trial of `cavmae bench autotune`: a few steps of the real run with some fields changed, in
separate processes, so that a trial that runs out of memory or crashes is a result too."""

import dataclasses
import signal
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cavmae.benchmarks.harness.processes import BadExit
from cavmae.benchmarks.training.timed_loop import OPTIMIZER, Step, step_total
from cavmae.benchmarks.training.timed_plan import TimedPlan
from cavmae.benchmarks.training.timed_run import timed_run
from cavmae.dataloaders.sampling.sample_plan import default_lanes
from cavmae.trainer.config.configs import CheckpointConfig, PretrainConfig, ValidationConfig
from cavmae.trainer.config.resolve import step_shares
from cavmae.trainer.fault_tolerance.oom import OutOfMemory
from cavmae.trainer.run_status import RunStatus, read_status

WARM_UP_STEPS, STEPS = 2, 4
_KILLED = (-signal.SIGKILL, 256 - signal.SIGKILL)
"""Exit codes of a rank that the kernel ended, and of a launcher that passes one on."""

Fields = dict[str, Any]
"""Values of a run's fields by their dotted names, as on the command line."""


@dataclass(frozen=True)
class Trial:
    """The result of a trial.

    Attributes:
        fields: that were changed.
        real_data: whether clips came from the loader.
        samples_per_second: expected of the run with its whole batch; 0 if the trial failed.
        problem: why it failed; empty if it did not.
        peak_memory_bytes: of the first rank.
        seconds: that the trial took in all.
    """

    fields: Fields
    real_data: bool
    samples_per_second: float
    problem: str
    peak_memory_bytes: int
    seconds: float


def with_fields(config: PretrainConfig, fields: Fields) -> PretrainConfig:
    """Change fields of a run.

    Raises:
        ValueError: fields that exclude each other.
    """
    parts: dict[str, Fields] = {}
    for name, value in fields.items():
        part, _, field = name.rpartition(".")
        parts.setdefault(part, {})[field] = value
    changes = parts.pop("", {})
    for part, values in parts.items():
        changes[part] = dataclasses.replace(getattr(config, part), **values)
    return dataclasses.replace(config, **changes)


def words(fields: Fields) -> str:
    """Format fields as words of a command line."""
    return " ".join(_word(name.replace("_", "-"), value) for name, value in fields.items())


def _word(name: str, value: Any) -> str:
    if isinstance(value, bool):
        part, dot, field = name.rpartition(".")
        return f"--{name}" if value else f"--{part}{dot}no-{field}"
    return f"--{name} {value}"


def short_run(config: PretrainConfig, ranks: int) -> PretrainConfig:
    """Make a trial of a run: two micro-batches a step at most, as a step with more repeats them."""
    times = step_shares(config, ranks).accumulation
    global_batch = ranks * config.micro_batch * min(times, 2)
    group = config.loss.contrastive_group
    return dataclasses.replace(
        config,
        global_batch=global_batch,
        lanes=default_lanes(global_batch, ranks),
        loss=dataclasses.replace(
            config.loss, contrastive_group=group if group and global_batch % group == 0 else 0
        ),
        data=dataclasses.replace(config.data, validation=""),
        checkpoint=CheckpointConfig(every_steps=10**9),
        validation=ValidationConfig(every_steps=10**9),
    )


def run_trial(
    config: PretrainConfig,
    fields: Fields,
    folder: Path,
    *,
    ranks: int,
    real_data: bool,
    within_seconds: float,
) -> Trial:
    """Train a few steps with some fields changed.

    Args:
        config: the run that is tuned.
        fields: to change.
        folder: made, for the files of the trial.
        ranks: on this machine.
        real_data: whether clips come from the loader; else they are on the device already.
        within_seconds: a trial that takes longer has failed.
    """
    began, problem = time.monotonic(), ""
    found: dict[str, Any] = {"steps": [], "peak_memory_bytes": 0}
    changed = with_fields(config, fields)
    try:
        found = timed_run(
            short_run(changed, ranks),
            folder,
            TimedPlan(not real_data, WARM_UP_STEPS, STEPS, part_steps=0),
            ranks=ranks,
            within_seconds=within_seconds,
        )
    except BadExit as error:
        problem = problem_of(error.code, read_status(folder / "run"))
    return Trial(
        fields=fields,
        real_data=real_data,
        samples_per_second=0.0 if problem else expected_rate(changed, ranks, found["steps"]),
        problem=problem,
        peak_memory_bytes=found["peak_memory_bytes"],
        seconds=time.monotonic() - began,
    )


def expected_rate(config: PretrainConfig, ranks: int, steps: list[Step]) -> float:
    """Extrapolate samples a second to the micro-batches of the run's step: they repeat, the update
    does not.

    Args:
        config: the run, not its trial.
        ranks: of both.
        steps: of the trial.
    """
    times = step_shares(config, ranks).accumulation
    update = statistics.median(sum(step.get(OPTIMIZER.part, {}).values()) for step in steps)
    whole = statistics.median(map(step_total, steps))
    micro_batch = (whole - update) / min(times, 2)
    return ranks * config.micro_batch * times / (times * micro_batch + update)


def problem_of(code: int | None, status: RunStatus | None) -> str:
    """Return why a trial failed, in a line.

    Args:
        code: exit code of its process; None if it took too long.
        status: that the trial's run has written.
    """
    error = status if status is not None and status.state == "failed" else None
    if error and error.error_type == OutOfMemory.__name__:
        return "out of memory"
    if code in _KILLED:
        return "killed, as for want of memory"
    if code is None:
        return "took too long"
    return error.last_error if error else f"ended with {code}"
