"""Models as folders that others load, on a disk or at the Hugging Face Hub: `model.safetensors`,
`config.json` and a card.

The models themselves run where only torch and triton are installed; these are the same ones with
`from_pretrained`, `save_pretrained` and `push_to_hub`. Weights are read from safetensors alone, a
format that holds no code, and every tensor has to fit.
"""

from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import ModelCard, ModelHubMixin, hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from cavmae.atomic_write import atomic_write
from cavmae.trainer.config.serialize import load_config, save_config
from cavmae.trainer.model.cavmae import CAVMAE
from cavmae.trainer.model.classifier import CAVMAEClassifier
from cavmae.trainer.model.weights import load_classifier_weights, load_published
from cavmae.trainer.release.model_card import model_card
from cavmae.trainer.release.model_spec import ModelSpec


class _HubFolder(ModelHubMixin):
    """How both models are written and read.

    `from_pretrained` takes a folder or the name of a repository, and beside it only what
    `huggingface_hub.hf_hub_download` knows, such as `revision`. The model comes on the CPU, set to
    evaluate.
    """

    description: ModelSpec

    def _save_pretrained(self, save_directory: Path) -> None:
        assert isinstance(self, torch.nn.Module)
        # `save_file` would make a file that only its owner can read.
        content = save(self.state_dict(), {"format": "pt"})
        with atomic_write(save_directory / "model.safetensors") as temporary:
            temporary.write_bytes(content)
        save_config(self.description, save_directory / "config.json")

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The card without what a run would tell; `cavmae export` writes that one first."""
        return model_card(self.description)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **fetching: Any) -> Self:
        config, weights = (
            Path(model_id) / name
            if Path(model_id).is_dir()
            else hf_hub_download(model_id, name, **fetching)
            for name in ("config.json", "model.safetensors")
        )
        model = cls(load_config(config, ModelSpec))
        assert isinstance(model, CAVMAE | CAVMAEClassifier)
        try:
            state = load_file(weights)
        except SafetensorError as error:
            raise ValueError(
                f"{weights} cannot be read as safetensors: {error}; copy or download it again"
            ) from error
        if isinstance(model, CAVMAE):
            load_published(model, state)
        elif missing := load_classifier_weights(model, state):
            raise ValueError(f"{weights} lacks {', '.join(missing)}; export the classifier again")
        model.eval()
        return model


class HubCAVMAE(_HubFolder, CAVMAE):
    """The pretraining model with `from_pretrained`, `save_pretrained` and `push_to_hub`.

    Args:
        description: its sizes and how its input is made.

    Raises:
        ValueError: the description is a classifier's.
    """

    def __init__(self, description: ModelSpec) -> None:
        if description.classes:
            raise ValueError(
                f"classes is {description.classes}: this is a classifier; use HubCAVMAEClassifier"
            )
        super().__init__(description.model)
        self.description = description


class HubCAVMAEClassifier(_HubFolder, CAVMAEClassifier):
    """The fine-tuning model with `from_pretrained`, `save_pretrained` and `push_to_hub`.

    Args:
        description: its sizes and how its input is made.

    Raises:
        ValueError: the description is a pretraining model's.
    """

    def __init__(self, description: ModelSpec) -> None:
        if not description.classes:
            raise ValueError("classes is 0: this is a pretraining model; use HubCAVMAE")
        super().__init__(description.model, description.classes, video=description.video)
        self.description = description


def hub_model(
    model: CAVMAE | CAVMAEClassifier, description: ModelSpec
) -> HubCAVMAE | HubCAVMAEClassifier:
    """A model as one that can be saved and pushed; it shares the tensors of `model`.

    Args:
        model: any.
        description: of it.
    """
    kind = HubCAVMAEClassifier if isinstance(model, CAVMAEClassifier) else HubCAVMAE
    with torch.device("meta"):
        hub = kind(description)
    hub.load_state_dict(model.state_dict(), assign=True)
    return hub.eval()
