"""No file of the package reads what could run code, but from its own processes."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ("cavmae", "trainer", "kernels", "dataloaders", "cluster")
OWN_PIPES = {"dataloaders/process_pool.py": ["pickle.loads"]}
"""Where bytes come from a process that this one has started."""
SAFE_LOADERS = {"cluster/experiments/yaml_file.py": ["yaml.load"]}
"""Where the loader is a subclass of SafeLoader."""


def unsafe_reads(source: str) -> Iterator[str]:
    """Calls that may run code which a file names."""
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        name = ast.unparse(call.func)
        given = {word.arg: ast.unparse(word.value) for word in call.keywords}
        if name in ("torch.load", "torch.serialization.load"):
            unsafe = given.get("weights_only") != "True"
        elif name in ("np.load", "numpy.load"):
            unsafe = given.get("allow_pickle", "False") != "False"
        else:
            unsafe = name in (
                "eval",
                "exec",
                "torch.jit.load",
                "torch.package.PackageImporter",
            ) or (
                name.split(".")[0]
                in ("pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve")
                and name.split(".")[-1] in ("load", "loads", "Unpickler", "open")
            )
            unsafe |= name.startswith("yaml.") and "load" in name and name != "yaml.safe_load"
        if unsafe:
            yield name


def test_only_data_is_read_from_files() -> None:
    found = {}
    for folder in PACKAGE:
        for path in (ROOT / folder).rglob("*.py"):
            if names := list(unsafe_reads(path.read_text())):
                found[str(path.relative_to(ROOT))] = names
    assert found == OWN_PIPES | SAFE_LOADERS


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "pickle.loads(data)",
        "yaml.load(text, yaml.Loader)",
        "yaml.unsafe_load(text)",
    ],
)
def test_an_unsafe_read_is_found(source: str) -> None:
    assert list(unsafe_reads(source))
