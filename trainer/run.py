"""A run, whoever launches it: every rank calls `run` with the same configuration.

A run folder that has checkpoints is resumed from the newest intact one.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from cavmae.trainer.config.configs import RunConfig
from cavmae.trainer.distributed.env import limit_threads, ranks_from_environment
from cavmae.trainer.fault_tolerance.lease import Lease
from cavmae.trainer.fault_tolerance.preemption import withdraw_request
from cavmae.trainer.run_status import StatusWriter
from cavmae.trainer.run_summary import RunSummary
from cavmae.trainer.tracking.rank_logging import log_to_stderr

if TYPE_CHECKING:
    from cavmae.trainer.trainer import Hooks

MakeHooks = Callable[[RunConfig], "Hooks"]


def run(
    config: RunConfig,
    notice: Callable[[], str] = lambda: "",
    make_hooks: MakeHooks | None = None,
) -> RunSummary:
    """Train, validate and save; every rank calls it with the same configuration.

    Args:
        config: the run.
        notice: returns why the launcher wants this rank to save and stop, or an empty text; called
            at each step.
        make_hooks: makes the hooks of benchmarks and tests; called on each rank.

    Raises:
        OwnedError: another start of the run lives, or has taken it over.
        ValueError: the data, the rank count, the run folder or the memory does not fit the
            configuration.
        OSError: data can't be read or the run folder can't be written.
        NonFiniteError: too many updates in a row were not finite.
    """
    ranks = ranks_from_environment()
    log_to_stderr(ranks.rank)
    with StatusWriter(Path(config.run_dir), ranks.rank) as status, Lease() as lease:
        threads = limit_threads(config.threads_per_rank, ranks)
        # These import torch, so they come after the threads are set.
        from cavmae.trainer.fault_tolerance.oom import check_machines, oom_guard
        from cavmae.trainer.run_dir import open_run
        from cavmae.trainer.trainer import Hooks, Trainer

        opened = open_run(config, ranks, threads, status, lease)
        config, store, device = opened.config, opened.store, opened.device
        if device.type == "cpu":
            check_machines(config, ranks, store)
        with oom_guard(config, opened.run_dir, store, ranks, device):
            hooks = make_hooks(config) if make_hooks else Hooks()
            summary = Trainer(opened, notice, hooks).train()
    if ranks.rank == 0 and not summary.stopped:  # who stops it may not wait
        from cavmae.trainer.tracking.run_report import report_or_warn

        report_or_warn(opened.run_dir)
    return summary


def run_as_rank(config: RunConfig, make_hooks: MakeHooks | None = None) -> NoReturn:
    """Run as the rank that the environment names, and exit the process."""
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    if ranks_from_environment().rank == 0 and not restarted:
        withdraw_request(Path(config.run_dir))  # a stop request of an earlier attempt
    run(config, make_hooks=make_hooks)
    from cavmae.trainer.distributed.process_group import end_rank

    end_rank()
