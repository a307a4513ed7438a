"""Options and fixtures that several folders of tests share.

Golden tests are made from the index files of the folder that `--golden` names, so they run on any
folder of that format; a part that a folder lacks is skipped by name.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# Without a GPU the interpreter runs the kernels; Triton looks when they are imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from cavmae.benchmarks.conformance.cases import read_json
from cavmae.benchmarks.conformance.finetune import FinetuneCase
from cavmae.benchmarks.conformance.forward import ForwardCase
from cavmae.benchmarks.conformance.tiny_train import TinyTrain
from cavmae.benchmarks.conformance.tolerances import Deviation, worst
from cavmae.dataloaders.packing.pack import PackConfig, pack
from cavmae.dataloaders.tools.synthetic import generate
from cavmae.trainer.model.cavmae import CAVMAE

REPOSITORY = Path(__file__).parents[1]
SHARED = REPOSITORY.parent / "shared"
EXCERPT = REPOSITORY / "tests" / "golden" / "data"

# Parts of a golden folder that no test compares yet, and why; named in every summary.
NOT_COMPARED = {
    "published_curves": "transcribed logs; only their learning rates are compared",
    "deviations.json": "where the tolerances come from, nothing to compute",
}

# The files that take longest: begun first, they don't keep one process at work when the other has
# nothing left.
LONG_FILES = (
    "cluster/local/test_demo.py",
    "cluster/test_elastic.py",
    "trainer/distributed/test_engine.py",
    "trainer/test_resume.py",
    "trainer/test_launchers.py",
    "golden/test_pretrain_forward.py",
    "golden/test_finetune.py",
    "cluster/test_train.py",
    "cluster/experiments/test_queue.py",
    "cluster/experiments/test_sweep.py",
    "golden/test_gradients.py",
    "benchmarks/gpu/test_check.py",
    "benchmarks/faults/test_faults.py",
    "benchmarks/training/test_train.py",
    "kernels/test_compile_ahead.py",
    "benchmarks/data/test_storage_faults.py",
    "trainer/cost_model/test_comm_volume.py",
    "trainer/tasks/test_finetune.py",
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


def _golden_parameters(folder: Path) -> dict[str, tuple[str, dict[str, Any]]]:
    """For each parameter of the golden tests: the file it comes from, and values by test id."""
    forward = {case.name: case for case in ForwardCase.all(folder)}
    finetune = {case.name: case for case in FinetuneCase.all(folder)}
    return {
        "forward_case": ("pretrain_forward/index.json", forward),
        "gradient_case": (
            "pretrain_forward/*_grad.json",
            {name: case for name, case in forward.items() if case.has_gradients},
        ),
        "weights_check": (
            "pretrain_forward/weights_*_check.json",
            _files(folder, "pretrain_forward/weights_*_check.json"),
        ),
        "tiny_run": ("tiny_train/*.json", {name: name for name in TinyTrain.names(folder)}),
        "contrastive_entry": (
            "contrastive.json",
            {f"seed{e['seed']}_batch{e['batch']}": e for e in _list(folder / "contrastive.json")},
        ),
        "retrieval_entry": (
            "retrieval_metrics.json",
            {
                e.get("matrix", f"{number}_seed{e.get('seed', '_none')}"): e
                for number, e in enumerate(_list(folder / "retrieval_metrics.json"))
            },
        ),
        "patchify_file": ("patchify*.npz", _files(folder, "patchify*.npz")),
        "position_file": ("pos_embed_T*.npz", _files(folder, "pos_embed_T*.npz")),
        "mapping_file": ("adapt_mae/mapping_*.json", _files(folder, "adapt_mae/mapping_*.json")),
        "finetune_case": ("finetune_forward/index.json", finetune),
        "finetune_gradient_case": (
            "finetune_forward/*_grad.json",
            {name: case for name, case in finetune.items() if case.has_gradients},
        ),
        "finetune_shapes_case": (
            "finetune_forward/*_shapes.json",
            {name: case for name, case in finetune.items() if case.shapes_file.exists()},
        ),
        "finetune_run": (
            "finetune_forward/tiny_train_*.json",
            _files(folder, "finetune_forward/tiny_train_*.json"),
        ),
        "classification_entry": (
            "classification_metrics.json",
            {
                f"seed{e['seed']}_{e['K']}_classes" if "K" in e else f"seed{e['seed']}_single": e
                for e in _list(folder / "classification_metrics.json")
            },
        ),
    }


def _files(folder: Path, pattern: str) -> dict[str, Path]:
    return {path.stem: path for path in sorted(folder.glob(pattern))}


def _list(path: Path) -> list[dict[str, Any]]:
    return read_json(path) if path.exists() else []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {REPOSITORY / "tests" / file: place for place, file in enumerate(LONG_FILES)}
    items.sort(key=lambda item: places.get(item.path, len(places)))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    folder = metafunc.config.option.golden
    for argument, (source, values) in _golden_parameters(folder).items():
        if argument not in metafunc.fixturenames:
            continue
        absent = pytest.mark.skip(reason=f"{folder} has no {source}")
        cases = [pytest.param(value, id=name) for name, value in values.items()]
        metafunc.parametrize(argument, cases or [pytest.param(None, marks=absent, id="absent")])


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


@pytest.fixture(scope="module")
def golden_model() -> Iterator[Callable[[ForwardCase], CAVMAE]]:
    """Builds the model of a case; cases that share weights share the model."""
    models: dict[Any, CAVMAE] = {}

    def model(case: ForwardCase) -> CAVMAE:
        if case.weights not in models:
            models.clear()  # a base model has 0.8 GB: keep one
            models[case.weights] = case.build()
        return models[case.weights]

    yield model
    models.clear()


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
    terminalreporter.section("golden deviations")
    terminalreporter.line(f"folder {config.option.golden}; nearest to its limit in each case:")
    for case, nearest, value, count in noted:
        if value:
            terminalreporter.line(f"{case}: {nearest}; {count} compared")
    equal = sum(value == 0 for _, _, value, _ in noted)
    terminalreporter.line(f"{equal} more cases are equal in every value compared")
    for part, reason in NOT_COMPARED.items():
        if (config.option.golden / part).exists():
            terminalreporter.line(f"not compared: {part} ({reason})")


@pytest.fixture(scope="session")
def packed_synthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 synthetic clips (64 px, 2 s, 8 fps) in both tiers, 3 shards of 8: the OUT folder."""
    folder = tmp_path_factory.mktemp("packed_synthetic")
    listing = generate(folder / "videos", 24, seed=1, workers=1)
    out = folder / "shards"
    pack(PackConfig(str(listing), str(out), clips_per_shard=8, workers=1))
    return out


@pytest.fixture(scope="session")
def val_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 other synthetic clips in the tier of frames: the OUT folder."""
    folder = tmp_path_factory.mktemp("held_out")
    listing = generate(folder / "others", 8, seed=2, start_index=100, seconds=2.0, workers=1)
    pack(PackConfig(str(listing), str(folder / "shards"), tiers="frames", workers=1))
    return folder / "shards"
