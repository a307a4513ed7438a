"""Options and fixtures that several folders of tests share.

Golden tests are made from the index files of the folder that `--golden` names, so they run on any
folder of that format; a part that a folder lacks is skipped by name.

Functions import what needs more than torch, triton and numpy: the tests of the kernels run on a GPU
machine that has nothing else.
"""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

# Without a GPU the interpreter runs the kernels; Triton looks when they are imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from cavmae.benchmarks.conformance.tolerances import Deviation, worst

REPOSITORY = Path(__file__).parents[1]
SHARED = REPOSITORY.parent / "shared"
EXCERPT = REPOSITORY / "tests" / "golden" / "data"

# The files that take longest: begun first, they don't keep one process at work when the other has
# nothing left.
LONG_FILES = (
    "cluster/test_elastic.py",
    "cluster/local/test_demo.py",
    "trainer/distributed/test_engine.py",
    "trainer/test_resume.py",
    "trainer/test_launchers.py",
    "golden/test_engine_training.py",
    "golden/test_pretraining.py",
    "cluster/test_train.py",
    "benchmarks/fake_cuda/test_training.py",
    "benchmarks/fake_cuda/test_blocks.py",
    "benchmarks/gpu/test_check.py",
    "benchmarks/faults/test_faults.py",
    "benchmarks/training/test_train.py",
    "kernels/test_compile_ahead.py",
    "trainer/cost_model/test_comm_volume.py",
    "trainer/model/test_cavmae.py",
    "trainer/tasks/test_finetune.py",
    "dataloaders/media/test_timing.py",
    "dataloaders/loading/test_quarantine.py",
    "dataloaders/media/test_field_files.py",
    "trainer/release/test_export.py",
    "trainer/cost_model/test_memory.py",
    "trainer/cost_model/test_activations.py",
    "trainer/fault_tolerance/test_oom.py",
    "dataloaders/packing/test_pack.py",
)

_NOTED = "golden deviations"
"""Among the properties of a test's report, which reach the summary from any process."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden",
        type=Path,
        metavar="DIR",
        help="folder of reference numbers for -m golden (default: ../shared/golden where it "
        "exists, else the excerpt in tests/golden/data)",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.option.golden is None:
        golden = SHARED / "golden"
        config.option.golden = golden if golden.is_dir() else EXCERPT
    elif not config.option.golden.is_dir():
        raise pytest.UsageError(f"--golden: there is no folder {config.option.golden}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    folder = metafunc.config.option.golden
    if not {"tiny_run", "finetune_run", "comparison"} & set(metafunc.fixturenames):
        return
    from cavmae.benchmarks.conformance.parts import PARTS

    for argument, part in (("tiny_run", "tiny_train"), ("finetune_run", "finetune_training")):
        if argument in metafunc.fixturenames:
            paths = sorted(folder.glob(PARTS[part].source))
            cases = [pytest.param(path, id=path.stem) for path in paths]
            metafunc.parametrize(argument, cases or [_absent(metafunc, PARTS[part].source)])
    if "comparison" in metafunc.fixturenames:
        found = []
        for name in vars(metafunc.module)["PARTS"]:
            part = PARTS[name]
            marks = [pytest.mark.slow] if part.slow else []
            cases = part.cases(folder).items()
            found += [
                pytest.param(comparison, id=f"{name}-{case}", marks=marks)
                for case, comparison in cases
            ] or [_absent(metafunc, part.source, name)]
        metafunc.parametrize("comparison", found)


def _absent(metafunc: pytest.Metafunc, source: str, part: str = "absent") -> Any:
    reason = f"{metafunc.config.option.golden} has no {source}"
    return pytest.param(None, id=part, marks=pytest.mark.skip(reason=reason))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {REPOSITORY / "tests" / file: place for place, file in enumerate(LONG_FILES)}
    items.sort(key=lambda item: places.get(item.path, len(places)))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def golden_folder(request: pytest.FixtureRequest) -> Path:
    """Folder of reference numbers."""
    return request.config.option.golden


@pytest.fixture
def check_deviations_of(request: pytest.FixtureRequest) -> Callable[[list[Deviation]], None]:
    """Note the deviations of this test for the summary, and fail if any is beyond its limit."""

    def check(deviations: list[Deviation]) -> None:
        nearest = worst(deviations)
        noted = (str(nearest), nearest.value, len(deviations))
        request.node.user_properties.append((_NOTED, noted))
        beyond = [str(deviation) for deviation in deviations if not deviation.within]
        listed = "\n  ".join(beyond[:20])
        assert not beyond, f"{len(beyond)} of {len(deviations)} beyond their limit:\n  {listed}"

    return check


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    noted: list[tuple[str, str, float, int]] = []
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport) and report.when == "call":
                properties: list[tuple[str, Any]] = report.user_properties
                case = report.nodeid.rpartition("/")[2]
                noted += [(case, *value) for name, value in properties if name == _NOTED]
    if not noted:
        return
    from cavmae.benchmarks.conformance.parts import not_compared

    terminalreporter.section("golden deviations")
    terminalreporter.line(f"folder {config.option.golden}; nearest to its limit in each case:")
    for case, nearest, value, count in noted:
        if value:
            terminalreporter.line(f"{case}: {nearest}; {count} compared")
    equal = sum(value == 0 for _, _, value, _ in noted)
    terminalreporter.line(f"{equal} more cases are equal in every value compared")
    for part, reason in not_compared(config.option.golden).items():
        terminalreporter.line(f"not compared: {part} ({reason})")


@pytest.fixture(autouse=True)
def forked_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes of a pool are forks, which have what they import."""
    import pool_forks

    pool_forks.server()
    monkeypatch.setattr("cavmae.dataloaders.process_pool.subprocess", pool_forks.PoolSubprocess)


@pytest.fixture
def started_pools(forked_pools: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes of a pool are started as they are for users."""
    monkeypatch.setattr("cavmae.dataloaders.process_pool.subprocess", subprocess)


@pytest.fixture(scope="session")
def packed_synthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 synthetic clips (64 px, 2 s, 8 fps) in both tiers, 3 shards of 8: the OUT folder. VP9, so
    that DALI's video decoder takes the frames."""
    from cavmae.dataloaders.packing.pack import PackConfig, pack
    from cavmae.dataloaders.tools.synthetic import generate

    folder = tmp_path_factory.mktemp("packed_synthetic")
    listing = generate(folder / "videos", 24, seed=1, workers=1)
    out = folder / "shards"
    pack(PackConfig(str(listing), str(out), video_codec="vp9", clips_per_shard=8, workers=1))
    return out


@pytest.fixture(scope="session")
def val_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 other synthetic clips in the tier of frames: the OUT folder."""
    from cavmae.dataloaders.packing.pack import PackConfig, pack
    from cavmae.dataloaders.tools.synthetic import generate

    folder = tmp_path_factory.mktemp("held_out")
    listing = generate(folder / "others", 8, seed=2, start_index=100, seconds=2.0, workers=1)
    pack(PackConfig(str(listing), str(folder / "shards"), tiers="frames", workers=1))
    return folder / "shards"
