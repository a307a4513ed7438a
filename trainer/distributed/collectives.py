"""What ranks share: a result or error of one rank, tensors of uneven length, and the one small
reduction of a step.

A rank that raises alone leaves the others waiting in their next collective.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from cavmae.dataloaders.batch import AudioVideoBatch, to_device

T = TypeVar("T")


def on_first_rank(work: Callable[[], T]) -> T:
    """Run `work` on the first rank and return its result on every rank; all ranks call it.

    Raises:
        Exception: what `work` raised on the first rank; a library's own error as an OSError.
    """
    outcome: list[Any] = [_outcome(work) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(outcome)
    return _value(outcome[0])


def on_all_ranks(work: Callable[[], T]) -> list[T]:
    """Run `work` on every rank and return the results by rank; all ranks call it.

    Raises:
        Exception: what `work` raised on the first rank that failed; a library's own error as an
            OSError.
    """
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, _outcome(work))
    return [_value(outcome) for outcome in outcomes]


def reduce_step(
    metrics: dict[str, torch.Tensor],
    flags: tuple[bool, ...],
    busy_seconds: float | None,
    device: torch.device,
) -> tuple[dict[str, float], list[int], list[float]]:
    """Exchange what ranks have to know of each other after a step, in one small reduction. A step
    waits for the device here, once, and nowhere else.

    Args:
        metrics: scalars of this rank, of the same names on all ranks.
        flags: of this rank.
        busy_seconds: of this rank; None on all ranks if it is not asked for.
        device: this rank's device.

    Returns:
        The means of the metrics over ranks, the number of ranks that set each flag, and the busy
        seconds by rank.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    names = sorted(metrics)
    seconds = [0.0] * (0 if busy_seconds is None else world_size)
    if busy_seconds is not None:
        seconds[rank] = busy_seconds
    values = [metrics[name].double().reshape(1) for name in names]
    of_host = torch.tensor([*flags, *seconds], dtype=torch.float64)
    total = torch.cat([*values, to_device(of_host, device)])
    dist.all_reduce(total)
    sums = total.tolist()
    means = {name: value / world_size for name, value in zip(names, sums, strict=False)}
    after = len(names) + len(flags)
    return means, [int(count) for count in sums[len(names) : after]], sums[after:]


def in_lockstep(
    batches: Iterable[AudioVideoBatch], device: torch.device
) -> Iterator[tuple[AudioVideoBatch, bool]]:
    """Yield this rank's batches, and its last one again (not to be counted) while others have more.

    ZeRO-3 gathers parameters in every forward pass, so all ranks need equally many of them.

    Raises:
        ValueError: this rank has no batch at all.
    """
    last: AudioVideoBatch | None = None
    iterator = iter(batches)
    while True:
        batch = next(iterator, None)
        more = torch.tensor(batch is not None, dtype=torch.int32, device=device)
        dist.all_reduce(more, op=dist.ReduceOp.MAX)
        if not more:
            return
        if batch is None and last is None:
            raise ValueError(
                "data.validation has fewer clips than there are ranks; add clips or use fewer ranks"
            )
        if batch is not None:
            last = batch
        assert last is not None
        yield last, batch is not None


def gather_uneven(own: torch.Tensor) -> torch.Tensor:
    """Gather the rows of all ranks, in the order of ranks, on every rank.

    Args:
        own: (rows, ...) of this rank; ranks may have different numbers of rows.
    """
    counts = [
        torch.zeros((), dtype=torch.int64, device=own.device) for _ in range(dist.get_world_size())
    ]
    dist.all_gather(counts, torch.tensor(len(own), device=own.device))
    padded = own.new_zeros(int(max(counts)), *own.shape[1:])
    padded[: len(own)] = own
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])


def _outcome(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except Exception as error:
        # Errors of libraries may not survive being pickled.
        if type(error).__module__.partition(".")[0] in ("builtins", "cavmae"):
            return None, error
        return None, OSError(f"{type(error).__name__}: {error}")


def _value(outcome: tuple[Any, Exception | None]) -> Any:
    value, error = outcome
    if error is not None:
        raise error
    return value
