"""Runs an iterator in a background thread, a few items ahead of its consumer."""

import queue
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Generic, TypeVar

T = TypeVar("T")

POLL_SECONDS = 0.1
CLOSE_SECONDS = 10.0
"""How long `join` waits for the item in progress; a decoder that hangs is abandoned."""


class Prefetcher(Generic[T]):
    """Computes the items of an iterator in a background thread, and re-raises its exceptions.

    Args:
        items: consumed by the thread alone.
        depth: maximum number of finished items.
    """

    def __init__(self, items: Iterator[T], depth: int):
        self._queue: queue.Queue[tuple[T | None, Exception | None]] = queue.Queue(depth)
        self._stop = threading.Event()
        self._failure: Exception | None = None
        self.wait_seconds = 0.0
        # A daemon, because an exiting interpreter waits for all other threads before it runs the
        # exit handlers that would end them.
        self._thread = threading.Thread(target=self._make, args=(items,), daemon=True)
        self._thread.start()

    def __iter__(self) -> "Prefetcher[T]":
        return self

    def __next__(self) -> T:
        """Wait for the next item.

        Raises:
            StopIteration: the iterator is exhausted.
            Exception: the iterator's exception, on this and every further call.
            RuntimeError: `stop` was called.
        """
        if self._failure is None:
            start = time.monotonic()
            item, self._failure = self._get()
            self.wait_seconds += time.monotonic() - start
            if item is not None:
                return item
        assert self._failure is not None
        raise self._failure

    def stop(self) -> None:
        """Ask the thread to end after the current item."""
        self._stop.set()

    def join(self) -> None:
        """Wait for the thread after `stop`."""
        self._thread.join(CLOSE_SECONDS)

    def _make(self, items: Iterator[T]) -> None:
        try:
            for item in items:
                if not self._put((item, None)):
                    return
            self._put((None, StopIteration()))
        except Exception as error:  # raised again by `__next__`
            self._put((None, error))

    def _get(self) -> tuple[T | None, Exception | None]:
        while not self._stop.is_set():
            with suppress(queue.Empty):
                return self._queue.get(timeout=POLL_SECONDS)
        return None, RuntimeError("the loader is closed; make a new one")

    def _put(self, entry: tuple[T | None, Exception | None]) -> bool:
        while not self._stop.is_set():
            with suppress(queue.Full):
                self._queue.put(entry, timeout=POLL_SECONDS)
                return True
        return False
