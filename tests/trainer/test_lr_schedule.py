"""The learning rate at every step."""

import pytest

from cavmae.trainer.config.configs import ScheduleConfig
from cavmae.trainer.lr_schedule import learning_rate


def rate(config: ScheduleConfig, step: int, steps: int = 2500) -> float:
    return learning_rate(config, 5e-5, step=step, steps=steps, steps_per_epoch=100.0)


@pytest.mark.parametrize(
    ("epoch", "expected"), [(1, 5e-5), (10, 5e-5), (11, 2.5e-5), (16, 1.25e-5), (25, 6.25e-6)]
)
def test_step_schedule_is_the_published_one(epoch: int, expected: float) -> None:
    # The published log: 5e-5 until epoch 10 is finished, then half of it every 5 epochs.
    for step in (100 * (epoch - 1), 100 * epoch - 1):
        assert rate(ScheduleConfig(name="step"), step) == pytest.approx(expected)


def test_warm_up_rises_linearly_to_the_peak() -> None:
    config = ScheduleConfig(name="constant", warmup_steps=4)
    assert [rate(config, step) / 5e-5 for step in range(6)] == pytest.approx(
        [0.25, 0.5, 0.75, 1, 1, 1]
    )


def test_cosine_falls_from_the_peak_to_the_final_share() -> None:
    config = ScheduleConfig(name="cosine", warmup_steps=10, min_lr_ratio=0.1)
    assert rate(config, 10, 111) == pytest.approx(5e-5)
    assert rate(config, 60, 111) == pytest.approx(5e-5 * 0.55)
    assert rate(config, 110, 111) == pytest.approx(5e-6)
