"""Durations as options have them."""

import re

_UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600}


def budget_seconds(text: str) -> float:
    """Convert a duration such as 90s, 10m or 2h to seconds.

    Raises:
        ValueError: not a duration above 0.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if not found or float(found[1]) <= 0:
        raise ValueError(f"budget is {text}; use a time such as 90s, 10m or 2h")
    return float(found[1]) * _UNIT_SECONDS[found[2]]
