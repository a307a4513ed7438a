"""A score with its interval, as the scores of classification and retrieval have it."""

import math
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Estimate:
    """A score and its 95% interval over clips, not numbers where none was computed."""

    value: float
    low: float
    high: float

    def as_metrics(self, name: str) -> dict[str, float]:
        """Return the finite numbers for a tracker: `name`, `name_low`, ..."""
        return {
            name if key == "value" else f"{name}_{key}": number
            for key, number in asdict(self).items()
            if math.isfinite(number)
        }

    def describe(self, form: str = ".1%") -> str:
        """Format the value and its interval for people."""
        text = format(self.value, form)
        return text if math.isnan(self.low) else f"{text} ({self.low:{form}} to {self.high:{form}})"
