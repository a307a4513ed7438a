"""The fixed position tables."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cavmae.benchmarks.conformance.tolerances import LIMITS, Deviation, array_deviation
from cavmae.trainer.model.pos_embed import position_table

pytestmark = pytest.mark.golden


def test_position_tables_are_the_published_ones(
    position_file: Path, check_deviations_of: Callable[[list[Deviation]], None]
) -> None:
    audio_columns = int(position_file.stem.partition("_T")[2]) // 16
    with np.load(position_file) as arrays:
        files = dict(arrays)
    deviations = []
    for name, expected in files.items():
        tokens, channels = expected.shape
        side = round(tokens**0.5)
        grid = (tokens // audio_columns, audio_columns) if name.endswith("_a") else (side, side)
        table = position_table(8 * channels, grid)[0, :, ::8]
        deviations.append(array_deviation(name, table, expected, LIMITS.position))
    check_deviations_of(deviations)
