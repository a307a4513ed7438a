"""A run to which faults are done: its attempts, what they report, and the row that comes of it."""

import time
from collections.abc import Callable
from pathlib import Path

from cavmae.benchmarks.faults.outcome import (
    NOTICED_WITHIN_SECONDS,
    Expected,
    Row,
    largest_difference,
    outcome,
    step_records,
)
from cavmae.benchmarks.faults.runs import INTERVAL, Bench, last_step, resumed_step, status_of
from cavmae.benchmarks.harness.processes import Start
from cavmae.trainer.checkpoint.format import MANIFEST, checkpoint_name
from cavmae.trainer.config.configs import PretrainConfig


class FaultedRun:
    """A run that is launched as often as it takes, and watched by its newest attempt.

    Args:
        bench: whose work folder and undisturbed run it uses.
        config: of the run.
        launch: starts an attempt.

    Attributes:
        attempt: the newest one.
        run_dir: folder of the run.
        before, fault_seconds: steps done when the fault came, and when that was (Unix time).
    """

    def __init__(
        self, bench: Bench, config: PretrainConfig, launch: Callable[[PretrainConfig], Start]
    ) -> None:
        self.bench, self.config = bench, config
        self.run_dir = Path(config.run_dir)
        self._launch = launch
        self.before, self.fault_seconds = 0, 0.0
        self._noticed_seconds, self._said = 0.0, ""
        self._faulted = 0
        self.launch()

    def launch(self) -> None:
        """Launch the run, or resume it by the same command."""
        self.attempt = self._launch(self.config)

    def failure(self) -> str:
        """Return the failure of the attempt that the fault was done to, once it is written."""
        status = status_of(self.run_dir)
        over = status.state in ("restarting", "failed") or status.attempt > self._faulted
        return status.last_error if over else ""

    def stop(self) -> str:
        """Return why the run stops, once it has noticed."""
        status = status_of(self.run_dir)
        return status.describe() if status.state in ("stopping", "stopped") else ""

    def resume(self) -> str:
        """Return what an attempt after the fault resumed from, once it has."""
        status = status_of(self.run_dir)
        resumed = status.attempt > self._faulted and status.resumed_from
        return f"resumed from {status.resumed_from}" if resumed else ""

    def metric(self, name: str, above: float = 0.0) -> str:
        """Return a counter among the metrics with its step, once it exceeds a value."""
        for record in step_records(self.run_dir):
            if record[name] > above:
                return f"{name} is {record[name]:g} at step {record['step']:g}"
        return ""

    def wait_for_step(self, step: int) -> None:
        """Wait until that many steps are done."""
        self.attempt.wait_for(lambda: last_step(self.run_dir) >= step, f"step {step}")

    def wait_for_checkpoint(self, step: int) -> None:
        """Wait until the checkpoint of a step is complete."""
        path = self.run_dir / "checkpoints" / checkpoint_name(step) / MANIFEST
        self.attempt.wait_for(path.exists, f"checkpoint {step}")

    def fault_is_now(self, attempt: int = 0) -> None:
        """Note the time of the fault, the steps that are done, and the attempt that it was done to.

        Args:
            attempt: its number; 0: the one that the run is at.
        """
        self.before, self.fault_seconds = last_step(self.run_dir), time.time()
        self._noticed_seconds = self.fault_seconds
        self._faulted = attempt or status_of(self.run_dir).attempt

    def wait_until_noticed(self, noticed: Callable[[], str]) -> str:
        """Wait until the run has written that it noticed the fault; return what it wrote.

        Args:
            noticed: returns that, or an empty text before it is written.
        """
        self._said = self.attempt.wait_for(noticed, "a sign that the fault was noticed")
        self._noticed_seconds = time.time()
        return self._said

    def row(
        self,
        *,
        resumes: bool = True,
        before: int | None = None,
        resumed: int | None = None,
        while_writing: int = 0,
        tolerance: float = 0.0,
        said: str = "",
        expected: Expected | None = None,
        noticed_allowed: float = NOTICED_WITHIN_SECONDS,
    ) -> Row:
        """Wait for the end of the run and compare it.

        Args:
            resumes: False: training continues through the fault.
            before: steps done when the fault came; None: those that `fault_is_now` noted.
            resumed: step that was resumed from; None: as the last attempt reports it.
            while_writing: steps done while a checkpoint was being written.
            tolerance: of the losses, relative.
            said: in place of what the run wrote of the fault.
            expected: what the run is compared with; None: the undisturbed run.
            noticed_allowed: seconds that it may take until the fault is noticed.

        Raises:
            RuntimeError: the run failed, or has another number of steps than the other one.
        """
        self.attempt.finish()
        expected = expected or self.bench.undisturbed
        found = outcome(self.config, self.run_dir.name)
        lost, again = 0, 0.0
        if resumes:
            resumed = resumed_step(self.run_dir) if resumed is None else resumed
            lost = (self.before if before is None else before) - resumed
            new = [
                one["unix_seconds"] for one in step_records(self.run_dir) if one["step"] > resumed
            ]
            again = min(when for when in new if when > self.fault_seconds) - self.fault_seconds
        return Row(
            noticed_seconds=self._noticed_seconds - self.fault_seconds,
            again_seconds=again,
            steps_lost=lost,
            steps_allowed=INTERVAL + while_writing,
            samples_equal=found.samples == expected.samples,
            largest_difference=largest_difference(found, expected),
            tolerance=tolerance,
            compared_with=expected.run,
            said=(said or self._said).replace(f"{self.bench.work}/", ""),
            noticed_allowed=noticed_allowed,
        )
