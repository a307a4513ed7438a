"""Export of the encoders and a classifier's logits as graphs that run without this package, by
`torch.export` and to ONNX.

A graph is traced on the CPU, where all operations are plain torch and not our Triton kernels, in
float32, for any batch size. Exporting reports how far its outputs are from the model's.
"""

import copy
import importlib.util
import logging
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from cavmae.atomic_write import atomic_write
from cavmae.trainer.model.cavmae import CAVMAE
from cavmae.trainer.model.classifier import STREAMS, CAVMAEClassifier, Mode

Part = Literal["audio", "video", Mode]
"""What a graph computes: the embedding of audio or a video frame, or a classifier's logits in a
mode."""
Model = CAVMAE | CAVMAEClassifier
Inputs = Mapping[str, torch.Tensor]

MAX_ABS_ERROR = 1e-4
"""Allowed difference between the outputs of a graph and of its model, in float32."""
CHECKED_BATCHES = (1, 3)
_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def parts_of(model: Model) -> tuple[Part, ...]:
    """Return all parts of a model that can be exported."""
    if isinstance(model, CAVMAE):
        return ("audio", "video")
    if not model.has_video:
        return ("audio", "audioonly")
    return get_args(Part)


def random_inputs(model: Model, part: Part, batch: int) -> dict[str, torch.Tensor]:
    """Draw standard normal `log_mel` and `frame` of the model's size, those that the part reads."""
    sizes = model.config
    shapes = {
        "log_mel": (batch, sizes.audio_frames, sizes.mel_bins),
        "frame": (batch, 3, sizes.image_size, sizes.image_size),
    }
    return {name: torch.randn(shapes[name]) for name in _inputs_of(part)}


class PartOfModel(nn.Module):
    """One output of a model as a separate module.

    Args:
        model: on the CPU, in eval mode.
        part: one of `parts_of(model)`.
    """

    def __init__(self, model: Model, part: Part) -> None:
        super().__init__()
        self.model = model
        self.part = part

    def forward(
        self, log_mel: torch.Tensor | None = None, frame: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Compute the embedding (batch, width) or logits (batch, classes), float32, of those inputs
        that the part reads: (batch, audio_frames, mel_bins), (batch, 3, image_size, image_size)."""
        if self.part == "audio":
            assert log_mel is not None
            return self.model.embed_audio(log_mel)
        if self.part == "video":
            assert frame is not None
            return self.model.embed_video(frame)
        assert isinstance(self.model, CAVMAEClassifier)
        return self.model(log_mel, frame, self.part).logits


def graph_of(model: Model, part: Part) -> ExportedProgram:
    """Trace a part of a model into a graph with only the parameters it uses and named inputs.

    Args:
        model: on the CPU, in eval mode.
        part: one of `parts_of(model)`.
    """
    inputs = random_inputs(model, part, 2)
    shapes = {name: {0: Dim("batch", min=1)} for name in inputs}
    tensors = model.state_dict(keep_vars=True)
    # Copies of the modules, which can lose parameters, with the tensors of the model.
    own = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors.values()})
    whole = PartOfModel(own, part)
    for name in _unused_parameters(whole, inputs):
        owner, _, parameter = name.rpartition(".")
        delattr(whole.get_submodule(owner), parameter)
    with torch.no_grad():
        return torch.export.export(whole, (), inputs, dynamic_shapes=shapes)


def save_torch(graph: ExportedProgram, path: Path) -> Callable[[Inputs], torch.Tensor]:
    """Write a graph for `torch.export.load`; returns a function that runs the written file."""
    with warnings.catch_warnings(), atomic_write(path) as temporary, temporary.open("wb") as file:
        warnings.simplefilter("ignore", FutureWarning)  # torch uses its own deprecated names
        torch.export.save(graph, file)
    module = torch.export.load(path).module()
    return lambda inputs: module(**inputs)


def save_onnx(graph: ExportedProgram, path: Path) -> Callable[[Inputs], torch.Tensor]:
    """Write a graph as ONNX; returns a function that runs the written file with onnxruntime."""
    import onnxruntime

    assert graph.example_inputs is not None
    inputs = graph.example_inputs[1]
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # torchvision, which nothing here uses
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", "# The axis name")  # both inputs have the same batch
        onnx = torch.onnx.export(
            graph,
            kwargs=inputs,
            dynamo=True,
            verbose=False,
            output_names=["output"],
            dynamic_shapes={name: {0: "batch"} for name in inputs},
        )
    assert onnx is not None
    onnx.save(path)  # in place: large weights go to a second file, which the graph names
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda inputs: torch.from_numpy(
        session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})[0]
    )


def check_onnx_installed() -> None:
    """Check early that ONNX can be written.

    Raises:
        ValueError: a package is missing.
    """
    missing = [name for name in _ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"ONNX needs {', '.join(missing)}, which is not installed; pip install 'cavmae[export]'"
        )


@torch.no_grad()
def max_abs_error(model: Model, part: Part, run_graph: Callable[[Inputs], torch.Tensor]) -> float:
    """Compare a graph with the model on random inputs of each of `CHECKED_BATCHES`; NaN where an
    output is."""
    whole = PartOfModel(model, part)
    errors = []
    for batch in CHECKED_BATCHES:
        inputs = random_inputs(model, part, batch)
        errors.append((run_graph(inputs) - whole(**inputs)).abs().max())
    return torch.stack(errors).max().item()


def _inputs_of(part: Part) -> list[str]:
    if part in ("audio", "video"):
        read = {part}
    else:
        mode: Mode = part
        read = {modality for held in STREAMS[mode].values() for modality in held}
    return [name for name, of in (("log_mel", "audio"), ("frame", "video")) if of in read]


def _unused_parameters(whole: PartOfModel, inputs: Inputs) -> list[str]:
    """Names of those that the output has no gradient of."""
    leaves = {name: p.detach().requires_grad_() for name, p in whole.named_parameters()}
    output = torch.func.functional_call(whole, leaves, (), dict(inputs)).sum()
    gradients = torch.autograd.grad(output, list(leaves.values()), allow_unused=True)
    return [name for name, one in zip(leaves, gradients, strict=True) if one is None]
