"""config.json comes back as it was saved or not at all; run.json is never half written."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Literal

import pytest

from cavmae.trainer.config.configs import LossConfig, PretrainConfig
from cavmae.trainer.config.serialize import load_config, save_config
from cavmae.trainer.model.config import ModelConfig
from cavmae.trainer.tracking import code_snapshot
from cavmae.trainer.tracking.code_snapshot import git_commit, save_code

ROOT = Path(__file__).parents[3]


@dataclasses.dataclass(frozen=True)
class Inner:
    sizes: tuple[int, ...] = (1, 2)
    pair: tuple[str, float] = ("a", 0.5)


@dataclasses.dataclass(frozen=True)
class Outer:
    name: Literal["one", "two"] = "one"
    limit: float | None = None
    inner: Inner = dataclasses.field(default_factory=Inner)


def edit(path: Path, change: dict[str, object], *, section: str | None = None) -> None:
    document = json.loads(path.read_text())
    (document[section] if section else document).update(change)
    path.write_text(json.dumps(document))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_config(PretrainConfig(), tmp_path / "config.json")
    return tmp_path / "config.json"


def test_a_pretraining_configuration_comes_back_equal(tmp_path: Path) -> None:
    config = PretrainConfig(
        steps=7,
        deterministic=True,
        model=ModelConfig(width=96, heads=3),
        loss=LossConfig(bidirectional=True, temperature=0.1 + 0.2),
    )
    save_config(config, tmp_path / "config.json")
    assert load_config(tmp_path / "config.json", PretrainConfig) == config


@pytest.mark.parametrize("config", [Outer(), Outer("two", 3.0, Inner((), ("b", 2.0)))])
def test_tuples_literals_and_optional_values_come_back_equal(config: Outer, tmp_path: Path) -> None:
    save_config(config, tmp_path / "config.json")
    assert load_config(tmp_path / "config.json", Outer) == config


def test_an_unknown_field_is_named_in_full(saved: Path) -> None:
    edit(saved, {"heat": 1}, section="loss")
    with pytest.raises(ValueError, match=re.escape("unknown field loss.heat")):
        load_config(saved, PretrainConfig)


def test_a_missing_field_is_named_in_full(saved: Path) -> None:
    document = json.loads(saved.read_text())
    del document["optimizer"]["beta1"]
    saved.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=re.escape("optimizer.beta1 is missing")):
        load_config(saved, PretrainConfig)


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        (None, {"steps": "7"}, "field steps is '7'; expected int"),
        (None, {"steps": 7.0}, "field steps is 7.0; expected int"),
        (None, {"steps": True}, "field steps is True; expected int"),
        (None, {"deterministic": 1}, "field deterministic is 1; expected bool"),
        (None, {"model": 3}, "field model is 3; expected ModelConfig"),
        ("loss", {"temperature": None}, "field loss.temperature is None; expected float"),
        ("engine", {"zero_stage": 4}, "field engine.zero_stage is 4; expected typing.Literal"),
        ("engine", {"zero_stage": True}, "field engine.zero_stage is True; expected"),
        ("engine", {"dtype": "fp8"}, "field engine.dtype is 'fp8'; expected"),
    ],
)
def test_a_value_of_another_type_is_named_with_what_was_expected(
    saved: Path, section: str | None, change: dict[str, object], message: str
) -> None:
    edit(saved, change, section=section)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_config(saved, PretrainConfig)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sizes": [1, "2"]}, "field inner.sizes[1] is '2'; expected int"),
        ({"pair": ["a"]}, "field inner.pair is ['a']; expected tuple[str, float]"),
    ],
)
def test_a_wrong_item_of_a_tuple_is_named(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    save_config(Outer(), tmp_path / "config.json")
    edit(tmp_path / "config.json", change, section="inner")
    with pytest.raises(ValueError, match=re.escape(message)):
        load_config(tmp_path / "config.json", Outer)


def test_a_whole_number_is_accepted_where_a_float_is_declared(saved: Path) -> None:
    edit(saved, {"epochs": 3})
    epochs = load_config(saved, PretrainConfig).epochs
    assert epochs == 3.0 and isinstance(epochs, float)


def test_what_the_dataclass_refuses_is_refused_on_reading(saved: Path) -> None:
    edit(saved, {"temperature": -1.0}, section="loss")
    with pytest.raises(ValueError, match=re.escape("loss.temperature is -1.0")):
        load_config(saved, PretrainConfig)


@pytest.mark.parametrize(("text", "message"), [("{", "is not JSON"), ("[1]", "holds a list")])
def test_a_damaged_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=f"config.json {message}"):
        load_config(tmp_path / "config.json", PretrainConfig)


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_a_run_folder_keeps_each_version_of_the_code_once(tmp_path: Path) -> None:
    code = save_code(tmp_path)
    assert save_code(tmp_path) == code, "no times or owners in it"
    (kept,) = (tmp_path / "code").iterdir()
    with tarfile.open(kept) as archive:
        names = archive.getnames()
        file = archive.extractfile("cavmae/trainer/tracking/code_snapshot.py")
        assert file and file.read() == Path(code_snapshot.__file__).read_bytes()
    assert {"cavmae/cli.py", "cavmae/kernels/similarity/tiles.py"} <= set(names)
    assert not [name for name in names if "tests" in name or ".venv" in name]


def test_git_commit_is_that_of_the_checkout_of_the_code(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    head = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True).strip()
    commit = git_commit()
    assert commit is not None and commit.removesuffix("-dirty") == head


def test_git_commit_tells_clean_changed_and_untracked_copies_apart(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True)

    def commit_of_copy() -> str:
        code = "import code_snapshot; print(code_snapshot.git_commit())"
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.check_output(
            [sys.executable, "-c", code], cwd=tmp_path, env=environment, text=True
        )

    copy = tmp_path / "code_snapshot.py"
    shutil.copy(ROOT / "trainer/tracking/code_snapshot.py", copy)
    git("init", "--quiet")
    git("commit", "--quiet", "--allow-empty", "-m", "empty")
    assert commit_of_copy() == "None\n"
    git("add", "code_snapshot.py")
    git("commit", "--quiet", "-m", "code")
    assert re.fullmatch(r"[0-9a-f]{40}\n", commit_of_copy())
    copy.write_text(copy.read_text() + "\n")
    assert re.fullmatch(r"[0-9a-f]{40}-dirty\n", commit_of_copy())
