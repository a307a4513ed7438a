"""What one rank finds out, all ranks know: a result, or the error that all then raise alike.

A rank that raises by itself leaves the others waiting in their next collective.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def on_first_rank(work: Callable[[], T]) -> T:
    """What `work` returns on the first rank; all ranks call it.

    Raises:
        Exception: what `work` raised on the first rank; a library's own as an OSError.
    """
    outcome: list[Any] = [_outcome(work) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(outcome)
    return _value(outcome[0])


def on_all_ranks(work: Callable[[], T]) -> list[T]:
    """What `work` returns on each rank, by rank; all ranks call it.

    Raises:
        Exception: what `work` raised on some rank, the first that did; a library's own as an
            OSError.
    """
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, _outcome(work))
    return [_value(outcome) for outcome in outcomes]


def _outcome(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except Exception as error:
        # Errors of libraries may not survive the way to the other ranks.
        if type(error).__module__.partition(".")[0] in ("builtins", "cavmae"):
            return None, error
        return None, OSError(f"{type(error).__name__}: {error}")


def _value(outcome: tuple[Any, Exception | None]) -> Any:
    value, error = outcome
    if error is not None:
        raise error
    return value
