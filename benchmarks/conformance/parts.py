"""Everything that a golden folder can hold, and how each part of it is compared.

The tests (`pytest -m golden --golden=DIR`) and `cavmae bench golden DIR` run the same comparisons.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cavmae.benchmarks.conformance import heads
from cavmae.benchmarks.conformance.cases import read_json
from cavmae.benchmarks.conformance.finetune import FinetuneCase, FinetuneTraining
from cavmae.benchmarks.conformance.forward import (
    ForwardCase,
    GoldenCase,
    SharedModel,
    weights_deviations,
)
from cavmae.benchmarks.conformance.mae import mapping_deviations
from cavmae.benchmarks.conformance.tiny_train import TinyTrain
from cavmae.benchmarks.conformance.tolerances import Deviation

NOT_COMPARED = {
    "published_curves": "transcribed logs; a test compares their learning rates",
    "preprocess": "decoded media; tests compare them",
    "deviations.json": "source of the tolerances, nothing to compute",
}
"""Parts of a golden folder that are not compared here, and why."""

Comparison = Callable[[], list[Deviation]]


@dataclass(frozen=True)
class Part:
    """A part of a golden folder.

    Attributes:
        source: glob pattern of its files.
        find: returns the arguments of `compare` by case, from the folder and `source`.
        compare: compares one case.
        slow: whether a case takes seconds.
    """

    source: str
    find: Callable[[Path, str], dict[str, tuple[Any, ...]]]
    compare: Callable[..., list[Deviation]]
    slow: bool = False

    def cases(self, folder: Path) -> dict[str, Comparison]:
        """Return the comparisons of a folder by name; empty where it lacks the part."""
        found = self.find(folder, self.source)
        return {name: partial(self.compare, *arguments) for name, arguments in found.items()}


def _files(folder: Path, source: str) -> dict[str, tuple[Path]]:
    return {path.stem: (path,) for path in sorted(folder.glob(source))}


def _entries(folder: Path, source: str) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Find the entries of a JSON list, named by their number, seed and size."""
    entries = read_json(folder / source) if (folder / source).exists() else []
    named = {}
    for number, entry in enumerate(entries):
        words = [f"{key}{entry[key]}" for key in ("matrix", "seed", "batch", "K") if key in entry]
        named["_".join([str(number), *words])] = (folder, entry)
    return named


def _cases(kind: type[GoldenCase], folder: Path, source: str) -> dict[str, tuple[GoldenCase]]:
    """Find the cases of a part; where the source is a file of each case, those that have it."""
    files = [path.name for path in folder.glob(source)]
    return {
        case.name: (case,)
        for case in kind.all(folder)
        if files == ["index.json"] or any(one.startswith(case.name) for one in files)
    }


_forward, _finetune = partial(_cases, ForwardCase), partial(_cases, FinetuneCase)


_model = SharedModel()


def _gradients(case: ForwardCase) -> list[Deviation]:
    model = _model(case)
    case.backward(model)
    deviations = case.gradient_deviations(model)
    model.zero_grad(set_to_none=True)
    return [*deviations, case.frozen_deviation()]


def _finetune_training(path: Path) -> list[Deviation]:
    run = FinetuneTraining(read_json(path))
    model = run.build()
    return run.deviations(run.train(model), model.state_dict())


_FORWARD, _FINETUNE = "pretrain_forward/index.json", "finetune_forward/index.json"
_FINETUNE_TRAINING = "finetune_forward/tiny_train_*.json"

PARTS = {
    "inputs": Part(_FORWARD, _forward, lambda one: one.input_deviations() + one.mask_deviations()),
    "weights": Part("pretrain_forward/weights_*_check.json", _files, weights_deviations, True),
    "forward": Part(_FORWARD, _forward, lambda one: one.deviations(one.run(_model(one))), True),
    "gradients": Part("pretrain_forward/*_grad.json", _forward, _gradients, True),
    "tiny_train": Part(
        "tiny_train/*.json", _files, lambda path: TinyTrain.load(path).train_deviations()
    ),
    "contrastive": Part("contrastive.json", _entries, heads.contrastive_deviations),
    "retrieval": Part("retrieval_metrics.json", _entries, heads.retrieval_deviations),
    "classification": Part(
        "classification_metrics.json", _entries, heads.classification_deviations
    ),
    "patches": Part("patchify*.npz", _files, heads.patch_deviations),
    "positions": Part("pos_embed_T*.npz", _files, heads.position_deviations),
    "adapt_mae": Part("adapt_mae/mapping_*.json", _files, mapping_deviations, True),
    "finetune_inputs": Part(_FINETUNE, _finetune, FinetuneCase.input_deviations),
    "finetune_shapes": Part(
        "finetune_forward/*_shapes.json", _finetune, FinetuneCase.shape_deviations
    ),
    "finetune_forward": Part(_FINETUNE, _finetune, FinetuneCase.forward_deviations, True),
    "finetune_gradients": Part(
        "finetune_forward/*_grad.json",
        _finetune,
        lambda one: one.gradient_deviations(one.build()),
        True,
    ),
    "finetune_training": Part(_FINETUNE_TRAINING, _files, _finetune_training, True),
}


def not_compared(folder: Path) -> dict[str, str]:
    """Return the files and folders in a golden folder that no part reads, and why."""
    read = {path for part in PARTS.values() for path in folder.glob(part.source.split("/")[0])}
    read |= {folder / "README.md", folder / "retrieval_matrices.npz"}
    return {
        path.name: NOT_COMPARED.get(path.name, "unknown to this version")
        for path in sorted(folder.iterdir())
        if path not in read
    }
