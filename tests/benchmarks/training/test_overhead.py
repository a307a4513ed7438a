"""`cavmae bench overhead` compares starts that followed each other, by the means of their steps."""

import pytest

from cavmae.benchmarks.training import overhead


def test_a_start_is_compared_with_the_plain_one_beside_it() -> None:
    results = overhead.summarize(
        {
            "deepspeed": [[1.0, 1.0], [2.0, 2.0], [1.0, 3.0]],
            "ray": [[1.1, 1.1], [2.0, 2.0], [2.0, 2.2]],
            "deepspeed with checkpoints": [[1.0, 1.5], [2.0, 3.0], [2.0, 3.0]],
        }
    )
    assert "longer_by" not in results["deepspeed"]
    assert results["ray"]["longer_by"] == pytest.approx(
        {"median": 0.05, "minimum": 0.0, "maximum": 0.1}
    )
    assert results["deepspeed with checkpoints"]["longer_by"] == pytest.approx(
        {"median": 0.25, "minimum": 0.25, "maximum": 0.25}
    )
    assert results["ray"]["mean_seconds"] == pytest.approx([1.1, 2.0, 2.1])


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="steps is 50; use 80 or more"):
        overhead.OverheadConfig(steps=50)
