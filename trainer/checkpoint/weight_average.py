"""The mean of a run's weights at the ends of its last epochs, as in the published fine-tuning.

The weights of each of those epochs are kept in the run folder, for a run that resumes. They are on
the disk before a checkpoint of their step or later is committed: what does not fit on a full disk
waits in the first rank's memory, and no checkpoint can be resumed from that lacks it.
"""

import logging
import math
from pathlib import Path

import torch
import torch.distributed as dist

from cavmae.atomic_write import atomic_write
from cavmae.trainer.distributed.collectives import on_first_rank
from cavmae.trainer.distributed.engine import Engine
from cavmae.trainer.model.weights import read_state

log = logging.getLogger(__name__)


def save_weights(path: Path, weights: dict[str, torch.Tensor]) -> None:
    """Write a state dict atomically.

    Raises:
        OSError: it could not be written; torch.save reports a full disk as a RuntimeError.
    """
    try:
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            torch.save(weights, file)  # torch writes the name of a path into the file
    except RuntimeError as error:
        raise OSError(f"{path} could not be written: {error}") from error


class EpochWeights:
    """Keeps the weights at the ends of epochs; false where no epoch is averaged.

    Args:
        folder: where the first rank writes them.
        first_epoch: first epoch to average, counted from 1; 0 averages none.
        steps: optimizer steps of the run, which also ends its last epoch.
        steps_per_epoch: optimizer steps of a pass over the training set.

    Raises:
        ValueError: the run ends before `first_epoch`.
    """

    def __init__(
        self, folder: Path, *, first_epoch: int, steps: int, steps_per_epoch: float
    ) -> None:
        last_epoch = math.ceil(steps / steps_per_epoch - 1e-9)
        if first_epoch > last_epoch:
            raise ValueError(
                f"average_from_epoch is {first_epoch} and the run has {last_epoch} epochs; use "
                f"{last_epoch} or less, or 0 to use the final weights"
            )
        self._folder = folder
        epochs = range(first_epoch, last_epoch + 1) if first_epoch else ()
        # An epoch may be shorter than a step.
        self._ends = {max(1, min(steps, round(epoch * steps_per_epoch))): epoch for epoch in epochs}
        self._waiting: dict[int, dict[str, torch.Tensor]] = {}

    def keep(self, engine: Engine, step: int) -> None:
        """Keep the weights if `step` ends an averaged epoch; all ranks call it."""
        if step not in self._ends:
            return
        weights = engine.full_state_dict()
        if dist.get_rank() != 0:
            return
        self._waiting[step] = weights
        try:
            self.write_waiting()
        except OSError as error:
            log.error(
                "ALARM: the weights at the end of epoch %d could not be written (%s); training "
                "continues, and no checkpoint is saved before they are",
                self._ends[step],
                error,
            )

    def write_waiting(self) -> None:
        """Write what is kept and not yet on the disk; the first rank calls it.

        Raises:
            OSError: it could not be written.
        """
        for step in list(self._waiting):
            self._folder.mkdir(exist_ok=True)
            save_weights(self._path(step), self._waiting[step])
            del self._waiting[step]

    def mean(self) -> dict[str, torch.Tensor]:
        """Return the mean in float32 on rank 0, summed in float64; empty on the others, which call
        it too.

        Raises:
            ValueError: the weights of an epoch are missing or can't be read.
        """
        mean: dict[str, torch.Tensor] = {}

        def read() -> None:
            for step in self._ends:
                for name, tensor in self._read(step).items():
                    share = tensor.double() / len(self._ends)
                    mean[name] = mean[name] + share if name in mean else share

        on_first_rank(read)
        return {name: tensor.float() for name, tensor in mean.items()}

    def _read(self, step: int) -> dict[str, torch.Tensor]:
        try:
            return read_state(self._path(step))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"the weights at the end of epoch {self._ends[step]}, which average_from_epoch "
                f"asks for, can't be read ({error}); remove the checkpoints from step {step} on "
                "to resume from before it"
            ) from error

    def __bool__(self) -> bool:
        return bool(self._ends)

    def _path(self, step: int) -> Path:
        return self._folder / f"epoch-{self._ends[step]:04d}.pt"
