"""However the code is started, the code of that tree runs, and each file is one module.

Another tree is always installed (editable) in the interpreter that runs a tree, so that running a
stale copy would be seen.
"""

import io
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("benchmarks", "cluster", "dataloaders", "kernels", "trainer")
SITE_PACKAGES = sysconfig.get_path("purelib")

# Prints where the package and a module behind a link come from, and their markers.
SHOW_TREE = """
import os
import cavmae, cavmae.trainer.config.configs
for module in (cavmae, cavmae.trainer.config.configs):
    print(os.path.realpath(module.__file__), module.MARKER)
"""

pytestmark = pytest.mark.skipif(
    not (ROOT / ".git").exists(), reason="not a git checkout: `git archive` needs one"
)


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Standard output of a command that must succeed."""
    result = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={"PATH": os.environ["PATH"], "HOME": str(cwd), **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def unpack(folder: Path, marker: str) -> Path:
    """`git archive HEAD` unpacked into `folder`, with a marker in two of its modules."""
    archive = subprocess.run(
        ["git", "archive", "HEAD"], cwd=ROOT, capture_output=True, check=True
    ).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")
    for file in ("cavmae/__init__.py", "trainer/config/configs.py"):
        with (folder / file).open("a") as module:
            module.write(f"\nMARKER = {marker!r}\n")
    return folder


def modules_of(tree: Path) -> set[str]:
    """Dotted names of every module of a tree."""
    paths = [path.relative_to(tree) for path in (tree / "cavmae").glob("*.py")]
    for folder in FOLDERS:
        paths += [Path("cavmae") / path.relative_to(tree) for path in (tree / folder).rglob("*.py")]
    return {
        ".".join(path.with_suffix("").parts).removesuffix(".__init__")
        for path in paths
        if "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def installed_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack(tmp_path_factory.mktemp("installed_tree"), "installed")


@pytest.fixture(scope="module")
def unpacked_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack(tmp_path_factory.mktemp("unpacked_tree"), "unpacked")


@pytest.fixture(scope="module")
def python(installed_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with this one's libraries and an editable install of `installed_tree`."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    python = folder / "bin" / "python"
    site = run(
        python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder
    ).strip()
    (Path(site) / "libraries.pth").write_text(SITE_PACKAGES + "\n")
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index")
    run(python, "-m", "pip", "install", *options, "-e", installed_tree, cwd=folder)
    return python


@pytest.fixture(scope="module")
def wheel(unpacked_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(
        *(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder),
        unpacked_tree,
        cwd=folder,
    )
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed_wheel(python: Path, wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed_wheel") / "target"
    options = ("--quiet", "--no-deps", "--no-index", "--target", target)
    run(python, "-m", "pip", "install", *options, wheel, cwd=target.parent)
    return target


def test_an_editable_install_runs_the_tree_it_was_made_from(
    python: Path, installed_tree: Path, tmp_path: Path
) -> None:
    assert run(python, "-c", SHOW_TREE, cwd=tmp_path).splitlines() == [
        f"{installed_tree}/cavmae/__init__.py installed",
        f"{installed_tree}/trainer/config/configs.py installed",
    ]


def test_an_unpacked_archive_runs_its_own_code_beside_an_editable_install_of_another_tree(
    python: Path, unpacked_tree: Path
) -> None:
    assert run(python, "-c", SHOW_TREE, cwd=unpacked_tree).splitlines() == [
        f"{unpacked_tree}/cavmae/__init__.py unpacked",
        f"{unpacked_tree}/trainer/config/configs.py unpacked",
    ]
    assert run(python, "-m", "cavmae", "--version", cwd=unpacked_tree).startswith("cavmae ")


def test_a_wheel_runs_its_own_code_beside_an_editable_install_of_another_tree(
    python: Path, installed_wheel: Path, tmp_path: Path
) -> None:
    shown = run(python, "-c", SHOW_TREE, cwd=tmp_path, PYTHONPATH=str(installed_wheel))
    assert shown.splitlines() == [
        f"{installed_wheel}/cavmae/__init__.py unpacked",
        f"{installed_wheel}/cavmae/trainer/config/configs.py unpacked",
    ]


def test_a_wheel_holds_every_module_and_nothing_under_a_bare_name(
    wheel: Path, unpacked_tree: Path
) -> None:
    files = [Path(name) for name in zipfile.ZipFile(wheel).namelist()]
    modules = {
        ".".join(file.with_suffix("").parts).removesuffix(".__init__")
        for file in files
        if file.suffix == ".py"
    }
    assert modules == modules_of(unpacked_tree)
    assert {file.parts[0] for file in files if ".dist-info" not in file.parts[0]} == {"cavmae"}


def test_a_wheel_holds_the_templates_the_ablations_and_the_guard_of_the_fake_device(
    wheel: Path, unpacked_tree: Path
) -> None:
    data = {Path(name) for name in zipfile.ZipFile(wheel).namelist()}
    assert Path("cavmae/benchmarks/fake_cuda/guard.cpp") in data
    expected = {
        Path("cavmae") / path.relative_to(unpacked_tree)
        for path in (unpacked_tree / "cluster").rglob("*")
        if path.suffix in (".yaml", ".sh")
    }
    assert len(expected) > 5 and expected <= data


def test_an_installed_wheel_does_not_answer_to_bare_folder_names(
    installed_wheel: Path, tmp_path: Path
) -> None:
    code = (
        "import importlib.util, sys; sys.path.insert(0, sys.argv[1]);"
        "import cavmae.trainer.config.configs;"
        f"print([name for name in {FOLDERS} if importlib.util.find_spec(name)])"
    )
    # -I -S: neither this folder, nor the environment, nor site-packages
    assert run(sys.executable, "-I", "-S", "-c", code, installed_wheel, cwd=tmp_path) == "[]\n"


def test_a_file_is_one_module_object() -> None:
    code = f"""
