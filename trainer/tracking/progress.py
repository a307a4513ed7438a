"""Progress of a run for the person watching: a bar on a terminal, plain lines in a log file."""

import sys
import time
from contextlib import suppress
from typing import TextIO

from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column

from cavmae.console import can_draw, clock, plain_console


class Progress:
    """Shows step, loss, speed, the share of time spent waiting for data, and the time left.

    Args:
        total_steps: steps of the whole run.
        start_step: steps done before this attempt, which the time left does not count.
        stream: where to write, standard error by default; a terminal gets the bar.
    """

    def __init__(self, total_steps: int, start_step: int, stream: TextIO | None = None) -> None:
        self._total_steps = total_steps
        self._start_step = start_step
        self._stream = stream or sys.stderr
        self._start_seconds = time.monotonic()
        self._bar: Bar | None = None
        console = plain_console(file=self._stream)
        if can_draw(console):
            self._bar = Bar(
                BarColumn(bar_width=None),
                TextColumn("{task.description}", table_column=Column(no_wrap=True)),
                console=console,
                expand=True,
            )
            self._task = self._bar.add_task(
                f"step {start_step}/{total_steps}", total=total_steps, completed=start_step
            )
            self._bar.start()

    def update(
        self, step: int, loss: float, samples_per_second: float, data_wait_share: float
    ) -> None:
        """Show one step.

        Args:
            step: steps of the run that are done.
            loss: of this step.
            samples_per_second: over all ranks.
            data_wait_share: share of the time spent waiting for data, 0 to 1.
        """
        text = (
            f"step {step}/{self._total_steps}  loss {loss:.4f}  "
            f"{samples_per_second:.1f} samples/s  data wait {data_wait_share:.0%}  "
            f"{self._time_left(step)} left"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
        else:
            with suppress(OSError):  # a full disk, or nobody reads any more
                print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Restore the terminal and leave the last numbers on it."""
        if self._bar is not None:
            self._bar.stop()

    def _time_left(self, step: int) -> str:
        """Estimate from the mean speed of this attempt, validation and checkpoints included."""
        done = step - self._start_step
        if done <= 0:
            return "-:--:--"
        seconds_per_step = (time.monotonic() - self._start_seconds) / done
        return clock((self._total_steps - step) * seconds_per_step)
