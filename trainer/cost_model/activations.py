"""What a forward and a backward pass keep in memory, counted on tensors that have no values.

torch's fake tensors go through the model as real ones on a CPU do, in seconds and without the
memory, whatever the size of the model; attention holds no scores there, as on a GPU. Every storage
is counted from the operation that makes it to the moment nobody refers to it, so what is counted is
the allocator's truth up to what operations take inside of themselves. Bytes grow linearly with the
samples in each storage; two passes of different batches give all others.
"""

import copy
import math
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cavmae.trainer.config.configs import FinetuneConfig, PretrainConfig, RunConfig
from cavmae.trainer.losses.classification import classification_loss
from cavmae.trainer.model.cavmae import CAVMAE
from cavmae.trainer.model.classifier import CAVMAEClassifier
from cavmae.trainer.model.masking import random_masks
from cavmae.trainer.tasks.build_model import build_model

_SAMPLES = (2, 3)
"""Of the two passes; a batch of one is a special case to some operations."""


@dataclass(frozen=True)
class ActivationTimeline:
    """The storages that a forward and a backward pass make, in the order in which they are made.

    Attributes:
        alloc, free: (storages,) the operation that makes each, and the first one after its end.
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

    def peak(
        self,
        samples: int,
        *,
        gradients_stay: bool,
        from_bytes: float = 0.0,
        below_bytes: float = math.inf,
    ) -> int:
        """Most bytes at once.

        Args:
            samples: of a micro-batch.
            gradients_stay: whether each gradient stays where autograd leaves it, as opposed to
                going into a bucket that is there already.
            from_bytes, below_bytes: of the storages that are counted.
        """
        sizes = self.fixed + samples * self.per_sample
        counted = (sizes >= from_bytes) & (sizes < below_bytes)
        if not gradients_stay:
            counted &= ~self.gradient
        changes = np.zeros(self.operations + 1)
        np.add.at(changes, self.alloc[counted], sizes[counted])
        np.subtract.at(changes, self.free[counted], sizes[counted])
        return int(changes.cumsum().max())

    @property
    def gradient_bytes(self) -> int:
        """Of all parameters."""
        return int(self.fixed[self.gradient].sum())


def count_passes(config: RunConfig) -> ActivationTimeline:
    """Of a micro-batch of the run; takes seconds.

    Args:
        config: `engine.dtype` is bf16 or fp32.
    """
    few, more = (_count(config, samples) for samples in _SAMPLES)
    assert few.alloc == more.alloc and few.free == more.free, "no operation depends on the batch"
    sizes = np.array([few.sizes, more.sizes], dtype=np.float64)
    per_sample = (sizes[1] - sizes[0]) / (_SAMPLES[1] - _SAMPLES[0])
    gradient = np.zeros(len(few.alloc), dtype=bool)
    gradient[few.gradients] = True
    return ActivationTimeline(
        alloc=np.array(few.alloc),
        free=np.array([few.free.get(number, few.operations) for number in range(len(few.alloc))]),
        fixed=sizes[0] - _SAMPLES[0] * per_sample,
        per_sample=per_sample,
        gradient=gradient,
        operations=few.operations,
    )


class _Count(TorchDispatchMode):
    """Storages made since it was entered, by number.

    Attributes:
        alloc, sizes: the operation that made each, and its bytes.
        free: the operation before which it was gone, where it was.
        gradients: those that are left in parameters.
        operations: done.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alloc: list[int] = []
        self.sizes: list[int] = []
        self.free: dict[int, int] = {}
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

    def leave_out(self, tensor: torch.Tensor) -> None:
        """Something that was there before."""
        self._numbers[tensor.untyped_storage()] = None

    def gradient_is_there(self, parameter: torch.Tensor) -> None:
        """Autograd leaves one in a parameter, where it stays."""
        assert parameter.grad is not None
        number = self._numbers[parameter.grad.untyped_storage()]
        assert number is not None
        self.gradients.append(number)

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._numbers:
            number = self._numbers[storage] = len(self.alloc)
            self.alloc.append(self.operations)
            self.sizes.append(storage.nbytes())
            weakref.finalize(storage, self._end, number)

    def _end(self, number: int) -> None:
        self.free.setdefault(number, self.operations)


