"""Starting from ImageNet MAE weights, against the published mapping."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cavmae.benchmarks.conformance.cases import config_from_shapes, read_json, recipe
from cavmae.benchmarks.conformance.tolerances import Deviation, check_deviations
from cavmae.trainer.model.cavmae import CAVMAE
from cavmae.trainer.model.weights import adapt_mae

pytestmark = [pytest.mark.golden, pytest.mark.slow]


def source_tensor(expression: str, source: dict[str, torch.Tensor]) -> torch.Tensor:
    """The value of a mapping's `source`: a key, perhaps sliced or summed over its channels."""
    if expression in source:
        return source[expression]
    match = re.fullmatch(
        r"([\w.]+?)(\[:, 1:, :\]|\[:256\]|\.sum\(dim=1, keepdim=True\))", expression
    )
    assert match is not None, f"unknown source expression {expression!r}"
    tensor = source[match[1]]
    if match[2] == "[:256]":
        return tensor[:256]
    return tensor[:, 1:, :] if match[2].startswith("[") else tensor.sum(dim=1, keepdim=True)


def test_adapted_weights_are_the_published_ones(
    mapping_file: Path, check_deviations_of: Callable[[list[Deviation]], None]
) -> None:
    mapping = read_json(mapping_file)
    source = {
        key: torch.from_numpy(recipe(f"mae.{key}", shape, mapping["seed"]))
        for key, shape in mapping["source_shapes"].items()
    }
    targets = mapping["target"]
    model = CAVMAE(config_from_shapes({name: t["shape"] for name, t in targets.items()}))
    state = adapt_mae(source, model)

    # The published script also keeps class tokens, which the pretraining model does not have.
    class_tokens = {name: source["cls_token"] for name in targets if name.startswith("cls_token")}
    assert state.keys() == targets.keys() - class_tokens.keys()

    deviations = []
    for name, target in targets.items():
        tensor = (state | class_tokens)[name]
        wrong_shape = tuple(tensor.shape) != tuple(target["shape"])
        deviations.append(Deviation(f"{name} shape", wrong_shape, 0))
        if target["source"].startswith(("RANDOM", "UNCHANGED")):
            expected = model.state_dict()[name]
        else:
            expected = source_tensor(target["source"], source)
        deviations.append(Deviation(f"{name} source", not torch.equal(tensor, expected), 0))
        if not target["source"].startswith("RANDOM"):
            deviations += check_deviations(name, tensor, target)
    check_deviations_of(deviations)
