"""Models as folders, local or at the Hugging Face Hub: `model.safetensors`, `config.json`, a card.

The models themselves run where only torch and triton are installed; these subclasses add
`from_pretrained`, `save_pretrained` and `push_to_hub`. Only safetensors are read, a format that
holds no code, and every tensor has to fit.
"""

from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import ModelCard, ModelHubMixin, hf_hub_download
from safetensors.torch import save

from cavmae.atomic_write import write_bytes
from cavmae.trainer.config.serialize import load_config, save_config
from cavmae.trainer.model.cavmae import CAVMAE
from cavmae.trainer.model.classifier import CAVMAEClassifier
from cavmae.trainer.model.weights import load_classifier_weights, load_published
from cavmae.trainer.release.model_card import model_card
from cavmae.trainer.release.model_spec import ModelSpec


class _HubFolder(ModelHubMixin):
    """Saving and loading of both models.

    `from_pretrained` takes a folder or the name of a repository, and the arguments of
    `huggingface_hub.hf_hub_download`, such as `revision`: a branch, a tag or a commit. The model is
    on the CPU, in eval mode.

    Attributes:
        spec: sizes and preprocessing.
        revision: the commit of the repository that the model is from; empty: a folder, or none.
    """

    spec: ModelSpec
    revision = ""

    def _save_pretrained(self, save_directory: Path) -> None:
        assert isinstance(self, torch.nn.Module)
        # `save_file` would write a file that only its owner can read.
        content = save(self.state_dict(), {"format": "pt"})
        write_bytes(save_directory / "model.safetensors", content)
        save_config(self.spec, save_directory / "config.json")

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """Write a card without a run; `cavmae export` has already written one with it."""
        return model_card(self.spec)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **fetching: Any) -> Self:
        folder, revision = Path(model_id), ""
        if not folder.is_dir():
            folder = Path(hf_hub_download(model_id, "config.json", **fetching)).parent
            revision = folder.name
            fetching["revision"] = revision  # a branch may have moved since
            hf_hub_download(model_id, "model.safetensors", **fetching)
        weights = folder / "model.safetensors"
        model = cls(load_config(folder / "config.json", ModelSpec))
        model.revision = revision
        assert isinstance(model, CAVMAE | CAVMAEClassifier)
        if isinstance(model, CAVMAE):
            load_published(model, weights)
        elif missing := load_classifier_weights(model, weights):
            raise ValueError(f"{weights} lacks {', '.join(missing)}; export the classifier again")
        model.eval()
        return model


class HubCAVMAE(_HubFolder, CAVMAE):
    """The pretraining model with `from_pretrained`, `save_pretrained` and `push_to_hub`.

    Args:
        spec: sizes and preprocessing.

    Raises:
        ValueError: the spec is a classifier's.
    """

    def __init__(self, spec: ModelSpec) -> None:
        if spec.classes:
            raise ValueError(
                f"classes is {spec.classes}: this is a classifier; use HubCAVMAEClassifier"
            )
        super().__init__(spec.model)
        self.spec = spec


class HubCAVMAEClassifier(_HubFolder, CAVMAEClassifier):
    """The fine-tuning model with `from_pretrained`, `save_pretrained` and `push_to_hub`.

    Args:
        spec: sizes and preprocessing.

    Raises:
        ValueError: the spec is a pretraining model's.
    """

    def __init__(self, spec: ModelSpec) -> None:
        if not spec.classes:
            raise ValueError("classes is 0: this is a pretraining model; use HubCAVMAE")
        super().__init__(spec.model, spec.classes, video=spec.video)
        self.spec = spec


def hub_model(model: CAVMAE | CAVMAEClassifier, spec: ModelSpec) -> HubCAVMAE | HubCAVMAEClassifier:
    """Convert a model to one that can be saved and pushed; it shares the tensors of `model`."""
    kind = HubCAVMAEClassifier if isinstance(model, CAVMAEClassifier) else HubCAVMAE
    with torch.device("meta"):
        hub = kind(spec)
    hub.load_state_dict(model.state_dict(), assign=True)
    return hub.eval()
