"""One owner of a run: a second start is refused while the first one lives.

Each attempt has a file of its own, `lease/attempt-N.json`, in the run folder and where its
checkpoints are. It is written only where there is none of that number, so the newest number owns
the run, and no renewal can undo a take-over. The owner raises a counter in its file every 10 s. A
start that finds another's file watches that counter by its own clock: the clocks of two machines
are never compared.

A start takes over at once what was given back, what its own launcher has started before, and what
was held by a process of this machine that has ended; anything else once the counter has stood still
for 60 s. An owner that was cut off for so long learns of it at its next renewal or checkpoint, and
ends.
"""

import json
import logging
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cavmae.command import UserMistake

if TYPE_CHECKING:
    from cavmae.trainer.checkpoint.store import Store

log = logging.getLogger(__name__)

OWNER_VARIABLE = "CAVMAE_OWNER"
"""Environment variable with the id of a launch: its attempts take over from each other at once."""
RENEW_SECONDS = 10.0
TAKE_OVER_SECONDS = 60.0
POLL_SECONDS = 1.0
_RELEASE_SECONDS = 5.0
_RECORD_BYTES = 1024
"""A record has always the same length, so that it can be written over another one."""
_FOLDER = "lease"
_NAME = re.compile(r"attempt-(\d+)\.json")


class OwnedError(ValueError):
    """Another start owns the run."""


class TakenOverError(OwnedError, UserMistake):
    """Another start has taken the run over from this one, whose launcher must not take it back."""


@dataclass(frozen=True)
class _Holder:
    """Who holds a lease, as its file says.

    Attributes:
        start: random id of the attempt.
        launch: id that the attempts of one launcher share.
        host: name of the machine.
        machine: boot and process namespace in which `pid` has a meaning; empty where unknown.
        pid, pid_started: its process, and when that began, in clock ticks since the boot.
        since: UTC, for people.
        renewals: how often it was renewed.
        released: whether it was given back.
    """

    start: str
    launch: str
    host: str
    machine: str
    pid: int
    pid_started: int
    since: str
    renewals: int = 0
    released: bool = False

    @classmethod
    def of_this_process(cls) -> "_Holder":
        start = secrets.token_hex(8)
        return cls(
            start=start,
            launch=os.environ.get(OWNER_VARIABLE) or start,
            host=socket.gethostname(),
            machine=_machine(),
            pid=os.getpid(),
            pid_started=_started(os.getpid()) or 0,
            since=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        )

    @classmethod
    def in_file(cls, data: bytes) -> "_Holder | None":
        """Read a file; None where it is not one that this version writes."""
        try:
            return cls(**json.loads(data))
        except (ValueError, TypeError):
            return None

    @property
    def has_ended(self) -> bool:
        """Whether it is a process of this machine, as far as this one can see, and has ended."""
        here = self.machine == _machine() != "" and self.host == socket.gethostname()
        return here and _started(self.pid) not in (self.pid_started, None)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


