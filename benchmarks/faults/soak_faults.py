"""The faults of a soak: each is done to a run that trains, again and again, and must be got over.

All but the two that training goes on through end the ranks or the whole start; where the driver is
gone, the same command is given again, as a scheduler or a user does.
"""

import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from cavmae.benchmarks.faults.injection import (
    cut_short,
    damage_newest,
    file_of_second_rank,
    flip_a_bit,
)
from cavmae.benchmarks.faults.observed_rank import order_nan
from cavmae.benchmarks.faults.runs import INTERVAL, RANKS, Bench, last_step, resumed_step
from cavmae.benchmarks.harness.processes import PATIENCE_SECONDS, descendants, words_of
from cavmae.trainer.checkpoint.format import checkpoints, step_of
from cavmae.trainer.checkpoint.store import open_store
from cavmae.trainer.config.configs import PretrainConfig
from cavmae.trainer.fault_tolerance.preemption import START_AGAIN_EXIT_CODE

_WORDS = ("--max-failures=100000",)


class SoakedRun:
    """A run on Ray that is started as often as it takes.

    Args:
        bench: which starts it.
        config: of the run.
    """

    def __init__(self, bench: Bench, config: PretrainConfig) -> None:
        self._bench = bench
        self.config = config
        self.run_dir = Path(config.run_dir)
        self.begin()

    def begin(self) -> None:
        """Give the command, the first time or again."""
        self.start = self._bench.on_ray(self.config, *_WORDS)
        self.said_bytes = 0

    def look_from_here(self) -> None:
        """What was said so far is not waited for any more."""
        self.said_bytes = self.start.log.stat().st_size

    def wait_for_line(self, pattern: str) -> str:
        """The next line in which a regular expression is found."""
        return self.start.wait_for(lambda: self.start.line(pattern, self.said_bytes), pattern)

    def wait_for_step_after(self, step: int) -> None:
        """Until more steps are done than that."""
        self.start.wait_for(lambda: last_step(self.run_dir) > step, f"a step after {step}")

    def processes(self) -> dict[str, list[psutil.Process]]:
        """Those that live as long as the run does, by kind."""
        return {
            "driver": [self.start.first],
            "controller": self.start.named("ray::TrainController"),
            "rank": self.start.ranks(),
        }

    def all_ranks(self) -> list[psutil.Process]:
        """Processes of the ranks in the order of their numbers; none while one is missing."""
        ranks = sorted(self.start.ranks(), key=lambda one: one.pid)
        return ranks if len(ranks) == RANKS else []

    def leave(self) -> int:
        """Ask the driver to have the ranks save and leave; returns the last step."""
        self.start.processes[0].send_signal(signal.SIGTERM)
        code = self.start.processes[0].wait(PATIENCE_SECONDS)
        if code != START_AGAIN_EXIT_CODE:
            raise RuntimeError(f"the driver left with {code}:\n{self.start.text()[-4000:]}")
        return last_step(self.run_dir)


def _rank_killed(run: SoakedRun, rng: random.Random) -> str:
    _one_rank(run, rng).kill()
    return run.wait_for_line("rank . failed")


def _rank_stopped(run: SoakedRun, rng: random.Random) -> str:
    _one_rank(run, rng).suspend()
    return run.wait_for_line("rank . failed")


def _told_to_go(run: SoakedRun, rng: random.Random) -> str:
    run.leave()
    said = run.wait_for_line("asked to save and leave")
    run.begin()
    return said


def _head_killed(run: SoakedRun, rng: random.Random) -> str:
    run.start.kill()
    run.begin()
    return run.wait_for_line("going on from")


def _newest_damaged(run: SoakedRun, rng: random.Random) -> str:
    run.start.kill()
    damage_newest(run.config, rng.choice([cut_short, flip_a_bit]))
    run.begin()
    return run.wait_for_line("trying the one before")


def _nan_rolled_back(run: SoakedRun, rng: random.Random) -> str:
    order_nan(run.run_dir, rng.randrange(RANKS), step=0)
    return run.wait_for_line("rank . failed: NonFiniteError")


def _disk_full(run: SoakedRun, rng: random.Random) -> str:
    step = (last_step(run.run_dir) // INTERVAL + 2) * INTERVAL
    file_of_second_rank(run.config, step).symlink_to("/dev/full")
    return run.wait_for_line("ALARM")


def _reader_killed(run: SoakedRun, rng: random.Random) -> str:
    """One that waits for a task is replaced without a word, so its heir is looked for."""
    rank = _one_rank(run, rng)
    before = _readers(rank)
    rng.choice(before).kill()
    run.start.wait_for(lambda: set(_readers(rank)) - set(before), "another reader")
    return "another reader was started"


def _readers(rank: psutil.Process) -> list[psutil.Process]:
    return [one for one in descendants(rank) if "process_pool" in words_of(one)]


def _one_rank(run: SoakedRun, rng: random.Random) -> psutil.Process:
    ranks = run.start.wait_for(run.all_ranks, f"{RANKS} ranks")
    return rng.choice(ranks)


FAULTS: dict[str, Callable[[SoakedRun, random.Random], str]] = {
    "a rank is killed (SIGKILL)": _rank_killed,
    "a rank is stopped (SIGSTOP)": _rank_stopped,
    "the driver is told to go (SIGTERM)": _told_to_go,
    "head, driver and ranks are killed": _head_killed,
    "the newest checkpoint is damaged": _newest_damaged,
    "a gradient is NaN: rolled back": _nan_rolled_back,
    "the disk is full": _disk_full,
    "a reader is killed": _reader_killed,
}
TRAINING_GOES_ON = {"the disk is full", "a reader is killed"}
LOSES_A_CHECKPOINT = {"the newest checkpoint is damaged"}


@dataclass(frozen=True)
class Endured:
    """A fault that was got over.

    Attributes:
        fault: its name.
        unix_seconds: when it was done.
        step: steps done before.
        checkpoint_step: of the newest checkpoint before the fault that the fault leaves whole.
        resumed_step: that was gone on from; None: training went on.
        again_seconds: until there was a new step.
        said: the line of the log that names it.
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
        """Steps that had to be done again."""
        return 0 if self.resumed_step is None else max(0, self.step - self.resumed_step)

    @property
    def from_newest(self) -> bool:
        """Whether no checkpoint was passed over that could have been used."""
        return self.resumed_step is None or self.resumed_step >= self.checkpoint_step


def endure(run: SoakedRun, fault: str, rng: random.Random) -> Endured:
    """Do a fault to a run that trains, and wait until it trains again.

    Raises:
        RuntimeError: it does not.
    """
    run.look_from_here()
    whole = [step_of(one) for one in checkpoints(open_store(run.run_dir / "checkpoints"))]
    newest = whole[-2] if fault in LOSES_A_CHECKPOINT else whole[-1]
    before, began = last_step(run.run_dir), time.time()
    said = FAULTS[fault](run, rng)
    resumed = None
    if fault not in TRAINING_GOES_ON:
        run.wait_for_line("going on from")
        resumed = resumed_step(run.start)
    run.wait_for_step_after(before)
    said = said.replace(f"{run.run_dir.parent}/", "")
    return Endured(fault, began, before, newest, resumed, time.time() - began, said)


def drawn(rng: random.Random, count: int) -> list[str]:
    """Faults in a random order, none again before all others have come."""
    order: list[str] = []
    while len(order) < count:
        order += rng.sample(list(FAULTS), len(FAULTS))
    return order[:count]
