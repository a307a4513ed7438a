"""What `timed_rank.py` times, apart from it, as that module is also run as a program."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TimedPlan:
    """What a rank times.

    Attributes:
        synthetic: train on the same batch again and again instead of the loader's.
        warm_up: steps that are not timed.
        steps: timed steps, as the loop sees them.
        part_steps: after those, steps that are timed by parts of the model.
    """

    synthetic: bool
    warm_up: int
    steps: int
    part_steps: int

    @property
    def all_steps(self) -> int:
        """The steps that the run needs: one more is begun, which ends the last one."""
        return self.warm_up + self.steps + self.part_steps + 1