import importlib, os, pkgutil, sys
import cavmae
for module in pkgutil.walk_packages(cavmae.__path__, "cavmae."):
    if module.ispkg or module.name.endswith(".config"):
        importlib.import_module(module.name)
names = {{}}
for name, module in list(sys.modules.items()):
    file = os.path.relpath(os.path.realpath(getattr(module, "__file__", None) or "/"))
    if file.split(os.sep)[0] in {("cavmae", *FOLDERS)}:
        names.setdefault(file, []).append(name)
print(len(names), [n for n in names.values() if len(n) > 1 or not n[0].startswith("cavmae")])
"""
    count, doubles = run(sys.executable, "-c", code, cwd=ROOT).split(maxsplit=1)
    assert int(count) >= 10
    assert doubles == "[]\n"


@pytest.mark.slow
def test_a_ray_working_dir_runs_its_own_code_beside_an_editable_install_of_another_tree(
    python: Path, unpacked_tree: Path, tmp_path: Path
) -> None:
    code = f"""
import ray
ray.init(
    "local", num_cpus=1, include_dashboard=False, _node_ip_address="127.0.0.1",
    runtime_env={{"working_dir": {str(unpacked_tree)!r}}},
)
@ray.remote
def show_tree():
    import os
    import cavmae, cavmae.kernels, cavmae.trainer.config.configs
    modules = (cavmae, cavmae.trainer.config.configs)
    return [(os.path.realpath(m.__file__), m.MARKER) for m in modules]
for file, marker in ray.get(show_tree.remote()):
    print(file, marker)
ray.shutdown()
"""
    lines = run(
        python, "-c", code, cwd=tmp_path, RAY_AUTH_MODE="token", RAY_USAGE_STATS_ENABLED="0"
    )
    files, markers = zip(*(line.rsplit(" ", 1) for line in lines.splitlines()), strict=True)
    assert markers == ("unpacked", "unpacked")
    assert all("working_dir_files" in file for file in files), files
