"""The mean of a run's weights at the ends of its last epochs, as in the published fine-tuning.

The weights of each of those epochs are kept in the run folder, for a run that resumes; they are on
the disk before the checkpoint of their step begins.
"""

import math
from pathlib import Path

import torch

from cavmae.atomic_write import atomic_write
from cavmae.trainer.distributed.collectives import on_first_rank
from cavmae.trainer.distributed.engine import Engine
from cavmae.trainer.model.weights import read_state


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

    def keep(self, engine: Engine, step: int) -> None:
        """Write the weights if `step` ends an averaged epoch; all ranks call it.

        Raises:
            OSError: they could not be written.
        """
        if step not in self._ends:
            return
        weights = engine.full_state_dict()

        def write() -> None:
            self._folder.mkdir(exist_ok=True)
            with atomic_write(self._path(step)) as temporary, temporary.open("wb") as file:
                torch.save(weights, file)

        on_first_rank(write)

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
