"""Which share of a run's time is training that lasts, where GPUs fail now and then.

Source: Daly, A higher order estimate of the optimum checkpoint interval for restart dumps, 2006:
failures come at random with a constant rate, also while a run starts again.
"""

import math
from dataclasses import dataclass

LLAMA_3_GPU_SECONDS_PER_FAILURE = 16_384 * 54 * 86_400 / 419
"""Grattafiori et al., The Llama 3 Herd of Models, 2024, section 3.3.4: 419 unexpected interruptions
in 54 days on 16,384 H100. Half a million GPU hours lie between two of them."""


@dataclass(frozen=True)
class Failures:
    """What failures and the guard against them cost.

    Attributes:
        seconds_between: mean time between two failures of the run; inf: none.
        recovery_seconds: from a failure to the next step, without the steps that are done again.
        checkpoint_seconds: that training stands still for a checkpoint.
    """

    seconds_between: float
    recovery_seconds: float
    checkpoint_seconds: float


def goodput(failures: Failures, interval_seconds: float) -> float:
    """Share of the time, 0 to 1, that goes into steps that are not done again.

    Args:
        failures: their rate and costs.
        interval_seconds: of training between two checkpoints.
    """
    between, segment = failures.seconds_between, interval_seconds + failures.checkpoint_seconds
    if math.isinf(between):
        return interval_seconds / segment
    exponent = (failures.recovery_seconds + segment) / between
    if exponent > 700:
        return 0.0  # a run that comes to its next checkpoint once in the age of the universe
    lasting = math.exp(failures.recovery_seconds / between) * math.expm1(segment / between)
    return interval_seconds / (between * lasting)


def best_interval(failures: Failures) -> float:
    """Seconds of training between checkpoints with the highest goodput (Daly, equation 37); inf
    where nothing fails."""
    between, cost = failures.seconds_between, failures.checkpoint_seconds
    if math.isinf(between):
        return math.inf
    if cost >= 2 * between:
        return between
    ratio = cost / (2 * between)
    return math.sqrt(2 * cost * between) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost
