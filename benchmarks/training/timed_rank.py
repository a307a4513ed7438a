"""A rank of a training run that notes what each step's time is spent on, and ends after that.

The run is the product's own, with its engine, loop and loader; the product has no hooks for any of
this.

    python -m cavmae.benchmarks.training.timed_rank PLAN.json
"""

import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from cavmae.atomic_write import write_json
from cavmae.command import exit_code
from cavmae.trainer.config.configs import PretrainConfig
from cavmae.trainer.config.serialize import load_config
from cavmae.trainer.distributed.env import limit_threads, ranks_from_environment


@dataclass(frozen=True)
class TimedPlan:
    """What a rank is to time.

    Attributes:
        config: file of the run's configuration.
        synthetic: the same batch again and again instead of those of the loader.
        warm_up: steps that are not timed.
        steps: timed steps, as the loop sees them.
        part_steps: after those, steps that are timed by parts of the model.
        result: file for what was found, written by the first rank.
    """

    config: str
    synthetic: bool
    warm_up: int
    steps: int
    part_steps: int
    result: str

    @property
    def all_steps(self) -> int:
        """That the run has to have: one more is begun, which ends the last one."""
        return self.warm_up + self.steps + self.part_steps + 1


def main(arguments: list[str]) -> NoReturn:
    """Time the run of a plan's file on this rank; does not return."""
    (path,) = arguments
    plan = load_config(Path(path), TimedPlan)
    config = load_config(Path(plan.config), PretrainConfig)
    ranks = ranks_from_environment()
    limit_threads(config.threads_per_rank, ranks)
    # torch and what needs it come after the threads are set.
    from cavmae.benchmarks.harness.synthetic_batches import SyntheticBatches
    from cavmae.benchmarks.training.timed_loop import AllTimed, TimedLoop
    from cavmae.dataloaders.loading import loader
    from cavmae.trainer import trainer
    from cavmae.trainer.distributed.engine import end_rank
    from cavmae.trainer.run import run

    timed = TimedLoop(
        trainer.train, warm_up=plan.warm_up, steps=plan.steps, part_steps=plan.part_steps
    )
    trainer.train = timed.train
    if plan.synthetic:
        loader.TrainLoader = SyntheticBatches
    with suppress(AllTimed):
        run(config)
        raise AssertionError("the run was over before all of its steps were timed")
    if ranks.rank == 0:
        write_json(Path(plan.result), timed.results())
    end_rank()


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
