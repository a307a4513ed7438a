"""`cavmae bench memory` says by how much what is counted differs from what processes take."""

from pathlib import Path
from typing import Any

import pytest

from cavmae.benchmarks.training import memory
from cavmae.benchmarks.training.memory import Case, config_of
from cavmae.trainer.cost_model.memory import footprint, model_sizes

CASE: Case = ("demo", 3, "fp32", 1, 4, 1)
BEFORE_BYTES = 700


def test_the_ratio_is_what_is_said_to_the_most_that_a_step_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(CASE)
    said = footprint(config, model_sizes(config), 3, gpu=False)
    assert said.clips > 0
    expected = said.tensors + said.kept - said.clips
    added = [expected // 4, 2 * expected, expected // 2]

    def measured(*_: Any) -> dict[str, Any]:
        return {"before_bytes": BEFORE_BYTES, "peak_bytes": [BEFORE_BYTES + one for one in added]}

    monkeypatch.setattr(memory, "_measured", measured)
    row = memory._row(CASE, tmp_path)  # pyright: ignore[reportPrivateUsage]
    assert row["measured_bytes"] == added
    assert row["said_bytes"] == expected
    assert row["ratio"] == pytest.approx(0.5, rel=1e-6)
