"""The time of kernels, from their work and the speed of a machine: a range, because how much of a
GPU's data sheet its libraries reach is known as a range.

A kernel takes as long as its operations or its bytes, whichever is longer. A product is cut into
tiles, and the last of them may leave multiprocessors idle; attention computes exponentials beside
its products. Kernels follow each other with a gap; where the host launches more slowly than the
device works, the pass takes the host's time.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields

from cavmae.trainer.cost_model.kernel import Kernel

_TILE = 128
"""Rows and columns of the output that a multiprocessor has at a time."""
_LEAST_INNER, _MOST_PARTS = 1024, 16
"""Of the parts that libraries cut an inner side into (split-K), so that tiles fill the device."""


@dataclass(frozen=True)
class Range:
    """Attributes: low, high: least and most."""

    low: float
    high: float

    def __add__(self, other: "Range") -> "Range":
        return Range(self.low + other.low, self.high + other.high)

    def times(self, factor: float) -> "Range":
        """Multiply both ends."""
        return Range(factor * self.low, factor * self.high)

    @property
    def middle(self) -> float:
        """The geometric mean: as many times the low end as the high end is times it."""
        return math.sqrt(self.low * self.high)


@dataclass(frozen=True)
class Ceilings:
    """What a machine reaches.

    Attributes:
        name: of the machine.
        source: of these numbers.
        flops_per_second: of large matrix products.
        bytes_per_second: of memory.
        attention: operations a second of its products, by pass.
        exponentials_per_second: of attention, beside its products; inf: they are in its rate.
        launch_seconds: of the host for a kernel, while the device works.
        gap_seconds: between two kernels.
        multiprocessors: that tiles of a product are given to; 0: not modelled.
        layouts: operations a second of products by `Kernel.layout`, where they were measured.
        operations: bytes a second of other operations by name, where they were measured.
    """

    name: str
    source: str
    flops_per_second: Range
    bytes_per_second: Range
    attention: Mapping[str, Range]
    exponentials_per_second: float = math.inf
    launch_seconds: Range = Range(0.0, 0.0)
    gap_seconds: Range = Range(0.0, 0.0)
    multiprocessors: int = 0
    layouts: Mapping[str, Range] = field(default_factory=dict)
    operations: Mapping[str, Range] = field(default_factory=dict)


@dataclass(frozen=True)
class Times:
    """Seconds of kernels by what they are bound by.

    Attributes:
        product, attention, other: on the device, by kind.
        gap: between kernels.
        launch: of the host, beside the device.
    """

    product: Range = Range(0.0, 0.0)
    attention: Range = Range(0.0, 0.0)
    other: Range = Range(0.0, 0.0)
    gap: Range = Range(0.0, 0.0)
    launch: Range = Range(0.0, 0.0)

    @property
    def device(self) -> Range:
        """Seconds that the device is busy or waits between kernels."""
        return self.product + self.attention + self.other + self.gap

    @property
    def total(self) -> Range:
        """The device's time, or the host's where that is longer."""
        device, host = self.device, self.launch
        return Range(max(device.low, host.low), max(device.high, host.high))

    def by_kind(self) -> dict[str, Range]:
        """Return the seconds of each kind, and how much longer the host takes than the device."""
        waiting = Range(self.total.low - self.device.low, self.total.high - self.device.high)
        named = {name: getattr(self, name) for name in ("product", "attention", "other", "gap")}
        return named | {"host": waiting}

    def times(self, factor: float) -> "Times":
        """Return the times of so many equal passes."""
        return Times(**{one.name: getattr(self, one.name).times(factor) for one in fields(self)})

    def __add__(self, other: "Times") -> "Times":
        """Return the times of one pass after another, for which the host does not wait."""
        sums = {
            one.name: getattr(self, one.name) + getattr(other, one.name) for one in fields(self)
        }
        return Times(**sums)


def kernel_times(kernels: Iterable[Kernel], ceilings: Ceilings) -> Times:
    """Return the time of kernels that run one after the other.

    Args:
        kernels: in any order.
        ceilings: of the machine.
    """
    sums = Times()
    for one in kernels:
        gap, launch = ceilings.gap_seconds, ceilings.launch_seconds
        alone = Times(**{one.kind: _seconds(one, ceilings)}, gap=gap, launch=launch)
        sums += alone.times(one.calls)
    return sums


def _seconds(one: Kernel, ceilings: Ceilings) -> Range:
    """Return the time of one kernel."""
    speed = ceilings.operations.get(one.name, ceilings.bytes_per_second)
    memory = Range(one.bytes / speed.high, one.bytes / speed.low)
    if one.kind == "other":
        return memory
    if one.kind == "product":
        rate = ceilings.layouts.get(one.layout, ceilings.flops_per_second)
        exponentials = 0.0
    else:
        rate = ceilings.attention[one.during]
        exponentials = math.prod(one.shape[:4]) / ceilings.exponentials_per_second
    least = max(one.flops / rate.high, exponentials)
    most = one.flops / rate.low * _idle_factor(one, ceilings.multiprocessors) + exponentials
    return Range(max(memory.low, least), max(memory.high, most))


def _idle_factor(product: Kernel, multiprocessors: int) -> float:
    """Return how many times as long a product takes because its last tiles do not fill the device.

    Source: NVIDIA, Matrix Multiplication Background User's Guide, wave quantization.
    """
    if product.kind != "product" or not multiprocessors:
        return 1.0
    batch, rows, columns, inner = product.shape
    tiles = batch * math.ceil(rows / _TILE) * math.ceil(columns / _TILE)
    parts = range(1, min(_MOST_PARTS, inner // _LEAST_INNER) + 1) or [1]
    waves = [part * tiles / multiprocessors for part in parts]
    return min(math.ceil(one) / one for one in waves)
