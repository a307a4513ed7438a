"""What the options of several benchmarks have in common: their limits, and durations."""

import re

_UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600}


def check_least(options: object, **least: float) -> None:
    """Refuse options below the smallest value that makes sense.

    Raises:
        ValueError: names the option, its value and that limit.
    """
    for name, limit in least.items():
        if getattr(options, name) < limit:
            raise ValueError(f"{name} is {getattr(options, name)}; use {limit} or more")


def check_positive(options: object, *names: str) -> None:
    """Refuse options that are not above 0.

    Raises:
        ValueError: names the option and its value.
    """
    for name in names:
        if getattr(options, name) <= 0:
            raise ValueError(f"{name} is {getattr(options, name)}; use a number above 0")


def budget_seconds(text: str) -> float:
    """Convert a duration such as 90s, 10m or 2h to seconds.

    Raises:
        ValueError: not a duration above 0.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if not found or float(found[1]) <= 0:
        raise ValueError(f"budget is {text}; use a time such as 90s, 10m or 2h")
    return float(found[1]) * _UNIT_SECONDS[found[2]]
