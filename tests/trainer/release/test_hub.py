"""Models saved as folders and loaded again: all of them, and nothing else."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from tiny_models import (
    CLASSIFIER,
    PRETRAINING,
    SOUND_CLASSIFIER,
    random_classifier,
    random_pretraining_model,
)
from unsafe_pickle import save_malicious

from cavmae.trainer.release.hub import HubCAVMAE, HubCAVMAEClassifier, hub_model


@pytest.fixture
def pretrained(tmp_path: Path) -> Path:
    hub_model(random_pretraining_model(), PRETRAINING).save_pretrained(tmp_path / "pretrained")
    return tmp_path / "pretrained"


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    hub_model(random_classifier(), CLASSIFIER).save_pretrained(tmp_path / "classifier")
    return tmp_path / "classifier"


def assert_equal_states(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert not [name for name in found if not torch.equal(found[name], expected[name])]


def test_a_pretraining_model_comes_back_with_its_spec(pretrained: Path) -> None:
    model = random_pretraining_model()
    assert_equal_states(load_file(pretrained / "model.safetensors"), model.state_dict())
    loaded = HubCAVMAE.from_pretrained(pretrained)
    assert_equal_states(loaded.state_dict(), model.state_dict())
    assert not loaded.training
    assert loaded.spec == PRETRAINING


@pytest.mark.parametrize("video", [True, False])
def test_a_classifier_comes_back(tmp_path: Path, video: bool) -> None:
    model = random_classifier(video=video)
    spec = CLASSIFIER if video else SOUND_CLASSIFIER
    hub_model(model, spec).save_pretrained(tmp_path / "out")
    loaded = HubCAVMAEClassifier.from_pretrained(tmp_path / "out")
    assert_equal_states(loaded.state_dict(), model.state_dict())
    assert loaded.spec == spec
    assert loaded.has_video == video


def test_a_loaded_model_can_be_saved_again(pretrained: Path, tmp_path: Path) -> None:
    HubCAVMAE.from_pretrained(pretrained).save_pretrained(tmp_path / "again")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (pretrained / file).read_bytes()


def test_a_repository_of_the_hub_is_loaded_from_its_cache(pretrained: Path, tmp_path: Path) -> None:
    repository, commit = tmp_path / "cache" / "models--somebody--model", "0123456789" * 4
    shutil.copytree(pretrained, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    loaded = HubCAVMAE.from_pretrained(
        "somebody/model", cache_dir=tmp_path / "cache", local_files_only=True
    )
    assert_equal_states(loaded.state_dict(), random_pretraining_model().state_dict())
    assert loaded.revision == commit and HubCAVMAE.from_pretrained(pretrained).revision == ""


def test_the_card_of_a_model_without_its_run_says_that_its_training_is_unknown(
    pretrained: Path,
) -> None:
    card = ModelCard.load(pretrained / "README.md")
    assert card.data.to_dict()["library_name"] == "cavmae"
    assert "Unknown: these weights were saved without their run" in card.text


def test_a_model_of_the_other_kind_is_refused(pretrained: Path, classifier: Path) -> None:
    with pytest.raises(ValueError, match=r"classes is 5.*use HubCAVMAEClassifier"):
        HubCAVMAE.from_pretrained(classifier)
    with pytest.raises(ValueError, match=r"classes is 0.*use HubCAVMAE"):
        HubCAVMAEClassifier.from_pretrained(pretrained)


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    document = json.loads(path.read_text())
    document["model"] |= changes.pop("model", {})  # pyright: ignore[reportOperatorIssue]
    path.write_text(json.dumps(document | changes))


def test_weights_of_another_number_of_classes_are_refused(classifier: Path) -> None:
    change_config(classifier, classes=9)
    with pytest.raises(ValueError, match=r"has 5 classes .* and the model 9"):
        HubCAVMAEClassifier.from_pretrained(classifier)


def test_weights_of_another_architecture_are_refused(pretrained: Path) -> None:
    change_config(pretrained, model={"modality_depth": 2})
    with pytest.raises(ValueError, match=r"missing: blocks_a\.1\..*model\.modality_depth"):
        HubCAVMAE.from_pretrained(pretrained)


def test_a_classifier_without_its_head_is_refused(pretrained: Path) -> None:
    change_config(pretrained, classes=5)
    with pytest.raises(ValueError, match=r"lacks mlp_head\.0\.weight"):
        HubCAVMAEClassifier.from_pretrained(pretrained)


def test_a_pickle_in_place_of_safetensors_is_never_read(pretrained: Path, tmp_path: Path) -> None:
    (pretrained / "model.safetensors").unlink()
    marker = save_malicious(pretrained / "pytorch_model.bin", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        HubCAVMAE.from_pretrained(pretrained)
    shutil.move(pretrained / "pytorch_model.bin", pretrained / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read as a checkpoint"):
        HubCAVMAE.from_pretrained(pretrained)
    assert not marker.exists()
