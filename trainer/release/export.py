"""`cavmae export RUN OUT`: exports a trained model to the formats that others read.

These are a folder for the Hugging Face Hub, graphs that run without this package, and a state dict
for the published code. Every format comes with `config.json`, which has the preprocessing, and a
card. Every graph is compared with the model.
"""

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from cavmae.atomic_write import atomic_write
from cavmae.console import counted
from cavmae.dataloaders.config import DataConfig
from cavmae.dataloaders.constants import IMAGE_MEAN, IMAGE_STD
from cavmae.dataloaders.media import log_mel
from cavmae.field_checks import CheckedFields
from cavmae.trainer.config.serialize import save_config
from cavmae.trainer.evaluation.trained_run import (
    AnyRun,
    TrainedClassifier,
    TrainedRun,
    open_trained,
)
from cavmae.trainer.model.cavmae import CAVMAE
from cavmae.trainer.model.classifier import CAVMAEClassifier
from cavmae.trainer.model.config import ModelConfig
from cavmae.trainer.model.weights import (
    State,
    load_classifier_weights,
    load_published,
    published_state,
    read_state,
)
from cavmae.trainer.release.graphs import (
    MAX_ABS_ERROR,
    Model,
    Part,
    check_onnx_installed,
    graph_of,
    max_abs_error,
    parts_of,
    save_onnx,
    save_torch,
)
from cavmae.trainer.release.hub import hub_model
from cavmae.trainer.release.model_card import model_card, provenance_of_file, provenance_of_run
from cavmae.trainer.release.model_spec import ModelSpec, Preprocessing
from cavmae.trainer.trained_on import TrainedOn

Format = Literal["hub", "torch", "onnx", "published"]
_GRAPH_WRITERS = {"torch": (save_torch, "pt2"), "onnx": (save_onnx, "onnx")}


@dataclass(frozen=True)
class ExportConfig(CheckedFields):
    """Export a trained model: to the Hugging Face Hub, as graphs, or for the published code."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of a finished run, or a file of CAV-MAE weights (published, or `weights.pt`)."""
    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder to write to; new or empty."""
    format: tuple[Format, ...] = ("hub",)
    """One or more. `hub`: model.safetensors. `torch`: a .pt2 of each part, for torch.export.load.
    `onnx`: an .onnx of each. `published`: published.pth, a state dict for the published code."""
    what: tuple[Part, ...] = ()
    """Parts of the model to write as graphs: embeddings of `audio` and `video`, logits of a
    classifier in a mode; empty: both embeddings, or a classifier's logits in its own mode."""
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    """Sizes, for a weights file; a run has its own."""
    log_mel_mean: float = DataConfig.log_mel_mean
    """Mean of the log-mel that a weights file was trained on; a run has its own."""
    log_mel_std: float = DataConfig.log_mel_std
    """Std of the log-mel that a weights file was trained on; a run has its own."""


def open_source(config: ExportConfig) -> tuple[Model, ModelSpec, str]:
    """Open a finished run or a weights file.

    Returns:
        The model on the CPU in eval mode, its sizes and preprocessing, and the card's sections on
        its training.

    Raises:
        ValueError: it is neither, the weights do not fit, or fields of a file are set for a run.
        OSError: a file can't be read.
    """
    path = Path(config.source)
    if path.is_file():
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        model = model_of_state(read_state(path), config.model, str(path))
        spec = spec_of(model, config.log_mel_mean, config.log_mel_std)
        return model, spec, provenance_of_file(path, sha256, TrainedOn.beside(path))
    run = open_trained(path)
    modality = run.config.data.modality
    if isinstance(run, TrainedRun) and modality != "both":
        raise ValueError(
            f"{path} was pretrained on {modality} alone, and an exported model has both encoders, "
            f"of which one would be untrained; fine-tune it with --classifier.mode {modality}only, "
            "and export that"
        )
    default = ExportConfig(config.source, config.out)
    for name in ("model", "log_mel_mean", "log_mel_std"):
        if getattr(config, name) != getattr(default, name):
            raise ValueError(
                f"{name} is set and {path} is a run, whose config.json has it; do not set it"
            )
    model = run.model(torch.device("cpu"))
    return model, spec_of_run(run, model), provenance_of_run(run)


