"""Checks of configuration fields when the dataclass is made: limits, declared with a field's type,
and credentials.

    @dataclass(frozen=True)
    class LossConfig(CheckedFields, section="loss"):
        temperature: PositiveFloat = 0.05

`LossConfig(0)` raises "loss.temperature is 0; use a value above 0".
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar

from cavmae.credentials import check_no_credential


@dataclass(frozen=True)
class Limit:
    """The values that a numeric field accepts, all of them finite.

    Attributes:
        accepts: whether a value is one of them.
        use: names them in the error message.
    """

    accepts: Callable[[float], bool]
    use: str


def at_least(least: int, zero: str = "") -> Limit:
    """Accept `least` or more.

    Args:
        least: smallest accepted value.
        zero: what a `least` of 0 means, where it has a meaning of its own.
    """
    return Limit(lambda value: value >= least, f"{least}{zero and f' ({zero})'} or more")


PositiveInt = Annotated[int, at_least(1)]
NonNegativeInt = Annotated[int, at_least(0)]
NonNegativeFloat = Annotated[float, at_least(0)]
PositiveFloat = Annotated[float, Limit(lambda value: value > 0, "a value above 0")]
Seconds = Annotated[float, Limit(lambda value: value > 0, "seconds above 0")]
Fraction = Annotated[float, Limit(lambda value: 0 <= value <= 1, "a fraction from 0 to 1")]


class CheckedFields:
    """Base of a dataclass whose numeric fields are held to the `Limit` in their annotations, and
    whose texts may not have a credential in a URL.

    A subclass names its section of the configuration, such as `class LossConfig(CheckedFields,
    section="loss")`, so that messages name fields as a command line does. A field that is None is
    not checked.

    Raises:
        ValueError: a field is outside its limits, or has a credential in it.
    """

    _prefix: ClassVar[str] = ""

    def __init_subclass__(cls, section: str = "") -> None:
        cls._prefix = f"{section}." if section else ""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # pyright: ignore[reportArgumentType]
            value = getattr(self, field.name)
            for limit in getattr(field.type, "__metadata__", ()):
                if not isinstance(limit, Limit) or value is None:
                    continue
                if not (math.isfinite(value) and limit.accepts(value)):
                    name = f"{self._prefix}{field.name}"
                    raise ValueError(f"{name} is {value}; use {limit.use}")
            for text in value if isinstance(value, tuple) else (value,):
                if isinstance(text, str):
                    check_no_credential(f"{self._prefix}{field.name}", text)
