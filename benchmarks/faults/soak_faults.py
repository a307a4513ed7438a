"""The faults of a soak: each is done to a training run, again and again, and must be survived.

All but three that training continues through end the ranks or the whole attempt; if the driver is
gone, the same command is run again, as a scheduler or a user does.
"""

import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from cavmae.benchmarks.faults.data_faults import tear_journals
from cavmae.benchmarks.faults.faulted_run import FaultedRun
from cavmae.benchmarks.faults.injection import (
    cut_short,
    damage_newest,
    file_of_second_rank,
    flip_a_bit,
)
from cavmae.benchmarks.faults.observed_rank import order_misread, order_nan
from cavmae.benchmarks.faults.outages import AWAY_SECONDS
from cavmae.benchmarks.faults.outcome import step_records
from cavmae.benchmarks.faults.run_folder import refusal, tear_stop_request
from cavmae.benchmarks.faults.runs import INTERVAL, RANKS, Bench, last_step, resumed_step
from cavmae.benchmarks.harness.processes import PATIENCE_SECONDS, descendants, words_of
from cavmae.trainer.checkpoint.format import list_checkpoints, step_of
from cavmae.trainer.checkpoint.store import Store
from cavmae.trainer.config.configs import PretrainConfig
from cavmae.trainer.fault_tolerance.preemption import START_AGAIN_EXIT_CODE


class SoakedRun(FaultedRun):
    """A run on Ray that survives many faults, one after the other.

    Args:
        bench: that launches it.
        config: of the run.
    """

    def __init__(self, bench: Bench, config: PretrainConfig) -> None:
        if (away := _away(config)).exists():  # an earlier soak was ended meanwhile
            away.rename(config.data.train)
        super().__init__(bench, config, bench.on_ray)

    def wait_for_checkpoints(self, count: int) -> None:
        """Wait until there are so many."""
        store = Store(self.run_dir / "checkpoints")
        self.attempt.wait_for(lambda: len(list_checkpoints(store)) >= count, f"{count} checkpoints")

    def processes(self) -> dict[str, list[psutil.Process]]:
        """Return the processes that live as long as the run does, by kind."""
        return {
            "driver": [self.attempt.first],
            "controller": self.attempt.named("ray::TrainController"),
            "rank": self.attempt.ranks(),
        }

    def all_ranks(self) -> list[psutil.Process]:
        """Return the processes of the ranks in the order of their ids; empty if one is missing."""
        ranks = sorted(self.attempt.ranks(), key=lambda one: one.pid)
        return ranks if len(ranks) == RANKS else []

    def one_rank(self, rng: random.Random) -> psutil.Process:
        """Choose a rank, once all of them exist."""
        return rng.choice(self.attempt.wait_for(self.all_ranks, f"{RANKS} ranks"))

    def preempt(self) -> int:
        """Preempt the driver, whose ranks save a checkpoint and stop; returns the last step."""
        self.attempt.processes[0].send_signal(signal.SIGTERM)
        return self.wait_until_stopped()

    def wait_until_stopped(self) -> int:
        """Wait until the driver has stopped, to be started again; returns the last step."""
        code = self.attempt.processes[0].wait(PATIENCE_SECONDS)
        if code != START_AGAIN_EXIT_CODE:
            raise RuntimeError(f"the driver exited with {code}:\n{self.attempt.text()[-4000:]}")
        return last_step(self.run_dir)


def _rank_killed(run: SoakedRun, rng: random.Random) -> str:
    run.one_rank(rng).kill()
    return run.wait_until_noticed(run.failure)


def _rank_stopped(run: SoakedRun, rng: random.Random) -> str:
    run.one_rank(rng).suspend()
    return run.wait_until_noticed(run.failure)


def _preempted(run: SoakedRun, rng: random.Random) -> str:
    run.preempt()
    said = run.wait_until_noticed(run.stop)
    run.launch()
    return said


def _head_killed(run: SoakedRun, rng: random.Random) -> str:
    run.attempt.kill()
    run.launch()
    return run.wait_until_noticed(run.resume)


def _newest_damaged(run: SoakedRun, rng: random.Random) -> str:
    run.attempt.kill()
    damage_newest(run.config, rng.choice([cut_short, flip_a_bit]))
    run.launch()
    return run.wait_until_noticed(run.resume)


def _nan_rolled_back(run: SoakedRun, rng: random.Random) -> str:
    order_nan(run.run_dir, rng.randrange(RANKS), step=0)
    return run.wait_until_noticed(run.failure)


