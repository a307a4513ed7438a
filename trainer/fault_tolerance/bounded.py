"""Work that may block for ever, such as a write to a file system that hangs, tried for a while."""

import threading
from collections.abc import Callable


def finishes_within(seconds: float, work: Callable[[], object]) -> bool:
    """Do work in a thread, and return whether it ended without an OSError in time.

    A thread that is stuck is left behind: the process is about to end.
    """
    done = threading.Event()

    def run() -> None:
        try:
            work()
        except OSError:
            return
        done.set()

    thread = threading.Thread(target=run, name="bounded work", daemon=True)
    thread.start()
    thread.join(seconds)
    return done.is_set()
