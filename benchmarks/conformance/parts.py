"""Everything that a golden folder can hold, and how each part of it is compared.

The tests (`pytest -m golden --golden=DIR`) and `cavmae bench golden DIR` run the same comparisons.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cavmae.benchmarks.conformance import heads
from cavmae.benchmarks.conformance.cases import read_json
from cavmae.benchmarks.conformance.finetune import FinetuneCase, FinetuneTraining
from cavmae.benchmarks.conformance.forward import ForwardCase, weights_deviations
from cavmae.benchmarks.conformance.mae import mapping_deviations
from cavmae.benchmarks.conformance.tiny_train import TinyTrain
from cavmae.benchmarks.conformance.tolerances import Deviation
from cavmae.trainer.model.cavmae import CAVMAE

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
        cases: makes the comparisons of a folder, by name; empty where the folder lacks the part.
        slow: whether each takes seconds.
    """

    source: str
    cases: Callable[[Path], dict[str, Comparison]]
    slow: bool = False


class _SharedModel:
    """Builds the model of a case, or returns the last one where the weights are the same."""

    def __init__(self) -> None:
        self._weights, self._model = None, None

    def __call__(self, case: ForwardCase) -> CAVMAE:
        if self._model is None or self._weights != case.weights:
            self._model = None  # a base model has 0.8 GB: keep one
            self._weights, self._model = case.weights, case.build()
        return self._model


_model = _SharedModel()


def _of_cases(
    kind: type[ForwardCase] | type[FinetuneCase],
    compare: Callable[[Any], list[Deviation]],
    included: Callable[[Any], bool] = lambda case: True,
) -> Callable[[Path], dict[str, Comparison]]:
    return lambda folder: {
        case.name: partial(compare, case) for case in kind.all(folder) if included(case)
    }


def _of_files(
    pattern: str, compare: Callable[[Path], list[Deviation]]
) -> Callable[[Path], dict[str, Comparison]]:
    return lambda folder: {
        path.stem: partial(compare, path) for path in sorted(folder.glob(pattern))
    }


def _of_entries(
    file: str,
    name: Callable[[int, Mapping[str, Any]], str],
    compare: Callable[..., list[Deviation]],
) -> Callable[[Path], dict[str, Comparison]]:
    def cases(folder: Path) -> dict[str, Comparison]:
        entries = read_json(folder / file) if (folder / file).exists() else []
        return {
            name(number, entry): partial(compare, folder, entry)
            for number, entry in enumerate(entries)
        }

    return cases


def _gradients(case: ForwardCase) -> list[Deviation]:
    model = _model(case)
    case.backward(model)
    deviations = case.gradient_deviations(model)
    model.zero_grad(set_to_none=True)
    return [*deviations, case.frozen_deviation()]


def _finetune_training(path: Path) -> list[Deviation]:
    run = FinetuneTraining(read_json(path))
    model = run.build()
    history = run.train(model)
    return run.deviations(history, model.state_dict())


_FORWARD, _FINETUNE = "pretrain_forward/index.json", "finetune_forward/index.json"
_WEIGHTS, _TINY = "pretrain_forward/weights_*_check.json", "tiny_train/*.json"
_MAPPINGS, _FINETUNE_TINY = "adapt_mae/mapping_*.json", "finetune_forward/tiny_train_*.json"

PARTS: dict[str, Part] = {
    "inputs": Part(
        _FORWARD,
        _of_cases(ForwardCase, lambda case: case.input_deviations() + case.mask_deviations()),
    ),
    "weights": Part(_WEIGHTS, _of_files(_WEIGHTS, weights_deviations), slow=True),
    "forward": Part(
        _FORWARD,
        _of_cases(ForwardCase, lambda case: case.deviations(case.run(_model(case)))),
        slow=True,
    ),
    "gradients": Part(
        "pretrain_forward/*_grad.json",
        _of_cases(ForwardCase, _gradients, lambda case: case.has_gradients),
        slow=True,
    ),
    "tiny_train": Part(
        _TINY, _of_files(_TINY, lambda path: TinyTrain.load_file(path).train_deviations())
    ),
    "contrastive": Part(
        "contrastive.json",
        _of_entries(
            "contrastive.json",
            lambda _, entry: f"seed{entry['seed']}_batch{entry['batch']}",
            heads.contrastive_deviations,
        ),
    ),
    "retrieval": Part(
        "retrieval_metrics.json",
        _of_entries(
            "retrieval_metrics.json",
            lambda number, entry: entry.get("matrix", f"{number}_seed{entry.get('seed', '_none')}"),
            heads.retrieval_deviations,
        ),
    ),
    "classification": Part(
        "classification_metrics.json",
        _of_entries(
            "classification_metrics.json",
            lambda _, entry: (
                f"seed{entry['seed']}_{entry['K']}_classes"
                if "K" in entry
                else f"seed{entry['seed']}_single"
            ),
            heads.classification_deviations,
        ),
    ),
    "patches": Part("patchify*.npz", _of_files("patchify*.npz", heads.patch_deviations)),
    "positions": Part("pos_embed_T*.npz", _of_files("pos_embed_T*.npz", heads.position_deviations)),
    "adapt_mae": Part(_MAPPINGS, _of_files(_MAPPINGS, mapping_deviations), slow=True),
    "finetune_inputs": Part(_FINETUNE, _of_cases(FinetuneCase, FinetuneCase.input_deviations)),
    "finetune_shapes": Part(
        "finetune_forward/*_shapes.json",
        _of_cases(
            FinetuneCase, FinetuneCase.shape_deviations, lambda case: case.shapes_file.exists()
        ),
    ),
    "finetune_forward": Part(
        _FINETUNE,
        _of_cases(FinetuneCase, FinetuneCase.forward_deviations),
        slow=True,
    ),
    "finetune_gradients": Part(
        "finetune_forward/*_grad.json",
        _of_cases(
            FinetuneCase,
            lambda case: case.gradient_deviations(case.build()),
            lambda case: case.has_gradients,
        ),
        slow=True,
    ),
    "finetune_tiny_train": Part(
        _FINETUNE_TINY, _of_files(_FINETUNE_TINY, _finetune_training), slow=True
    ),
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