def export(config: ExportConfig) -> None:
    """Write the files and print their names.

    Raises:
        ValueError: the source, the parts or `out` don't fit, a package is missing, or a graph's
            outputs differ from the model's.
        OSError: a file can't be read or written.
    """
    out = Path(config.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out is {out}, which is not an empty folder; give a new one")
    if "onnx" in config.format:
        check_onnx_installed()
    model, spec, provenance = open_source(config)
    parts = _parts(model, spec, config)
    if "published" in config.format and isinstance(model, CAVMAE) and spec.model.decoder != "self":
        raise ValueError(
            f"format has published and model.decoder is {spec.model.decoder}, which the published "
            "code has not; export another format"
        )
    hub = hub_model(model, spec)
    out.mkdir(parents=True, exist_ok=True)
    with atomic_write(out / "README.md") as temporary:
        model_card(spec, provenance).save(temporary)
    save_config(spec, out / "config.json")
    TrainedOn.beside(config.source).save(out)
    if "hub" in config.format:
        hub.save_pretrained(out)
        print(f"{out / 'model.safetensors'}: {len(hub.state_dict())} tensors")
    if "published" in config.format:
        with atomic_write(out / "published.pth") as temporary, temporary.open("wb") as file:
            torch.save(published_state(model), file)
        print(f"{out / 'published.pth'}: {len(hub.state_dict())} tensors")
    writers = [_GRAPH_WRITERS[name] for name in config.format if name in _GRAPH_WRITERS]
    graphs = parts if writers else ()
    for part in counted(graphs, "exporting", len(graphs), "graphs"):
        graph = graph_of(model, part)
        for save, ending in writers:
            path = out / f"{part}.{ending}"
            error = max_abs_error(model, part, save(graph, path))
            if not error <= MAX_ABS_ERROR:  # NaN too
                path.unlink()
                raise ValueError(
                    f"{path} differs from the model by {error:.2g}, above {MAX_ABS_ERROR:g}: "
                    "removed; use another format, and report this"
                )
            print(f"{path}: max abs error {error:.2g}")
    print(f"{out / 'README.md'}: the card; choose a licence before you publish the weights")


def spec_of_run(run: AnyRun, model: Model) -> ModelSpec:
    """Build the spec of a run's model."""
    data = run.config.data
    spec = spec_of(model, data.log_mel_mean, data.log_mel_std)
    if isinstance(run, TrainedClassifier):
        trained = run.config.classifier
        spec = dataclasses.replace(
            spec, mode=trained.mode, labels=run.labels.names, loss=trained.loss
        )
    return spec


def spec_of(model: Model, log_mel_mean: float, log_mel_std: float) -> ModelSpec:
    """Build the spec of a model without labels, with the preprocessing of the loader."""
    classifier = isinstance(model, CAVMAEClassifier)
    video = model.has_video if classifier else True
    return ModelSpec(
        model=model.config,
        mode=("multimodal" if video else "audioonly") if classifier else "",
        classes=model.classes if classifier else 0,
        labels=(),
        loss="bce",
        video=video,
        preprocessing=preprocessing(log_mel_mean, log_mel_std),
    )


def preprocessing(log_mel_mean: float, log_mel_std: float) -> Preprocessing:
    """Describe what the loader does to audio and images."""
    return Preprocessing(
        audio_hz=log_mel.AUDIO_HZ,
        window_samples=log_mel.WINDOW_SAMPLES,
        hop_samples=log_mel.HOP_SAMPLES,
        fft_samples=log_mel.FFT_SAMPLES,
        preemphasis=log_mel.PREEMPHASIS,
        lowest_hz=log_mel.LOWEST_HZ,
        log_mel_mean=log_mel_mean,
        log_mel_std=log_mel_std,
        image_mean=IMAGE_MEAN,
        image_std=IMAGE_STD,
    )


def model_of_state(state: State, sizes: ModelConfig, source: str) -> Model:
    """Build the model of a state dict: a classifier if it has one.

    Raises:
        ValueError: the weights don't fit; `source` is named.
    """
    head = state.get("mlp_head.1.weight")
    if head is None:
        model = CAVMAE(sizes)
        load_published(model, state, source)
    else:
        model = CAVMAEClassifier(sizes, len(head), video="patch_embed_v.proj.weight" in state)
        load_classifier_weights(model, state, source)
    return model.eval()


def _parts(model: Model, spec: ModelSpec, config: ExportConfig) -> tuple[Part, ...]:
    """Return the parts to write as graphs.

    Raises:
        ValueError: the model lacks one, or no format has graphs.
    """
    parts = parts_of(model)
    for part in config.what:
        if part not in parts:
            raise ValueError(f"what is {part}, which this model lacks; it has {', '.join(parts)}")
    if config.what and not _GRAPH_WRITERS.keys() & set(config.format):
        raise ValueError(
            f"what is {' '.join(config.what)}, and format {' '.join(config.format)} has no parts; "
            "add torch or onnx to format, or do not set what"
        )
    return config.what or ((spec.mode,) if spec.mode else parts)


def main(arguments: list[str]) -> int:
    """The command; returns its exit code."""
    export(tyro.cli(ExportConfig, prog="cavmae export", args=arguments))
    return 0
