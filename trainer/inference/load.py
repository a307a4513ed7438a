"""`cavmae.load`: opens a trained model from wherever it is."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError

from cavmae.dataloaders.config import DataConfig
from cavmae.trainer.config.configs import FinetuneConfig, PretrainConfig, RunConfig
from cavmae.trainer.config.serialize import load_config
from cavmae.trainer.evaluation.trained_run import AnyRun, open_trained
from cavmae.trainer.inference.model import Model
from cavmae.trainer.model.cavmae import CAVMAE
from cavmae.trainer.model.classifier import CAVMAEClassifier
from cavmae.trainer.model.config import ModelConfig
from cavmae.trainer.model.weights import read_state, sizes_of
from cavmae.trainer.release.export import model_of_state, preprocessing, spec_of, spec_of_run
from cavmae.trainer.release.hub import HubCAVMAE, HubCAVMAEClassifier
from cavmae.trainer.release.model_spec import ModelSpec

Dtype = Literal["float32", "bfloat16", "float16"]
Network = CAVMAE | CAVMAEClassifier


def load(
    source: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: Dtype = "float32",
    batch: int = 16,
    revision: str | None = None,
    sizes: ModelConfig | None = None,
    labels: Sequence[str] = (),
    loss: Literal["bce", "cross_entropy"] = "bce",
    log_mel_mean: float = DataConfig.log_mel_mean,
    log_mel_std: float = DataConfig.log_mel_std,
) -> Model:
    """Load a trained model, with its preprocessing.

    Args:
        source: folder of a finished run; folder that `cavmae export` wrote; name of a repository on
            the Hugging Face Hub, such as `user/model`; or a file of published CAV-MAE weights.
        device: such as `cuda:1`; None: a GPU if there is one.
        dtype: of the weights and of the computation; results are float32.
        batch: windows that are computed together.
        revision: of a repository on the Hub: a branch, a tag or a commit.
        sizes: of a weights file; None: those that its tensors tell, and the published number of
            heads for their width.
        labels: display names of a weights file's classes, in order.
        loss: that a weights file's classifier was trained with; see `Classification.scores`.
        log_mel_mean, log_mel_std: of the data that a weights file was trained on.

    Raises:
        ValueError: the source is none of these, its weights don't fit, or `dtype` or `device` is
            none.
        OSError: a file can't be read, or the Hub not be reached.
    """
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype is {dtype!r}; use float32, bfloat16 or float16")
    path = Path(source)
    if path.is_file():
        data = DataConfig(log_mel_mean=log_mel_mean, log_mel_std=log_mel_std)
        network, spec, config = _open_file(path, sizes, labels, loss, data)
    elif path.is_dir() and not (path / "model.safetensors").is_file():
        return of_run(open_trained(path), device=device, dtype=dtype, batch=batch)
    else:
        network, spec, config = _open_exported(str(source), revision)
    return Model(_placed(network, device, dtype), spec, config, batch)


def of_run(
    run: AnyRun,
    *,
    device: str | torch.device | None = None,
    dtype: Dtype = "float32",
    batch: int = 16,
) -> Model:
    """Load the model of an open run; see `load`."""
    network = run.model(torch.device("cpu"))
    spec = spec_of_run(run, network)
    return Model(_placed(network, device, dtype), spec, run.config, batch)


def _placed(network: Network, device: str | torch.device | None, dtype: Dtype) -> Network:
    try:
        found = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return network.to(found, getattr(torch, dtype)).eval()
    except (RuntimeError, AssertionError) as error:  # torch's for a device that is not there
        raise ValueError(f"device is {device}, which can't be used: {error}") from error


def _open_file(
    path: Path,
    sizes: ModelConfig | None,
    labels: Sequence[str],
    loss: Literal["bce", "cross_entropy"],
    data: DataConfig,
) -> tuple[Network, ModelSpec, RunConfig]:
    state = read_state(path)
    network = model_of_state(state, sizes or sizes_of(state, str(path)), str(path))
    spec = spec_of(network, data.log_mel_mean, data.log_mel_std)
    if labels and len(labels) != spec.classes:
        raise ValueError(f"labels has {len(labels)} names, and {path} has {spec.classes} classes")
    spec = dataclasses.replace(spec, labels=tuple(labels), loss=loss)
    return network, spec, _config_of(spec)


def _open_exported(source: str, revision: str | None) -> tuple[Network, ModelSpec, RunConfig]:
    """Open a folder that was exported, or the repository of that name on the Hub."""
    folder = Path(source)
    if folder.is_dir():
        file = folder / "config.json"
    elif source.count("/") > 1 or source.startswith((".", "/", "~")):
        raise FileNotFoundError(f"there is no file or folder {source}")
    else:
        try:
            file = Path(hf_hub_download(source, "config.json", revision=revision))
        except (OSError, HFValidationError) as error:
            raise OSError(
                f"{source} is no file or folder here, and can't be loaded from the Hub: {error}"
            ) from error
    kind = HubCAVMAEClassifier if load_config(file, ModelSpec).classes else HubCAVMAE
    network = kind.from_pretrained(source, revision=revision)
    return network, network.spec, _config_of(network.spec)


def _config_of(spec: ModelSpec) -> RunConfig:
    """Return a run with the sizes and the preprocessing of a model without one.

    Raises:
        ValueError: an input that is prepared in another way than here.
    """
    kind = FinetuneConfig if spec.classes else PretrainConfig
    used = spec.preprocessing
    data = DataConfig(log_mel_mean=used.log_mel_mean, log_mel_std=used.log_mel_std)
    ours = preprocessing(used.log_mel_mean, used.log_mel_std)
    for name, value in dataclasses.asdict(ours).items():
        if getattr(used, name) != value:
            raise ValueError(
                f"preprocessing.{name} of the model is {getattr(used, name)}, and {value} here; "
                "prepare its input as its config.json says, for its `network`"
            )
    return kind(model=spec.model, data=data)
