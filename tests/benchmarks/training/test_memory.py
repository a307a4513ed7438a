"""`cavmae bench memory` compares predicted memory with what processes take."""

from pathlib import Path
from typing import Any

import pytest

from cavmae.benchmarks.training import memory
from cavmae.benchmarks.training.memory import Case, config_of
from cavmae.trainer.cost_model.memory import footprint, model_sizes

CASE: Case = ("demo", 3, "fp32", 1, 4, 1)
BEFORE_BYTES = 700


def test_the_ratio_is_the_prediction_over_the_most_that_a_step_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(CASE)
    predicted = footprint(config, model_sizes(config), 3, gpu=False)
    assert predicted.clips > 0
    expected = predicted.tensors + predicted.heap_slack - predicted.clips
    added = [expected // 4, 2 * expected, expected // 2]

    def measured(*_: Any) -> dict[str, Any]:
        return {"before_bytes": BEFORE_BYTES, "peak_bytes": [BEFORE_BYTES + one for one in added]}

    monkeypatch.setattr(memory, "_measured", measured)
    row = memory._row(CASE, tmp_path)  # pyright: ignore[reportPrivateUsage]
    assert row["measured_bytes"] == added
    assert row["predicted_bytes"] == expected
    assert row["ratio"] == pytest.approx(0.5, rel=1e-6)
