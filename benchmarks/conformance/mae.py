"""Initial weights from ImageNet MAE, compared with the published mapping."""

import re
from pathlib import Path

import torch

from cavmae.benchmarks.conformance.cases import config_from_shapes, read_json, recipe
from cavmae.benchmarks.conformance.tolerances import Deviation, check_deviations
from cavmae.trainer.model.cavmae import CAVMAE
from cavmae.trainer.model.weights import adapt_mae


def mapping_deviations(path: Path) -> list[Deviation]:
    """Compare every adapted tensor with the published mapping."""
    mapping = read_json(path)
    source = {
        key: torch.from_numpy(recipe(f"mae.{key}", shape, mapping["seed"]))
        for key, shape in mapping["source_shapes"].items()
    }
    targets = mapping["target"]
    model = CAVMAE(config_from_shapes({name: t["shape"] for name, t in targets.items()}))
    adapted = adapt_mae(source, model)
    # The published script also keeps class tokens, which the pretraining model does not have.
    class_tokens = {name: source["cls_token"] for name in targets if name.startswith("cls_token")}
    state = adapted | class_tokens
    deviations = [
        Deviation(f"{name} is on one side only", 1, 0)
        for name in adapted.keys() ^ (targets.keys() - class_tokens.keys())
    ]
    for name in targets.keys() & state.keys():
        tensor, target = state[name], targets[name]
        wrong_shape = tuple(tensor.shape) != tuple(target["shape"])
        if target["source"].startswith(("RANDOM", "UNCHANGED")):
            expected = model.state_dict()[name]
        else:
            expected = _source_tensor(target["source"], source)
        deviations += [
            Deviation(f"{name} shape", wrong_shape, 0),
            Deviation(f"{name} source", not torch.equal(tensor, expected), 0),
        ]
        if not target["source"].startswith("RANDOM"):
            deviations += check_deviations(name, tensor, target)
    return deviations


def _source_tensor(expression: str, source: dict[str, torch.Tensor]) -> torch.Tensor:
    """Evaluate a mapping's `source`: a key, perhaps sliced or summed over its channels."""
    if expression in source:
        return source[expression]
    match = re.fullmatch(
        r"([\w.]+?)(\[:, 1:, :\]|\[:256\]|\.sum\(dim=1, keepdim=True\))", expression
    )
    if match is None:
        raise ValueError(f"unknown source expression {expression!r}")
    tensor = source[match[1]]
    if match[2] == "[:256]":
        return tensor[:256]
    return tensor[:, 1:, :] if match[2].startswith("[") else tensor.sum(dim=1, keepdim=True)
