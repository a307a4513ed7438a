"""The golden tests notice a single altered value: the tests of the tests.

Not marked golden, so that the golden runs started here do not start themselves again.
"""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cavmae.benchmarks.conformance.tiny_train import TinyTrain

REPOSITORY = Path(__file__).parents[2]
PARTS = [
    "contrastive.json",
    "patchify.npz",
    "retrieval_metrics.json",
    "classification_metrics.json",
]


def run_golden(folder: Path) -> subprocess.CompletedProcess[str]:
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "golden", "tests/golden"]
    return subprocess.run(
        [sys.executable, *command, f"--golden={folder}"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )


def alter_contrastive(folder: Path) -> None:
    entries = json.loads((folder / "contrastive.json").read_text())
    entries[0]["nce_bidirect"] *= 1.0001
    (folder / "contrastive.json").write_text(json.dumps(entries))


def alter_patches(folder: Path) -> None:
    with np.load(folder / "patchify.npz") as arrays:
        files = dict(arrays)
    files["audio_patches"][0, 1, 17] += 1
    np.savez(folder / "patchify.npz", **files)


def alter_retrieval(folder: Path) -> None:
    entries = json.loads((folder / "retrieval_metrics.json").read_text())
    entries[-1]["rows_query"]["R1"] = 0.75  # what recall without the published ties would be
    (folder / "retrieval_metrics.json").write_text(json.dumps(entries))


def alter_classification(folder: Path) -> None:
    entries = json.loads((folder / "classification_metrics.json").read_text())
    entries[0]["AP"][3] += 1e-9
    (folder / "classification_metrics.json").write_text(json.dumps(entries))


@pytest.fixture
def parts(golden_folder: Path, tmp_path: Path) -> Path:
    for part in PARTS:
        if not (golden_folder / part).exists():
            pytest.skip(f"{golden_folder} has no {part}")
        shutil.copy(golden_folder / part, tmp_path / part)
    entries = json.loads((tmp_path / "retrieval_metrics.json").read_text())
    entries = [entry for entry in entries if "matrix" not in entry]
    (tmp_path / "retrieval_metrics.json").write_text(json.dumps(entries))
    return tmp_path


@pytest.mark.slow
def test_altered_values_fail_their_parts_alone_and_absent_parts_are_skipped_by_name(
    parts: Path,
) -> None:
    """That all pass where nothing is altered, the other files of this folder show."""
    for alter in (alter_contrastive, alter_patches, alter_retrieval, alter_classification):
        alter(parts)
    result = run_golden(parts)
    assert result.returncode == pytest.ExitCode.TESTS_FAILED, result.stdout
    assert re.search(r"\b4 failed, \d+ passed", result.stdout), result.stdout
    assert "golden deviations" in result.stdout
    assert f"{parts} has no tiny_train/*.json" in result.stdout


def test_a_folder_that_does_not_exist_is_refused(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    options = request.config.pluginmanager.get_plugin(str(REPOSITORY / "tests" / "conftest.py"))
    assert options is not None
    given: Any = SimpleNamespace(option=SimpleNamespace(golden=tmp_path / "absent"))
    with pytest.raises(pytest.UsageError, match=f"there is no folder {tmp_path / 'absent'}"):
        options.pytest_configure(given)


def numbers(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all numbers in parsed JSON."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        if isinstance(item, dict | list):
            yield from numbers(item, (*path, key))
        elif isinstance(item, float):
            yield (*path, key)


def altered(value: Any, path: tuple[Any, ...]) -> Any:
    """A copy in which the number at `path` is larger by 0.01 or 1%."""
    if not path:
        return value + 0.01 * max(1.0, abs(value))
    changed = value.copy()
    changed[path[0]] = altered(value[path[0]], path[1:])
    return changed


@pytest.mark.slow
def test_each_altered_number_of_a_training_record_is_noticed(golden_folder: Path) -> None:
    runs = TinyTrain.all(golden_folder)
    if not runs:
        pytest.skip(f"{golden_folder} has no tiny_train/*.json")
    run = runs[0]
    model = run.build()
    history, state = run.train(model), model.state_dict()

    def beyond(record: dict[str, Any]) -> int:
        checked = replace(run, record=record)
        vars(checked)["initial_state"] = run.initial_state
        deviations = checked.check_history(history) + checked.check_final(state)
        return sum(not deviation.within for deviation in deviations)

    record = dict(run.record)
    assert beyond(record) == 0
    kept = ("modality_a", "blocks_u.0.attn.qkv.bias", "norm_a.bias", "pos_embed_v", "norm.weight")
    record["final_parameters"] = {name: record["final_parameters"][name] for name in kept}
    record["unchanged_parameters"] = ["pos_embed_v"]
    parts = ("history", "history_float64", "final_parameters")
    paths = list(numbers({part: record[part] for part in parts}))
    assert len(paths) > 200
    unnoticed = [path for path in paths if beyond(altered(record, path)) == 0]
    assert not unnoticed
