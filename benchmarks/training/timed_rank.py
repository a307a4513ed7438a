"""A rank of a training run that times its steps and ends after that.

The run is the product's own, with its engine, loop and loader; the trainer's hooks do the timing.

    python -m cavmae.benchmarks.training.timed_rank FOLDER
"""

import sys
from pathlib import Path
from typing import NoReturn

from cavmae.atomic_write import write_json
from cavmae.benchmarks.training.timed_plan import TimedPlan
from cavmae.command import exit_code
from cavmae.trainer.config.configs import PretrainConfig
from cavmae.trainer.config.serialize import load_config
from cavmae.trainer.distributed.env import limit_threads, ranks_from_environment


def main(arguments: list[str]) -> NoReturn:
    """Time the run of `config.json` in a folder as its `plan.json` says; the first rank writes
    `result.json`. Does not return."""
    folder = Path(*arguments)
    plan = load_config(folder / "plan.json", TimedPlan)
    config = load_config(folder / "config.json", PretrainConfig)
    ranks = ranks_from_environment()
    limit_threads(config.threads_per_rank, ranks)
    # These import torch, so they come after the threads are set.
    import torch

    from cavmae.benchmarks.harness.synthetic_batches import SyntheticBatches
    from cavmae.benchmarks.training.timed_loop import AllTimed, TimedLoop
    from cavmae.dataloaders.loading.loader import TrainLoader
    from cavmae.trainer.distributed.process_group import end_rank
    from cavmae.trainer.run import run

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", ranks.local_rank) if cuda else torch.device("cpu")
    timed = TimedLoop(device, plan)
    hooks = timed.hooks(SyntheticBatches if plan.synthetic else TrainLoader)
    try:
        run(config, make_hooks=lambda _: hooks)
        raise AssertionError("the run was over before all of its steps were timed")
    except AllTimed:
        pass
    if ranks.rank == 0:
        write_json(folder / "result.json", timed.results())
    end_rank()


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
