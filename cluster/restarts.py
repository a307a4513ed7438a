"""Whether a run whose ranks failed is started again, when, and without which node.

A month on a thousand GPUs has hundreds of failures, and nearly all of them pass: a node dies, a
mount or a store is away for an hour. What does not pass (a typo, a bug that fails at the same step
again) must end the run before it costs days. `RestartPolicy` tells them apart by what failed, by
whether the ranks had begun to train, and by whether there was a new checkpoint since the failure
before.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

FIRST_WAIT_SECONDS = 1.0
LONGEST_WAIT_SECONDS = 300.0
SAME_FAILURES = 3
"""So many failures of one kind at one step, without a new checkpoint, are in the run itself."""
NODE_FAILURES = 3
"""A node that is at fault so many times in a row is left out."""

Kind = Literal[
    "lasting",  # a restart can't help: too many bad clips, fields that contradict the run folder
    "not finite",  # updates that are not; in the run itself once it repeats
    "refused",  # a ValueError of ours: the user's mistake, or a folder that is half there
    "missing",  # a file that is not there, or may not be read
    "unreachable",  # any other error of files, stores and connections
    "peer",  # only says that another rank is gone
    "crash",  # a dead process, and everything else
]
BY_USER = ("lasting", "refused", "missing")
"""What the user has to fix in a run that was just started; later it may be the environment."""
_ENVIRONMENT = ("missing", "unreachable")


@dataclass(frozen=True)
class Failure:
    """The end of an attempt.

    Attributes:
        kind: what is known of its cause.
        error_type, text: class and message of the first error.
        rank: whose error it is; -1: of none.
        nodes: names of the nodes whose ranks failed first; empty where no node is at fault.
        began: the ranks had begun to train in this attempt, data and checkpoint loaded.
        step: optimizer steps done, as last reported.
        checkpoint: step of the newest checkpoint; -1 where there is none or it is not known.
    """

    kind: Kind
    error_type: str
    text: str
    rank: int = -1
    nodes: frozenset[str] = frozenset()
    began: bool = False
    step: int = 0
    checkpoint: int = -1

    @property
    def line(self) -> str:
        """The first error for people, in a line."""
        source = f"rank {self.rank}: " if self.rank >= 0 else ""
        return source + self.text.partition("\n")[0]


@dataclass(frozen=True)
class Restart:
    """Start the ranks again. Attributes: wait_seconds, before that; reason, for people."""

    wait_seconds: float
    reason: str


@dataclass(frozen=True)
class End:
    """End the run. Attributes: message; by_user, whether the user has to fix something first."""

    message: str
    by_user: bool


class RestartPolicy:
    """Decides after each failure of a run; one for the life of a driver.

    Args:
        max_failures: failures in a row, without a new checkpoint, of ranks that train; until they
            do for the first time, of any. 0: never start again.
        outage_seconds: for so long what the run needs around it may be away.
        has_trained: in an earlier life of the driver, so that its command is known to be right.
        jitter: returns a factor of a wait, so that many runs do not come back at once.

    Attributes:
        checkpoint: step of the newest checkpoint that is known of; -1: none.
        has_trained: the run has trained, in this life of its driver or an earlier one.
        left_out: names of the nodes that are not used.
    """

    def __init__(
        self,
        max_failures: int,
        outage_seconds: float,
        *,
        has_trained: bool = False,
        jitter: Callable[[], float] = lambda: random.uniform(0.5, 1.0),
    ) -> None:
        self._max_failures = max_failures
        self._outage_seconds = outage_seconds
        self.has_trained = has_trained
        self._jitter = jitter
        self.checkpoint = -1
        self.left_out: set[str] = set()
        self._not_finite = ""
        self._node, self._node_failures = "", 0
        self._in_a_row = self._failures = self._same_failures = 0
        self._same = ("", -1)
        self._outage_began: float | None = None

    def progressed(self, checkpoint: int) -> None:
        """Note a checkpoint: earlier failures no longer count."""
        self.checkpoint = checkpoint
        self._in_a_row = self._failures = self._same_failures = 0
        self._same = ("", -1)
        self._outage_began = None

    def after(
        self, failure: Failure, now: float, can_do_without: Callable[[set[str]], bool]
    ) -> Restart | End:
        """Decide what comes after a failure.

        Args:
            failure: how the newest attempt ended.
            now: seconds of a clock that never goes back.
            can_do_without: whether enough nodes are left without these, by their names.
        """
        if failure.checkpoint > self.checkpoint:
            self.progressed(failure.checkpoint)
        self.has_trained = self.has_trained or failure.began
        if failure.kind == "lasting" or (failure.kind in BY_USER and not self.has_trained):
            return End(failure.text, by_user=True)
        if failure.kind == "not finite":
            if failure.text == self._not_finite:
                text = f"repeated after resuming from a checkpoint: {failure.text}"
                return End(text, by_user=True)
            self._not_finite = failure.text
        self._in_a_row += 1
        left_out_before = set(self.left_out)
        remark = self._judge_node(failure, can_do_without)
        outage = self.has_trained and (not failure.began or failure.kind in _ENVIRONMENT)
        count, end = self._in_outage(failure, now) if outage else self._in_training(failure)
        if self.left_out != left_out_before:  # the others get their own tries
            self._same_failures, end = 0, None
        if end:
            return end
        wait = self._jitter() * min(
            LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2 ** min(self._in_a_row - 1, 20)
        )
        return Restart(wait, f"{count}{remark}")

    def _in_outage(self, failure: Failure, now: float) -> tuple[str, End | None]:
        """Count a failure of what the run needs around it."""
        if self._outage_began is None:
            self._outage_began = now
        lasted = now - self._outage_began
        end = None
        if lasted > self._outage_seconds or not self._max_failures:
            end = End(
                f"no attempt has got on for {lasted / 3600:.1f} h (outage_hours = "
                f"{self._outage_seconds / 3600:g}); {_last(failure)}",
                by_user=False,
            )
        return f"failure {self._in_a_row}, tried for {lasted / 3600:.1f} h", end

    def _in_training(self, failure: Failure) -> tuple[str, End | None]:
        """Count a failure of the run itself, or of a machine."""
        self._outage_began = None
        self._failures += 1
        same = (failure.error_type, failure.step)
        self._same_failures = self._same_failures + 1 if same == self._same else 1
        self._same = same
        end = None
        if self._same_failures >= SAME_FAILURES and failure.kind != "peer":
            end = End(
                f"the same failure {SAME_FAILURES} times at step {failure.step} without a new "
                f"checkpoint; {_last(failure)}",
                by_user=False,
            )
        elif self._failures > self._max_failures:
            end = End(
                f"{self._failures} failures without a new checkpoint (max_failures = "
                f"{self._max_failures}); {_last(failure)}",
                by_user=False,
            )
        return f"failure {self._failures} of {self._max_failures} without a new checkpoint", end

    def _judge_node(self, failure: Failure, can_do_without: Callable[[set[str]], bool]) -> str:
        """Leave out a node that fails again and again; returns what to say of it."""
        node = next(iter(failure.nodes)) if len(failure.nodes) == 1 else ""
        self._node_failures = self._node_failures + 1 if node == self._node else 1
        self._node = node
        if not node or self._node_failures < NODE_FAILURES:
            return ""
        remark = f"; node {node} failed {self._node_failures} times in a row"
        if not can_do_without(self.left_out | {node}):
            return f"{remark} and is used again, as too few are left without it"
        self.left_out.add(node)
        return f"{remark} and is left out"


def check_run_folder(run_dir: Path) -> None:
    """Check that the folder of a run that has trained is there.

    Raises:
        FileNotFoundError: it is not, and would be made anew on the disk below the mount.
    """
    if not (run_dir / "config.json").exists():
        raise FileNotFoundError(
            f"run_dir {run_dir} has no config.json any more; is its file system mounted?"
        )


def _last(failure: Failure) -> str:
    return (
        f"the last one: {failure.line} ({failure.error_type}); rerun the same command to resume "
        "from the newest checkpoint"
    )