def _count(config: RunConfig, samples: int) -> _Count:
    dtype = torch.bfloat16 if config.engine.dtype == "bf16" else torch.float32
    with torch.device("meta"):
        model = build_model(config)
    model.recompute_blocks(config.engine.activation_checkpointing)
    count = _Count()
    with FakeTensorMode():
        for name, one in list(model.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            weight = nn.Parameter(torch.empty(one.shape, dtype=dtype), one.requires_grad)
            setattr(model.get_submodule(owner), leaf, weight)
            count.leave_out(weight)
            if weight.requires_grad:
                weight.register_post_accumulate_grad_hook(count.gradient_is_there)
        shape = config.model
        log_mel = torch.empty(samples, shape.audio_frames, shape.mel_bins)
        frame = torch.empty(samples, 3, shape.image_size, shape.image_size)
        for tensor in (log_mel, frame):
            count.leave_out(tensor)
        if isinstance(config, FinetuneConfig):
            assert isinstance(model, CAVMAEClassifier)
            _finetuning_passes(config, model, log_mel, frame, count)
        else:
            assert isinstance(config, PretrainConfig) and isinstance(model, CAVMAE)
            _pretraining_passes(config, model, log_mel, frame, count)
        done = copy.copy(count)
        done.free = dict(count.free)  # the model and its gradients are still there
    return done


def _pretraining_passes(
    config: PretrainConfig,
    model: CAVMAE,
    log_mel: torch.Tensor,
    frame: torch.Tensor,
    count: _Count,
) -> None:
    losses = {
        "reconstruct": config.loss.reconstruction_weight > 0,
        "contrast": config.loss.contrastive_weight > 0,
    }
    masks = random_masks(config.model, config.mask, torch.arange(len(log_mel)), seed=0)
    with count:
        output = model(log_mel, frame, *masks, **losses, norm_pix=config.loss.norm_pix)
        loss = torch.zeros(())
        if losses["reconstruct"]:
            loss = loss + output.reconstruction_audio + output.reconstruction_video
        if losses["contrast"]:
            loss = loss + (output.audio_embedding * output.video_embedding).sum()
        loss.backward()


def _finetuning_passes(
    config: FinetuneConfig,
    model: CAVMAEClassifier,
    log_mel: torch.Tensor,
    frame: torch.Tensor,
    count: _Count,
) -> None:
    targets = torch.empty(len(log_mel), model.classes)
    count.leave_out(targets)
    with count:
        logits = model(log_mel, frame, mode=config.classifier.mode).logits
        classification_loss(logits, targets, config.classifier.loss).backward()


def passes_at_most(config: RunConfig, gradient_bytes: int) -> ActivationTimeline:
    """What `count_passes` finds is less than this, which takes no time.

    A block keeps less than 40 values for each channel of a token; what is not in a block is less
    than 16 values a pixel.

    Args:
        config: `engine.dtype` is bf16 or fp32.
        gradient_bytes: of all parameters that are trained.
    """
    shape = config.model
    audio, video, decoder = shape.audio_tokens, shape.video_tokens, 0
    if isinstance(config, PretrainConfig):
        decoder = shape.decoder_depth * (audio + video) * shape.decoder_width
        audio = int(audio * (1 - config.mask.audio_ratio)) + 1
        video = int(video * (1 - config.mask.video_ratio)) + 1
    encoders = (shape.modality_depth + 2 * shape.joint_depth) * (audio + video) * shape.width
    pixels = 16 * (shape.audio_frames * shape.mel_bins + 3 * shape.image_size**2)
    element = 2 if config.engine.dtype == "bf16" else 4
    per_sample = element * 40 * (encoders + decoder) + 4 * pixels
    return ActivationTimeline(
        alloc=np.array([0, 0]),
        free=np.array([1, 1]),
        fixed=np.array([0, gradient_bytes]),
        per_sample=np.array([per_sample, 0]),
        gradient=np.array([False, True]),
        operations=1,
    )
