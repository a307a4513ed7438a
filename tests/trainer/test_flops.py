"""Operation counts of the published base model."""

import pytest

from cavmae.trainer.flops import forward_flops, training_flops
from cavmae.trainer.model.config import ModelConfig


def test_base_model_needs_78_gflop_forward_and_three_times_that_to_train() -> None:
    assert forward_flops(ModelConfig()) == pytest.approx(78e9, rel=0.02)
    assert training_flops(ModelConfig()) == 3 * forward_flops(ModelConfig())


def test_fewer_kept_patches_cost_less() -> None:
    half = forward_flops(ModelConfig(), audio_ratio=0.5, video_ratio=0.5)
    assert half > 1.3 * forward_flops(ModelConfig())
