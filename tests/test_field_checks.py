"""A field outside its declared limits is refused with its full name, its value and what to use."""

import math
from dataclasses import dataclass
from typing import Annotated

import pytest

from cavmae.field_checks import CheckedFields, Fraction, Limit, PositiveInt, Seconds, at_least


@dataclass(frozen=True)
class Oven(CheckedFields, section="kitchen.oven"):
    trays: PositiveInt = 1
    fan: Fraction = 0.5
    timer: Annotated[float | None, Limit(lambda x: x % 5 == 0, "a multiple of 5")] = None
    seed: int = -1


@dataclass(frozen=True)
class TimedOven(Oven):
    delay: Seconds = 1.0
    repeats: Annotated[int, at_least(0, "never")] = 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Oven(trays=0), "kitchen.oven.trays is 0; use 1 or more"),
        (lambda: Oven(fan=1.5), "kitchen.oven.fan is 1.5; use a fraction from 0 to 1"),
        (lambda: Oven(timer=7), "kitchen.oven.timer is 7; use a multiple of 5"),
        (lambda: TimedOven(delay=0.0), "delay is 0.0; use seconds above 0"),
        (lambda: TimedOven(trays=-2), "trays is -2; use 1 or more"),
        (lambda: TimedOven(repeats=-1), "repeats is -1; use 0 (never) or more"),
    ],
)
def test_a_value_outside_its_limits_is_refused(make, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        make()
    assert str(caught.value) == message


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_value_that_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=f"delay is {value}; use seconds above 0"):
        TimedOven(delay=value)


def test_fields_without_limits_or_a_value_are_not_checked() -> None:
    assert Oven(seed=-7, timer=None, fan=1).seed == -7
