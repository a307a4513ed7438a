"""The memory of a forward and a backward pass, traced on tensors without values.

Every storage is followed from the operation that allocates it to its last reference, so the trace
equals the allocator's but for buffers inside operations. Each storage grows linearly with the
batch, so two traces with different batches give all others.
"""

import sys
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cavmae.trainer.config.configs import RunConfig
from cavmae.trainer.cost_model.fake_batch import fake_batch

_SAMPLES = (2, 3)
"""Of the two traces; a batch of one is a special case to some operations."""


@dataclass(frozen=True)
class ActivationTimeline:
    """The storages of a forward and a backward pass, in the order of their allocation.

    Attributes:
        alloc, free: (storages,) the operation that allocates each, and the first one after it is
            freed.
        fixed, per_sample: (storages,) their bytes.
        gradient: (storages,) whether autograd leaves it in a parameter.
        operations: of both passes.
    """

    alloc: np.ndarray
    free: np.ndarray
    fixed: np.ndarray
    per_sample: np.ndarray
    gradient: np.ndarray
    operations: int

    def peak(self, samples: int, *, gradients_stay: bool, below_bytes: float = float("inf")) -> int:
        """Return the most bytes allocated at once.

        Args:
            samples: of a micro-batch.
            gradients_stay: whether each gradient stays where autograd leaves it, as opposed to
                going into a bucket that exists already.
            below_bytes: only storages smaller than this are counted.
        """
        sizes = self.fixed + samples * self.per_sample
        counted = sizes < below_bytes
        if not gradients_stay:
            counted &= ~self.gradient
        changes = np.zeros(self.operations + 1)
        np.add.at(changes, self.alloc[counted], sizes[counted])
        np.subtract.at(changes, self.free[counted], sizes[counted])
        return int(changes.cumsum().max())

    @property
    def gradient_bytes(self) -> int:
        """Bytes of all parameters' gradients."""
        return int(self.fixed[self.gradient].sum())


def trace_activations(config: RunConfig) -> ActivationTimeline:
    """Trace a micro-batch of the run; takes seconds.

    Args:
        config: `engine.dtype` is bf16 or fp32.
    """
    few, more = (_trace(config, samples) for samples in _SAMPLES)
    free, also_free = (np.minimum(one.free, one.operations) for one in (few, more))
    assert few.alloc == more.alloc and np.array_equal(free, also_free), "the batch changes nothing"
    sizes = np.array([few.sizes, more.sizes], dtype=np.float64)
    per_sample = (sizes[1] - sizes[0]) / (_SAMPLES[1] - _SAMPLES[0])
    return ActivationTimeline(
        alloc=np.array(few.alloc),
        free=free,
        fixed=sizes[0] - _SAMPLES[0] * per_sample,
        per_sample=per_sample,
        gradient=np.isin(np.arange(len(few.alloc)), few.gradients),
        operations=few.operations,
    )


def activation_bound(config: RunConfig, gradient_bytes: int) -> ActivationTimeline:
    """Return an upper bound of `trace_activations` at once, for runs that fit by far.

    A block keeps less than 40 values for each channel of a token; everything outside the blocks is
    less than 16 values a pixel.

    Args:
        config: of the run.
        gradient_bytes: of all trained parameters.
    """
    shape = config.model
    encoders = (shape.modality_depth + 2 * shape.joint_depth) * shape.width
    channels = encoders + shape.decoder_depth * shape.decoder_width
    tokens = shape.audio_tokens + shape.video_tokens
    pixels = shape.audio_frames * shape.mel_bins + 3 * shape.image_size**2
    return ActivationTimeline(
        alloc=np.array([0, 0]),
        free=np.array([1, 1]),
        fixed=np.array([0, gradient_bytes]),
        per_sample=np.array([4 * (40 * tokens * channels + 16 * pixels), 0]),
        gradient=np.array([False, True]),
        operations=1,
    )


class _Trace(TorchDispatchMode):
    """Records the storages that are allocated while it is active, by number.

    Attributes:
        alloc, sizes: the operation that allocates each, and its bytes.
        free: the operation before which each was freed; `sys.maxsize` while it exists.
        gradients: numbers of those that are left in parameters.
        operations: how many have run.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alloc: list[int] = []
        self.sizes: list[int] = []
        self.free: list[int] = []
        self.gradients: list[int] = []
        self.operations = 0
        self._numbers: weakref.WeakKeyDictionary[torch.UntypedStorage, int | None] = (
            weakref.WeakKeyDictionary()
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        self.operations += 1
        return result

    def ignore(self, tensor: torch.Tensor) -> None:
        """Do not count a tensor that existed before."""
        self._numbers[tensor.untyped_storage()] = None

    def add_gradient(self, parameter: torch.Tensor) -> None:
        """Note the gradient that autograd leaves in a parameter."""
        assert parameter.grad is not None
        number = self._numbers[parameter.grad.untyped_storage()]
        assert number is not None
        self.gradients.append(number)

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._numbers:
            self._numbers[storage] = len(self.alloc)
            weakref.finalize(storage, self._end, len(self.alloc))
            self.alloc.append(self.operations)
            self.sizes.append(storage.nbytes())
            self.free.append(sys.maxsize)

    def _end(self, number: int) -> None:
        self.free[number] = self.operations


def _trace(config: RunConfig, samples: int) -> _Trace:
    trace = _Trace()
    with fake_batch(config, samples) as batch:
        for weight in batch.model.parameters():
            trace.ignore(weight)
            if weight.requires_grad:
                weight.register_post_accumulate_grad_hook(trace.add_gradient)
        for tensor in (batch.log_mel, batch.frame):
            if tensor is not None:
                trace.ignore(tensor)
        with trace:
            batch.loss().backward()
    return trace
