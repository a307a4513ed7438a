"""Attributes a step's time to parts of the model from outside: the model has no hooks for it.

Forward, parts are seen by calls of the model's modules and of a few functions; backward by
autograd's nodes, each of which belongs to the part in which it was made. Nothing of this makes a
GPU wait.

All names in the tables below must exist and be called, and the tables must name every module of the
model: a renamed part is an error, never a number that is too small.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.graph import Node

from cavmae.benchmarks.harness.timeline import Label, Timeline
from cavmae.trainer.model import cavmae
from cavmae.trainer.tasks import pretrain

MODULES = {
    "patch_embed_a": "embed",
    "patch_embed_v": "embed",
    "blocks_a": "encoders",
    "blocks_v": "encoders",
    "blocks_u": "joint",
    "norm_a": "joint",
    "norm_v": "joint",
    "norm": "joint",
    "decoder_embed": "decoder",
    "decoder_blocks": "decoder",
    "decoder_norm": "decoder",
    "decoder_pred_a": "decoder",
    "decoder_pred_v": "decoder",
}
FUNCTIONS: tuple[tuple[ModuleType, Callable[..., Any], str], ...] = (
    (pretrain, pretrain.masks_of, "mask"),
    (cavmae, cavmae.restore_tokens, "decoder"),
    (cavmae, cavmae.gather_tokens, "decoder"),
    (cavmae, cavmae.masked_reconstruction_loss, "losses"),
    (pretrain, pretrain.local_loss, "losses"),
    (pretrain, pretrain.exchanged_loss, "losses"),
)
"""The module that calls each, the function, and its part."""
PARTS = ("mask", "embed", "encoders", "joint", "decoder", "losses")
"""Parts of the forward pass."""
REST = "rest of the model"
"""Additions of positions, means over tokens, and whatever lies between the parts."""
GRADIENTS = Label("gradients", "backward")
"""Accumulation into the parameters, and what DeepSpeed does with gradients then."""
COMMUNICATION = Label("communication")


def part_of(module: str) -> str:
    """Return the part that one of the model's modules belongs to.

    Raises:
        ValueError: the module is unknown.
    """
    if module not in MODULES:
        raise ValueError(f"parts.py knows no module {module} of the model; name its part there")
    return MODULES[module]


class PartObserver:
    """Labels a timeline by parts of the model, from its construction on.

    Args:
        model: the model; its modules are observed.
        timeline: the timeline to label.

    Raises:
        ValueError: the tables of this file do not fit the model.
    """

    def __init__(self, model: nn.Module, timeline: Timeline) -> None:
        self._timeline = timeline
        self._part_of_node: dict[int, str] = {}
        self._called: set[str] = set()
        for name, child in model.named_children():
            for module in child if isinstance(child, nn.ModuleList) else [child]:
                # torch calls a compiled module through this attribute, outside of its graph.
                inner = module._compiled_call_impl or module._call_impl
                module._compiled_call_impl = self._observed(part_of(name), inner)
        for caller, function, part in FUNCTIONS:
            name = function.__name__
            setattr(caller, name, self._observed(part, getattr(caller, name)))

    def _observed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function: its calls and its nodes belong to `part`."""

        def observed(*arguments: Any, **options: Any) -> Any:
            first = _next_node()
            with self._timeline.within(Label(part, "forward")):
                result = function(*arguments, **options)
            for number in range(first, _next_node()):
                self._part_of_node.setdefault(number, part)  # one within another keeps its own
            self._called.add(part)
            return result

        return observed

    @contextmanager
    def backward(self, loss: torch.Tensor) -> Iterator[None]:
        """Label the backward pass of `loss`, which runs within."""
        handles = [node.register_prehook(self._entry(node)) for node in _nodes(loss)]
        try:
            with self._timeline.within(Label(REST, "backward")):
                yield
        finally:
            for handle in handles:
                handle.remove()
            self._part_of_node.clear()

    def _entry(self, node: Node) -> Callable[..., None]:
        if node.name() == "torch::autograd::AccumulateGrad":
            label = GRADIENTS
        else:
            label = Label(self._part_of_node.get(node._sequence_nr(), REST), "backward")

        def enter(*_gradients: Any) -> None:
            if self._timeline.label != label:
                self._timeline.switch(label)

        return enter

    def check(self) -> None:
        """Raise ValueError where a part was not seen."""
        if unseen := [part for part in PARTS if part not in self._called]:
            raise ValueError(
                f"the step called no function or module that parts.py names for "
                f"{', '.join(unseen)}; name there what the model calls now"
            )


def observe_collectives(timeline: Timeline) -> None:
    """Label all collectives of this process while they block the caller.

    The classes that every collective ends in are patched, because DeepSpeed keeps references to
    some of torch's functions and waits for others only when it needs their results.
    """
    begin = [name for name in dir(dist.ProcessGroup) if _begins_work(name)]
    assert {"allreduce", "broadcast", "send", "barrier"} <= set(begin)
    for owner, names in ((dist.ProcessGroup, begin), (dist.Work, ["wait"])):
        for name in names:
            setattr(owner, name, timeline.within(COMMUNICATION)(getattr(owner, name)))


def _begins_work(name: str) -> bool:
    """Return whether a method of process groups is a collective, by the return type in its
    signature: versions of torch have different ones."""
    signatures = getattr(dist.ProcessGroup, name).__doc__ or ""
    return re.search(r"-> \S*Work\b", signatures) is not None


def _next_node() -> int:
    """Return the sequence number of the next autograd node."""
    return torch.autograd._get_sequence_nr()  # pyright: ignore[reportPrivateImportUsage]


def _nodes(loss: torch.Tensor) -> Iterator[Node]:
    """Yield the nodes of the graph of a loss."""
    assert loss.grad_fn is not None
    waiting, seen = [loss.grad_fn], {loss.grad_fn}
    while waiting:
        node = waiting.pop()
        yield node
        for before, _ in node.next_functions:
            if before is not None and before not in seen:
                seen.add(before)
                waiting.append(before)
