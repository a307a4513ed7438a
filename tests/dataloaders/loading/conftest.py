"""Loaders of one rank on the CPU that end with the test, and their batches."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from cavmae.dataloaders.config import ClipShape, DataConfig
from cavmae.dataloaders.loading.loader import TrainLoader, ValidationLoader
from cavmae.dataloaders.sampling.step_shares import StepShares

ON_CPU: dict[str, Any] = {"rank": 0, "device": torch.device("cpu")}


@pytest.fixture
def train_loader() -> Iterator[Callable[..., TrainLoader]]:
    """Start a `TrainLoader`: its config, shape, and what differs from 4 lanes of 8 samples."""
    loaders = []

    def start(config: DataConfig, shape: ClipShape, **fields: Any) -> TrainLoader:
        plan = {"global_batch": 8, "lanes": 4, "world_size": 1, "micro_batch": 8}
        shares = StepShares(**{name: fields.pop(name, value) for name, value in plan.items()})
        loaders.append(
            TrainLoader(config, shape, shares=shares, **{"seed": 11, **ON_CPU, **fields})
        )
        return loaders[-1]

    yield start
    for loader in loaders:
        loader.close()


@pytest.fixture
def validation_loader() -> Callable[..., ValidationLoader]:
    """Build a `ValidationLoader`: its config, shape, and what differs from 5 clips at a time."""

    def build(config: DataConfig, shape: ClipShape, **fields: Any) -> ValidationLoader:
        return ValidationLoader(
            config, shape, **{**ON_CPU, "world_size": 1, "batch": 5, "limit": 0, **fields}
        )

    return build
