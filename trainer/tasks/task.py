"""What the trainer asks of a kind of training, and of a loader."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from cavmae.dataloaders.batch import AudioVideoBatch
from cavmae.dataloaders.loading.quarantine import QuarantinedSample
from cavmae.trainer.distributed.engine import Engine, ParamGroup
from cavmae.trainer.model.encoder import AudioVideoEncoder


@dataclass(frozen=True)
class Validation:
    """Scores on validation clips.

    Attributes:
        metrics: values by name, `val_...`, the same on all ranks.
        draw: writes figures of a step to a folder and returns their paths; one rank calls it.
    """

    metrics: dict[str, float]
    draw: Callable[[Path, int], list[Path]] = lambda folder, step: []


class Task(Protocol):
    """One kind of training: its model, the loss of a step, and validation."""

    @property
    def description(self) -> str:
        """A few words for the log."""
        ...

    def build_model(self) -> tuple[AudioVideoEncoder, list[ParamGroup]]:
        """Build the model with its initial weights, on CPU, what is not trained frozen.

        Returns:
            The model and its parameter groups; no groups if all parameters share a learning rate.

        Raises:
            ValueError: the initial weights do not fit the model.
            FileNotFoundError: there is no such file of weights.
        """
        ...

    def begin_step(self, engine: Engine, batches: list[AudioVideoBatch]) -> None:
        """Prepare what spans the step's micro-batches; called once with all of them."""
        ...

    def loss(self, engine: Engine, batch: AudioVideoBatch) -> torch.Tensor:
        """Compute the scalar whose mean over micro-batches and ranks is the step's loss."""
        ...

    def metrics(self) -> dict[str, torch.Tensor]:
        """Return this rank's means over the step's micro-batches; averaged over ranks they are the
        step's metrics."""
        ...

    def validate(self, model: nn.Module, batches: Iterable[AudioVideoBatch]) -> Validation:
        """Score a model on validation clips; all ranks call it.

        Args:
            model: in evaluation mode.
            batches: this rank's clips; positions are the clips' indexes in the set.
        """
        ...


class Loader(Protocol):
    """Endless micro-batches of one rank.

    Attributes:
        wait_seconds: total time spent waiting for batches.
    """

    wait_seconds: float

    @property
    def quarantine(self) -> Sequence[QuarantinedSample]: ...
    def __iter__(self) -> Iterator[AudioVideoBatch]: ...
    def close(self) -> None: ...