def _disk_full(run: SoakedRun, rng: random.Random) -> str:
    step = (last_step(run.run_dir) // INTERVAL + 2) * INTERVAL
    failures = step_records(run.run_dir)[-1]["checkpoint_failures"]
    file_of_second_rank(run.config, step).symlink_to("/dev/full")
    return run.wait_until_noticed(lambda: run.metric("checkpoint_failures", failures))


def _reader_killed(run: SoakedRun, rng: random.Random) -> str:
    """Kill a reader; it is replaced without a message, so another process is looked for."""
    rank = run.one_rank(rng)
    before = _readers(rank)
    rng.choice(before).kill()
    run.attempt.wait_for(lambda: set(_readers(rank)) - set(before), "another reader")
    return "another reader was started"


def _journals_torn(run: SoakedRun, rng: random.Random) -> str:
    run.attempt.kill()
    tear_journals(run.run_dir)
    run.launch()
    return run.wait_until_noticed(run.resume)


def _misread(run: SoakedRun, rng: random.Random) -> str:
    run.attempt.kill()
    order_misread(run.run_dir, rng.randrange(RANKS))
    run.launch()
    return run.wait_until_noticed(run.resume)


def _stop_request_torn(run: SoakedRun, rng: random.Random) -> str:
    tear_stop_request(run.run_dir)
    run.wait_until_stopped()
    said = run.wait_until_noticed(run.stop)
    run.launch()
    return said


def _started_twice(run: SoakedRun, rng: random.Random) -> str:
    second = run.bench.on_ray(run.config)
    return run.wait_until_noticed(lambda: refusal(second))


def _data_missing(run: SoakedRun, rng: random.Random) -> str:
    away = Path(run.config.data.train).rename(_away(run.config))
    run.one_rank(rng).kill()
    said = run.wait_until_noticed(run.failure)
    time.sleep(AWAY_SECONDS)
    away.rename(run.config.data.train)
    return said


def _away(config: PretrainConfig) -> Path:
    return Path(config.data.train).with_name("away")


def _readers(rank: psutil.Process) -> list[psutil.Process]:
    return [one for one in descendants(rank) if "process_pool" in words_of(one)]


FAULTS: dict[str, Callable[[SoakedRun, random.Random], str]] = {
    "a rank is killed (SIGKILL)": _rank_killed,
    "a rank is stopped (SIGSTOP)": _rank_stopped,
    "the driver is preempted (SIGTERM)": _preempted,
    "head, driver and ranks are killed": _head_killed,
    "the newest checkpoint is damaged": _newest_damaged,
    "a gradient is NaN: rolled back": _nan_rolled_back,
    "the disk is full": _disk_full,
    "a reader is killed": _reader_killed,
    "journals are torn": _journals_torn,
    "one rank reads a checkpoint wrongly": _misread,
    "a stop request is torn": _stop_request_torn,
    "the run is started twice": _started_twice,
    "the data are missing at a restart, for 60 s": _data_missing,
}
"""Those of `cavmae bench faults` that leave the samples and losses of one run as they are, need no
other machine, disk or server, and take less than three minutes."""
TRAINING_CONTINUES = {"the disk is full", "a reader is killed", "the run is started twice"}
LOSES_A_CHECKPOINT = {"the newest checkpoint is damaged"}


@dataclass(frozen=True)
class Endured:
    """A fault that was survived.

    Attributes:
        fault: its name.
        unix_seconds: when it was done.
        step: steps done before.
        checkpoint_step: of the newest checkpoint before the fault that the fault leaves whole.
        resumed_step: step that was resumed from; None: training continued.
        again_seconds: until a new step was done.
        said: what the run wrote of it.
    """

    fault: str
    unix_seconds: float
    step: int
    checkpoint_step: int
    resumed_step: int | None
    again_seconds: float
    said: str

    @property
    def steps_lost(self) -> int:
        """Steps that were repeated."""
        return 0 if self.resumed_step is None else max(0, self.step - self.resumed_step)

    @property
    def from_newest(self) -> bool:
        """Whether no usable checkpoint was passed over."""
        return self.resumed_step is None or self.resumed_step >= self.checkpoint_step


def endure(run: SoakedRun, fault: str, rng: random.Random) -> Endured:
    """Do a fault to a training run, and wait until it trains again.

    Raises:
        RuntimeError: it does not.
    """
    run.fault_is_now()
    whole = [step_of(one) for one in list_checkpoints(Store(run.run_dir / "checkpoints"))]
    newest = whole[-2] if fault in LOSES_A_CHECKPOINT else whole[-1]
    said = FAULTS[fault](run, rng)
    resumed = None
    if fault not in TRAINING_CONTINUES:
        run.wait_until_noticed(run.resume)
        resumed = resumed_step(run.run_dir)
    run.wait_for_step(run.before + 1)
    said = said.replace(f"{run.run_dir.parent}/", "")
    again = time.time() - run.fault_seconds
    return Endured(fault, run.fault_seconds, run.before, newest, resumed, again, said)


def drawn(rng: random.Random) -> Iterator[str]:
    """Draw faults in a random order, without end; none comes again before all others have come."""
    while True:
        yield from rng.sample(list(FAULTS), len(FAULTS))
