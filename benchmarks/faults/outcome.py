"""The outcome of a fault: times, steps lost, and whether samples and losses are as expected.

Two runs are the same if every position of the plan was trained on with the same clip and the losses
of all steps are equal, bit for bit on the same number of ranks.
"""

from dataclasses import dataclass
from pathlib import Path

from cavmae.benchmarks.faults.observed_rank import trained_samples
from cavmae.trainer.config.configs import PretrainConfig
from cavmae.trainer.tracking.metrics_file import read_metrics

NOTICED_WITHIN_SECONDS = 30.0
"""The bar for every fault but hangs, which have the limit at which they count as such."""


@dataclass(frozen=True)
class Expected:
    """Losses and samples of a run.

    Attributes:
        losses: of every step.
        samples: id by position of the plan.
        run: which run it is, for people.
    """

    losses: list[float]
    samples: dict[int, str]
    run: str


@dataclass(frozen=True)
class Row:
    """The outcome of a fault.

    Attributes:
        noticed_seconds: from the fault until the run has written that it noticed it.
        again_seconds: from the fault to the next new step; 0: training continued meanwhile.
        steps_lost: steps done before the fault that were repeated.
        steps_allowed: limit of `steps_lost`: an interval, and the steps done while a checkpoint was
            written.
        samples_equal: every position of the plan was trained on with the expected clip.
        largest_difference: of the losses, relative to the expected ones; 0: bit for bit.
        tolerance: limit of `largest_difference`.
        compared_with: the run that samples and losses are compared with.
        said: what the run wrote of it (`status.json`, metrics, a checkpoint), for people.
        noticed_allowed: limit of `noticed_seconds`.
    """

    noticed_seconds: float
    again_seconds: float
    steps_lost: int
    steps_allowed: int
    samples_equal: bool
    largest_difference: float
    tolerance: float
    compared_with: str
    said: str
    noticed_allowed: float = NOTICED_WITHIN_SECONDS

    @property
    def passed(self) -> bool:
        """Whether the fault was noticed in time, no more steps were lost than allowed, and samples
        and losses are as expected."""
        return (
            self.noticed_seconds < self.noticed_allowed
            and self.steps_lost <= self.steps_allowed
            and self.samples_equal
            and self.largest_difference <= self.tolerance
        )


@dataclass(frozen=True)
class Skipped:
    """A fault that this machine can't have. Attributes: skipped, why."""

    skipped: str


@dataclass(frozen=True)
class Failed:
    """A fault after which the run did not finish. Attributes: failed, what happened."""

    failed: str


def outcome(config: PretrainConfig, run: str) -> Expected:
    """Read losses and samples of a run that has ended."""
    run_dir = Path(config.run_dir)
    losses = {one["step"]: one["loss"] for one in step_records(run_dir)}  # of repeats, the last one
    return Expected([losses[step] for step in sorted(losses)], trained_samples(run_dir), run)


def largest_difference(found: Expected, expected: Expected) -> float:
    """Return the largest difference of the losses, relative to the expected ones.

    Raises:
        RuntimeError: their numbers differ.
    """
    steps, due = len(found.losses), len(expected.losses)
    if steps != due:
        raise RuntimeError(f"{found.run} has {steps} steps and {expected.run} {due}")
    pairs = zip(found.losses, expected.losses, strict=True)
    return max(abs(ours / theirs - 1) for ours, theirs in pairs)


def step_records(run_dir: Path) -> list[dict[str, float]]:
    """Read the metrics of every logged step; empty before the first one."""
    path = run_dir / "metrics.jsonl"
    return [one for one in read_metrics(path) if "loss" in one] if path.exists() else []
