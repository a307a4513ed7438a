"""What a sweep says while it runs: a line for each measurement and each end of a trial."""

import sys
from typing import Any

from ray.tune import Callback


def trial_name(trial_id: str) -> str:
    """Of a trial's run folder; Tune's own `a1b2c_00003` begins with letters drawn at random."""
    return f"trial-{trial_id.rpartition('_')[2]}"


class TrialLines(Callback):
    """Runs in Tune's controller.

    Args:
        metric: that trials are compared by.
    """

    def __init__(self, metric: str) -> None:
        self._metric = metric

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if self._metric in result:
            value = result[self._metric]
            _say(trial, f"step {result['step']}, {self._metric} {value:.4g}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        _say(trial, f"over, step {trial.last_result.get('step', 0)}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        _say(trial, "failed")


def _say(trial: Any, what: str) -> None:
    print(f"{trial_name(trial.trial_id)}: {what}", file=sys.stderr, flush=True)
