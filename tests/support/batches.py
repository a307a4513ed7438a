"""Batches of a loader: how many a test takes, and whether two loaders give the same."""

import itertools

import torch

from cavmae.dataloaders.batch import AudioVideoBatch
from cavmae.dataloaders.loading.loader import TrainLoader


def take(loader: TrainLoader, batches: int) -> list[AudioVideoBatch]:
    return list(itertools.islice(loader, batches))


def given(tensor: torch.Tensor | None) -> torch.Tensor:
    """What a batch of both modalities has."""
    assert tensor is not None
    return tensor


def assert_equal(ours: list[AudioVideoBatch], theirs: list[AudioVideoBatch]) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        for field, value in vars(other).items():
            mine = getattr(one, field)
            equal = torch.equal(mine, value) if torch.is_tensor(value) else mine == value
            assert equal, field
