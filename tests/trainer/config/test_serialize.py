"""config.json comes back as it was saved or not at all; run.json is never half written."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Literal

import pytest

from cavmae import __version__
from cavmae.atomic_write import write_json
from cavmae.trainer.config.configs import FinetuneConfig, LossConfig, PretrainConfig, RunConfig
from cavmae.trainer.config.serialize import ADDED, load_config, load_run_config, save_config
from cavmae.trainer.model.config import ModelConfig


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


@pytest.mark.parametrize("config", [PretrainConfig(seed=3), FinetuneConfig(seed=3)])
def test_a_run_of_either_kind_comes_back_equal(config: RunConfig, tmp_path: Path) -> None:
    save_config(config, tmp_path / "config.json")
    assert load_run_config(tmp_path / "config.json") == config


def test_a_run_of_version_0_1_0_is_refused_with_its_commit_and_its_code(saved: Path) -> None:
    document = json.loads(saved.read_text())
    del document["schema"]
    document["loss"]["some_old_field"] = 1
    saved.write_text(json.dumps(document))
    write_json(saved.with_name("run.json"), {"git_commits": [None, "1a2b"], "code": ["c", "d"]})
    with pytest.raises(ValueError) as caught:
        load_run_config(saved)
    assert str(caught.value) == (
        f"{saved} has no schema number, like those of version 0.1.0 of cavmae, commit 1a2b; this "
        f"is version {__version__}, which cannot read it. To resume or evaluate that run, use its "
        f"own code, kept in {saved.parent}/code/d.tar.gz; or start a new run with its weights.pt "
        "as --initial-weights"
    )


def test_a_configuration_of_another_schema_is_refused_without_a_run_beside_it(saved: Path) -> None:
    edit(saved, {"schema": 99})
    message = f"another version (schema 99) of cavmae; this is version {__version__}"
    with pytest.raises(ValueError, match=re.escape(message)):
        load_run_config(saved)


@pytest.mark.parametrize("config", [Outer(), Outer("two", 3.0, Inner((), ("b", 2.0)))])
def test_tuples_literals_and_optional_values_come_back_equal(config: Outer, tmp_path: Path) -> None:
    save_config(config, tmp_path / "config.json")
    assert load_config(tmp_path / "config.json", Outer) == config


@pytest.mark.parametrize("kind", [PretrainConfig, FinetuneConfig])
def test_a_run_of_before_a_field_was_added_does_what_it_did(
    kind: type[RunConfig], tmp_path: Path
) -> None:
    save_config(kind(seed=3), tmp_path / "config.json")
    document = json.loads((tmp_path / "config.json").read_text())
    for name in ADDED:
        section, _, field = name.rpartition(".")
        (document[section] if section else document).pop(field, None)
    assert len(document["model"]) == len(vars(ModelConfig())) - 2
    (tmp_path / "config.json").write_text(json.dumps(document))
    assert load_run_config(tmp_path / "config.json") == kind(seed=3)


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
