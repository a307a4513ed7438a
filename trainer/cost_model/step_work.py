"""The work of a micro-batch, kernel by kernel, counted on tensors without values.

Every operation of a forward and a backward pass is seen as torch dispatches it: matrix products
with their shapes, attention, and of everything else the bytes. On a GPU, a function of `kernels/`
is one kernel, which reads what it is given and writes what it returns. Compiled blocks have the
same products and kernels of ours; what the compiler fuses beside them is 2% of the bytes.
"""

import sys
import weakref
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import cavmae.kernels
from cavmae.trainer.config.configs import PretrainConfig, RunConfig
from cavmae.trainer.cost_model.fake_batch import fake_batch
from cavmae.trainer.cost_model.kernel import Kernel, Pass, kernel, operation, touched_bytes
from cavmae.trainer.model.encoder import AudioVideoEncoder

_KERNELS = str(Path(cavmae.kernels.__file__).parent)
_private: Any = torch


def micro_batch_work(
    config: RunConfig, *, gpu: bool, embeddings_alone: bool = False
) -> list[Kernel]:
    """Count the kernels of both passes of a micro-batch; takes seconds.

    The contrastive loss is left out: its size is that of a group, not of a micro-batch.

    Args:
        config: `engine.dtype` is bf16 or fp32, `micro_batch` what a rank takes at once.
        gpu: whether the kernels are those of a GPU.
        embeddings_alone: count a forward pass without gradients that ends at the embeddings, which
            a pretraining run has first where groups span micro-batches.
    """
    if embeddings_alone:
        assert isinstance(config, PretrainConfig)
        config = replace(config, loss=replace(config.loss, reconstruction_weight=0.0))
    with fake_batch(config, config.micro_batch) as batch:
        count = _Count(batch.model, gpu=gpu)
        with count, torch.set_grad_enabled(not embeddings_alone):
            loss = batch.loss()
            if not embeddings_alone:
                count.during = "backward"
                loss.backward()
        return count.all_kernels()


def scaled_work(counts: dict[int, list[Kernel]], samples: int) -> list[Kernel]:
    """Return the kernels of a micro-batch of another size: all counts are linear in it, but for
    tables of which a small one takes only some rows.

    Args:
        counts: of `micro_batch_work`, for two sizes.
        samples: of the micro-batch.
    """
    (few, first), (more, second) = counts.items()

    def at(low: int, high: int) -> int:
        return low + (samples - few) * (high - low) // (more - few)

    return [
        replace(
            one,
            shape=tuple(map(at, one.shape, other.shape)),
            flops=at(one.flops, other.flops),
            bytes=at(one.bytes, other.bytes),
        )
        for one, other in zip(first, second, strict=True)
    ]


class _Owner(NamedTuple):
    """What an operation belongs to.

    Attributes:
        part: see `Kernel`.
        function: of `kernels/`, as its name and the number of the call.
    """

    part: str = ""
    function: tuple[str, int] | None = None


@dataclass
class _Function:
    """A call of a function of `kernels/` under way, or of its gradient.

    Attributes:
        belongs: its pass and owner.
        read: bytes of each tensor that was there before, by the number of its storage.
        made: bytes of each storage that is new.
    """

    belongs: tuple[Pass, _Owner]
    read: dict[int, int] = field(default_factory=dict)
    made: weakref.WeakKeyDictionary[torch.UntypedStorage, int] = field(
        default_factory=weakref.WeakKeyDictionary
    )

    def add(self, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
        for one in inputs:
            if one.untyped_storage() not in self.made:
                self.read[one.untyped_storage()._cdata] = touched_bytes(one)
        for one in outputs:
            self.made[one.untyped_storage()] = touched_bytes(one)

    def kernel(self) -> Kernel:
        """Return it as one kernel; storages that are gone stay in its registers."""
        during, owner = self.belongs
        assert owner.function
        moved = sum(self.read.values()) + sum(self.made.values())
        return Kernel(during, owner.part, "other", owner.function[0], (), "", 0, moved)


class _Count(TorchDispatchMode):
    """Counts the kernels that are launched while it is active.

    An operation of the backward pass belongs to the part whose forward pass made its node.

    Args:
        model: its children are the parts.
        gpu: whether a function of `kernels/` is one kernel.
    """

    def __init__(self, model: AudioVideoEncoder, *, gpu: bool) -> None:
        super().__init__()
        self.during: Pass = "forward"
        self._kernels: list[Kernel] = []
        self._gpu = gpu
        self._now = _Owner()
        self._owners: dict[int, _Owner] = {}
        self._function: _Function | None = None
        self._frame: FrameType | None = None
        self._calls = 0
        if gpu:
            model.use_attention("sdpa")
        for name, child in model.named_children():
            for module in child if isinstance(child, nn.ModuleList) else [child]:
                module.register_forward_pre_hook(partial(self._enter, name))
                module.register_forward_hook(self._leave)

    def all_kernels(self) -> list[Kernel]:
        """Return the kernels so far."""
        self._end_function()
        return self._kernels

    def _enter(self, part: str, *_: Any) -> None:
        self._now = _Owner(part)

    def _leave(self, *_: Any) -> None:
        self._now = _Owner()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        owner = self._owner()
        if self.during == "forward":
            # The newest node is that of this operation, or of the autograd function that it is in.
            inside = owner if torch.is_grad_enabled() else owner._replace(function=None)
            self._owners.setdefault(_private.autograd._get_sequence_nr() - 1, inside)
        inputs, outputs = (
            [one for one in tree_leaves(tree) if isinstance(one, torch.Tensor)]
            for tree in ((args, kwargs), result)
        )
        if not _launches(func, inputs, outputs):
            return result
        one = kernel(self.during, owner.part, operation(func), inputs, outputs)
        if self._gpu and owner.function and one.kind == "other":
            if not self._function or self._function.belongs != (self.during, owner):
                self._end_function()
                self._function = _Function((self.during, owner))
            self._function.add(inputs, outputs)
        else:
            self._end_function()
            self._kernels.append(one)
        return result

    def _end_function(self) -> None:
        if self._function:
            self._kernels.append(self._function.kernel())
            self._function = None

    def _owner(self) -> _Owner:
        owner = self._now
        if self.during == "backward":
            node = _private._C._current_autograd_node()
            owner = self._owners.get(node._sequence_nr(), _Owner()) if node else _Owner()
        frame = _frame_of_ours()
        if frame is not self._frame:  # held, so that no later call has the same address
            if self._frame:
                self._frame.clear()  # of the tensors of a call that is over
            self._frame = frame
            self._calls += 1
        if frame is None:
            return owner
        name = frame.f_code.co_name
        return owner._replace(part=owner.part or name, function=(name, self._calls))


def _frame_of_ours() -> FrameType | None:
    """Return the call of a function of `kernels/` that the caller is in, but for attention."""
    found, frame = None, sys._getframe(1)
    while frame:
        file = frame.f_code.co_filename
        if file.startswith(_KERNELS) and not file.endswith("attention.py"):
            found = frame
        frame = frame.f_back
    return found


def _launches(func: Any, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> bool:
    """Return whether an operation writes values: views and empty tensors do not."""
    known = {one.untyped_storage()._cdata for one in inputs}
    writes = any(one.untyped_storage()._cdata not in known for one in outputs)
    return (writes or func._schema.is_mutable) and "empty" not in operation(func)