class Lease:
    """An attempt's right to write to its run, which the first rank takes. A context: leaving it
    gives the lease back.

    Args:
        clock: returns seconds, which only grow; tests have their own.
        sleep: waits for seconds of that clock.

    Attributes:
        lost: who has taken the run over, for people; empty while it is this attempt's, as far as
            the last renewal saw.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self.lost = ""
        self._clock, self._sleep = clock, sleep
        self._attempt = 0
        self._places: dict[str, Store] = {}
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join(_RELEASE_SECONDS)  # its file system may hang

    def take(self, places: "dict[str, Store]") -> int:
        """Take the lease, and renew it from a thread from now on; the first rank calls it.

        Args:
            places: stores to take it on, by the name of the setting.

        Returns:
            The number of this attempt: no other attempt of the run has it, whoever started it.

        Raises:
            OwnedError: another start lives.
            OSError: a place can't be read or written.
        """
        self._holder = _Holder.of_this_process()
        attempt = 1 + max(self._once_free(name, store) for name, store in places.items())
        self._attempt = attempt
        self._thread.start()
        for name, store in places.items():
            if not store.put_new(_file(attempt), self._record()):
                raise self._in_use(name, store, _newest(store)[1])  # another start was faster
            self._places = self._places | {name: store}  # the thread may be going through it
        for store in places.values():
            for number in _numbers(store):
                if number < attempt:
                    store.remove_file(_file(number))
        return attempt

    def renew(self) -> None:
        """Raise the counter.

        Raises:
            TakenOverError: another start has taken over.
            OSError: a place can't be read or written.
        """
        self._holder = replace(self._holder, renewals=self._holder.renewals + 1)
        # A network file system may list a folder as it was a minute ago, but not one that has just
        # been written to: so the check comes last. The first one is for stores that can't refuse to
        # overwrite a file.
        self.check()
        for store in self._places.values():
            try:
                store.put(_file(self._attempt), self._record())
            except OSError:  # as on a full disk, where there is no room for a new file
                store.rewrite(_file(self._attempt), self._record())
        self.check()

    def check(self) -> None:
        """Make sure that the run is still this attempt's.

        Raises:
            TakenOverError: another start has taken over.
            OSError: a place can't be read.
        """
        for name, store in self._places.items():
            number, data = _newest(store)
            holder = _Holder.in_file(data)
            same = number == self._attempt and (not holder or holder.start == self._holder.start)
            if number >= self._attempt and not same:
                raise TakenOverError(
                    f"{name} {store.location()} was taken over by {holder or 'another start'}: "
                    f"this attempt, {self._holder}, gave no sign of life for "
                    f"{TAKE_OVER_SECONDS:g} s, or its launcher has replaced it; it ends, and the "
                    "other one goes on"
                )

    def _once_free(self, name: str, store: "Store") -> int:
        """Return the newest attempt's number, once it is known that it has ended."""
        began, seen = self._clock(), None
        while True:
            number, data = _newest(store)
            holder = _Holder.in_file(data)
            if not number or self._may_be_replaced(holder):
                return number
            if seen is None:
                log.warning(
                    "%s %s was in use by %s; waiting for up to %g s to see whether it lives",
                    name,
                    store.location(),
                    holder or "another start",
                    TAKE_OVER_SECONDS,
                )
            elif seen != (number, data):
                raise self._in_use(name, store, data)
            elif self._clock() - began >= TAKE_OVER_SECONDS:
                log.warning("it gave no sign of life: this start takes %s over", store.location())
                return number
            seen = number, data
            self._sleep(POLL_SECONDS)

    def _may_be_replaced(self, holder: _Holder | None) -> bool:
        return holder is not None and (
            holder.released or holder.launch == self._holder.launch or holder.has_ended
        )

    def _in_use(self, name: str, store: "Store", data: bytes) -> OwnedError:
        return OwnedError(
            f"{name} {store.location()} is in use by {_Holder.in_file(data) or 'another start'}; "
            f"wait for the end of that run, stop it (`cavmae stop RUN_DIR`), or use another {name}"
        )

    def _record(self) -> bytes:
        return json.dumps(asdict(self._holder)).ljust(_RECORD_BYTES).encode()

    def _keep(self) -> None:
        """Renew, in the thread, and give the lease back at the end."""
        failing = False
        while not self._closed.wait(RENEW_SECONDS):
            try:
                self.renew()
            except TakenOverError as error:
                self.lost = str(error)
                log.error("%s", error)
                return
            except OSError as error:
                if not failing:
                    log.warning("the lease of the run could not be renewed, retrying: %s", error)
                failing = True
            else:
                failing = False
        self._holder = replace(self._holder, released=True)
        try:
            self.renew()
        except (OwnedError, OSError) as error:
            log.warning("the lease of the run could not be given back: %s", error)


def _file(attempt: int) -> str:
    return f"{_FOLDER}/attempt-{attempt}.json"


def newest_attempt(store: "Store") -> int:
    """Return the number of the newest attempt that took a lease; 0 where there is none.

    Raises:
        OSError: the store can't be read.
    """
    return max(_numbers(store), default=0)


def _numbers(store: "Store") -> list[int]:
    """Return the numbers of the attempts that have a lease."""
    return [int(name[1]) for name in map(_NAME.fullmatch, store.files(_FOLDER)) if name]


def _newest(store: "Store") -> tuple[int, bytes]:
    """Return the number of the newest lease and what its file holds; 0 where there is none, nothing
    where it is being replaced."""
    number = newest_attempt(store)
    try:
        return number, store.read(_file(number))
    except FileNotFoundError:
        return number, b""


def _machine() -> str:
    """Return what tells this machine's boot, and this container's processes, from all others."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> int | None:
    """Return when a process of this machine began, in clock ticks since the boot; 0 where it has
    ended, None where that can't be known."""
    try:
        os.kill(pid, 0)
        # The name, in parentheses, may hold anything.
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except ProcessLookupError:
        return 0
    except OSError:  # another user's, on a machine that hides those
        return None
    return 0 if state in "ZX" else int(fields[18])
