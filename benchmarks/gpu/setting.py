"""What the stages of a GPU check know and what they find."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import torch

from cavmae.benchmarks.harness.records import read_record
from cavmae.benchmarks.step.training_step import SIZES, Size
from cavmae.trainer.model.config import ModelConfig


def absent(modules: Iterable[str]) -> list[str]:
    """Return those of some modules that are not installed."""

    def is_there(module: str) -> bool:
        try:
            return find_spec(module) is not None
        except ModuleNotFoundError:  # the package that it would be in
            return False

    return [module for module in modules if not is_there(module)]


class Skip(Exception):
    """A stage cannot run here, for the reason in the message."""


@dataclass
class Found:
    """What a stage has found, as far as it got.

    Attributes:
        key: what says most, in a few words.
        details: JSON values.
        beyond: comparisons beyond their limits, as messages; any fails the stage.
    """

    key: str
    details: dict[str, Any]
    beyond: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Check:
    """What a stage knows.

    Attributes:
        device_type: `cuda` or `cpu`.
        small: a tiny model and small sizes.
        golden: folder of reference numbers.
        deadline: `time.monotonic()` after which it starts nothing more: it is ended soon.
        record: file with the results of the stages before; empty where there were none.
    """

    device_type: str
    small: bool
    golden: str
    deadline: float
    record: str

    @property
    def device(self) -> torch.device:
        return torch.device(self.device_type)

    @property
    def model(self) -> Size:
        return "tiny" if self.small else "base"

    @property
    def config(self) -> ModelConfig:
        return SIZES[self.model]

    @property
    def batches(self) -> tuple[int, ...]:
        """Batches of a step, to be tried from the largest on."""
        return (16, 8, 4, 2, 1) if self.small else (1024, 512, 256, 128, 64, 32, 16, 8)

    @property
    def repeats(self) -> int:
        return 2 if self.small else 5

    @cached_property
    def earlier(self) -> dict[str, Any]:
        """Details of the stages before that found any, by name."""
        results = read_record(self.record).results if self.record else {}
        return {name: one["details"] for name, one in results.items() if one["details"]}
