"""Which part of the model a device is at, seen from outside: the model has no hooks for it.

Forward, the calls of the model's modules and of a few functions tell. Backward, autograd's nodes
do: each belongs to the part in which it was made. On a GPU nothing waits for any of this.

What the tables below name has to be there and to be called, and they have to name every module of
the model: a part that has a new name is an error and never a number that is too small.
"""

import importlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.graph import Node

from cavmae.benchmarks.harness.timeline import Label, Timeline

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
FUNCTIONS = {
    "cavmae.trainer.tasks.pretrain.random_masks": "mask",
    "cavmae.trainer.model.cavmae.restore_tokens": "decoder",
    "cavmae.trainer.model.cavmae.gather_tokens": "decoder",
    "cavmae.trainer.model.cavmae.masked_reconstruction_loss": "losses",
    "cavmae.trainer.tasks.pretrain.local_loss": "losses",
    "cavmae.trainer.tasks.pretrain.exchanged_loss": "losses",
}
PARTS = ("mask", "embed", "encoders", "joint", "decoder", "losses")
"""Of the forward pass."""
REST = "rest of the model"
"""Additions of positions, means over tokens, and whatever lies between the parts."""
GRADIENTS = Label("gradients", "backward")
"""Their addition to the parameters, and what DeepSpeed does with them then."""
COMMUNICATION = Label("communication")


def part_of(module: str) -> str:
    """The part that one of the model's own modules belongs to.

    Raises:
        ValueError: it is not known here.
    """
    if module not in MODULES:
        raise ValueError(f"parts.py knows no module {module} of the model; name its part there")
    return MODULES[module]


class PartObserver:
    """Labels a timeline by parts of the model from the moment that it is made.

    Args:
        model: whose modules are called.
        timeline: to be labelled.

    Raises:
        ValueError: the tables of this file do not fit the model.
    """

    def __init__(self, model: nn.Module, timeline: Timeline) -> None:
        self._timeline = timeline
        self._part_of_node: dict[int, str] = {}
        self._called: set[str] = set()
        for name, child in model.named_children():
            for module in child if isinstance(child, nn.ModuleList) else [child]:
                # Where torch keeps what a compiled module is called by: outside of its graph.
                inner = module._compiled_call_impl or module._call_impl
                module._compiled_call_impl = self._observed(part_of(name), inner)
        for path, part in FUNCTIONS.items():
            owner, name = owner_of(path)
            setattr(owner, name, self._observed(part, getattr(owner, name)))

    def _observed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, whose calls and whose nodes are of `part`."""

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
        """Labels of the backward pass of `loss`, which is run meanwhile."""
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
        """Raises ValueError where a part was not seen."""
        if unseen := [part for part in PARTS if part not in self._called]:
            raise ValueError(
                f"the step did not call what parts.py takes for {', '.join(unseen)}; name "
                "there what the model calls now"
            )


def observe_collectives(timeline: Timeline) -> None:
    """Label all collectives of this process, as long as they keep a caller waiting.

    They are seen in the classes that every function for them ends in, as DeepSpeed keeps some of
    torch's functions from before and waits for others when it needs what they bring.
    """
    begin = [name for name in dir(dist.ProcessGroup) if _begins_work(name)]
    assert {"allreduce", "broadcast", "send", "barrier"} <= set(begin)
    for owner, names in ((dist.ProcessGroup, begin), (dist.Work, ["wait"])):
        for name in names:
            setattr(owner, name, timeline.during(COMMUNICATION, getattr(owner, name)))


def _begins_work(name: str) -> bool:
    """Whether a method of process groups is a collective, by what its signature says it returns:
    which ones there are differs between versions of torch."""
    signatures = getattr(dist.ProcessGroup, name).__doc__ or ""
    return re.search(r"-> \S*Work\b", signatures) is not None


def _next_node() -> int:
    """The number of the node of autograd that will be made next."""
    return torch.autograd._get_sequence_nr()  # pyright: ignore[reportPrivateImportUsage]


def owner_of(path: str) -> tuple[Any, str]:
    """The module that has a name, and the name.

    Raises:
        ValueError: it has no such name.
    """
    module, _, name = path.rpartition(".")
    owner = importlib.import_module(module)
    if not hasattr(owner, name):
        raise ValueError(f"{module} has no {name}; name in parts.py what does its work now")
    return owner, name


def _nodes(loss: torch.Tensor) -> Iterator[Node]:
    """Of the graph of a loss."""
    assert loss.grad_fn is not None
    waiting, seen = [loss.grad_fn], {loss.grad_fn}
    while waiting:
        node = waiting.pop()
        yield node
        for before, _ in node.next_functions:
            if before is not None and before not in seen:
                seen.add(before)
                waiting.append(before)
