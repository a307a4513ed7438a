"""`cavmae export RUN OUT`: a trained model for others, in the formats that they read.

A folder for the Hugging Face Hub, graphs that run without this package, or a state dict that the
published code loads. Every format comes with `config.json`, which says how the model's input is
made, and a card. A graph is compared with the model before the command says that it is done.
"""

import dataclasses
import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from cavmae.command import exit_code
from cavmae.dataloaders.config import DataConfig
from cavmae.dataloaders.constants import IMAGE_MEAN, IMAGE_STD
from cavmae.dataloaders.media import log_mel
from cavmae.trainer.config.serialize import save_config
from cavmae.trainer.evaluation.trained_run import TrainedClassifier, open_trained
from cavmae.trainer.model.cavmae import CAVMAE
from cavmae.trainer.model.classifier import CAVMAEClassifier
from cavmae.trainer.model.config import ModelConfig
from cavmae.trainer.model.weights import (
    load_classifier_weights,
    load_published,
    published_state,
    read_state,
)
from cavmae.trainer.release.graphs import (
    MAXIMUM_DEVIATION,
    Model,
    Part,
    check_onnx_installed,
    graph_of,
    largest_deviation,
    parts_of,
    save_onnx,
    save_torch,
)
from cavmae.trainer.release.hub import hub_model
from cavmae.trainer.release.model_card import model_card
from cavmae.trainer.release.model_spec import ModelSpec, Preprocessing
from cavmae.trainer.release.provenance import provenance_of_file, provenance_of_run

Format = Literal["hub", "torch", "onnx", "published"]
_GRAPH_WRITERS = {"torch": (save_torch, "pt2"), "onnx": (save_onnx, "onnx")}


@dataclass(frozen=True)
class ExportConfig:
    """Write a trained model for others: for the Hub, as graphs, or for the published code."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of a finished run, or a file of CAV-MAE weights (published, or `weights.pt`)."""
    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Where the files are written; new or empty."""
    format: tuple[Format, ...] = ("hub",)
    """One or more. `hub`: model.safetensors. `torch`: a .pt2 of each part, for torch.export.load.
    `onnx`: an .onnx of each. `published`: published.pth, a state dict for the published code."""
    what: tuple[Part, ...] = ()
    """Parts of the model that become graphs: embeddings of `audio` and `video`, logits of a
    classifier in a mode; empty: both embeddings, or a classifier's logits in its own mode."""
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    """Sizes, for a file of weights; a run has its own."""
    log_mel_mean: float = DataConfig.log_mel_mean
    """Of the log-mel that a file of weights was trained on; a run has its own."""
    log_mel_std: float = DataConfig.log_mel_std
    """Of the log-mel that a file of weights was trained on; a run has its own."""


@dataclass(frozen=True)
class Source:
    """What is exported.

    Attributes:
        model: on the CPU, set to evaluate.
        description: of it.
        provenance: what the card says of its training.
    """

    model: Model
    description: ModelSpec
    provenance: str


def open_source(config: ExportConfig) -> Source:
    """Open a finished run or a file of weights.

    Raises:
        ValueError: it is neither, the weights do not fit, or fields of a file are set for a run.
        OSError: a file can't be read.
    """
    path = Path(config.source)
    if path.is_file():
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        model = _model_of_file(path, config.model)
        described = _described(model, config.log_mel_mean, config.log_mel_std)
        return Source(model, described, provenance_of_file(path, sha256))
    run = open_trained(path)
    unset = ExportConfig(config.source, config.out)
    for name in ("model", "log_mel_mean", "log_mel_std"):
        if getattr(config, name) != getattr(unset, name):
            raise ValueError(
                f"{name} is set and {path} is a run, whose config.json says it; leave it out"
            )
    model, data = run.model(torch.device("cpu")), run.config.data
    described = _described(model, data.log_mel_mean, data.log_mel_std)
    if isinstance(run, TrainedClassifier):
        mode, labels = run.config.classifier.mode, run.labels.names
        described = dataclasses.replace(described, mode=mode, labels=labels)
    return Source(model, described, provenance_of_run(run))


def export(config: ExportConfig) -> None:
    """Write the files and say what was written.

    Raises:
        ValueError: the source, the parts or `out` don't fit, a package is missing, or a graph's
            outputs are not the model's.
        OSError: a file can't be read or written.
    """
    out = Path(config.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out is {out}, which holds something already; give a new folder")
    if "onnx" in config.format:
        check_onnx_installed()
    source = open_source(config)
    model, parts = source.model, _parts(source, config)
    hub = hub_model(model, source.description)
    out.mkdir(parents=True, exist_ok=True)
    model_card(source.description, source.provenance).save(out / "README.md")
    save_config(source.description, out / "config.json")
    if "hub" in config.format:
        hub.save_pretrained(out)
        print(f"{out / 'model.safetensors'}: {len(hub.state_dict())} tensors")
    if "published" in config.format:
        torch.save(published_state(model), out / "published.pth")
        print(f"{out / 'published.pth'}: {len(hub.state_dict())} tensors")
    writers = [_GRAPH_WRITERS[name] for name in config.format if name in _GRAPH_WRITERS]
    for part in parts if writers else ():
        graph = graph_of(model, part)
        for save, ending in writers:
            path = out / f"{part}.{ending}"
            deviation = largest_deviation(model, part, save(graph, path))
            if not deviation <= MAXIMUM_DEVIATION:  # NaN too
                path.unlink()
                raise ValueError(
                    f"{path} would give {part} with a deviation of {deviation:.2g} from the model, "
                    f"above {MAXIMUM_DEVIATION:g}: removed; use another format, and report this"
                )
            print(f"{path}: largest deviation from the model {deviation:.2g}")
    print(f"{out / 'README.md'}: the card; choose a licence before you publish the weights")


def _described(model: Model, log_mel_mean: float, log_mel_std: float) -> ModelSpec:
    """The description of a model of which nothing else is known; its input is the loader's."""
    classifier = isinstance(model, CAVMAEClassifier)
    video = model.has_video if classifier else True
    return ModelSpec(
        model=model.config,
        mode=("multimodal" if video else "audioonly") if classifier else "",
        classes=model.classes if classifier else 0,
        labels=(),
        video=video,
        preprocessing=Preprocessing(
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
        ),
    )


def _model_of_file(path: Path, sizes: ModelConfig) -> Model:
    state = read_state(path)
    head = state.get("mlp_head.1.weight")
    if head is None:
        model = CAVMAE(sizes)
        load_published(model, state)
    else:
        model = CAVMAEClassifier(sizes, len(head), video="patch_embed_v.proj.weight" in state)
        load_classifier_weights(model, state)
    return model.eval()


def _parts(source: Source, config: ExportConfig) -> tuple[Part, ...]:
    """The parts that are asked for.

    Raises:
        ValueError: the model has not all of them, or graphs are not asked for.
    """
    has = parts_of(source.model)
    for part in config.what:
        if part not in has:
            raise ValueError(f"what is {part}, which this model has not; it has {', '.join(has)}")
    if config.what and not _GRAPH_WRITERS.keys() & set(config.format):
        raise ValueError(
            f"what is {' '.join(config.what)}, and format {' '.join(config.format)} has no parts; "
            "add torch or onnx to format, or leave what out"
        )
    mode = source.description.mode
    return config.what or ((mode,) if mode else has)


def main(arguments: list[str]) -> int:
    """The command; returns its exit code."""
    export(tyro.cli(ExportConfig, prog="cavmae export", args=arguments))
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
