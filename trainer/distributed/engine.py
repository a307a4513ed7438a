"""The one owner of DeepSpeed: sharding, reduction, update, and the files of its state.

Above DeepSpeed this adds three promises: a non-finite loss or gradient is never applied, in any
stage and dtype; all stages start Adam at step 0; and a checkpoint of one rank count can be loaded
by another.
"""

import copy
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from cavmae.trainer.config.configs import EngineConfig, OptimizerConfig
from cavmae.trainer.distributed.process_group import quiet_deepspeed
from cavmae.trainer.distributed.state_files import state_read_as_data

# isort: split
# After process_group.py, which sets the environment that DeepSpeed is imported in.
import deepspeed
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import (
    CheckpointCommitInfo,
    CheckpointEngine,
)

LARGEST_BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's default size of a reduction bucket."""


@dataclass(frozen=True)
class ParamGroup:
    """Trained parameters that share a learning rate.

    Attributes:
        parameters: of the model.
        lr_mult: multiplies the run's learning rate.
    """

    parameters: list[nn.Parameter]
    lr_mult: float


@dataclass(frozen=True)
class Update:
    """What one optimizer step did.

    Attributes:
        applied: False if a loss or gradient was not finite; then no weight has changed.
        gradient_norm: over all parameters and ranks, before clipping; inf or nan if not applied. A
            scalar on the device, so that reading it can wait.
    """

    applied: bool
    gradient_norm: torch.Tensor


class _CheckedAdam(torch.optim.Adam):
    """Adam that skips a non-finite update, with the attributes of DeepSpeed's optimizers.

    DeepSpeed wraps the optimizer in one that checks the gradients first, in every stage and dtype
    except stage 0 in fp32, where this class is the optimizer itself. Gradients are already reduced
    there, so all ranks decide alike.
    """

    def __init__(self, params: Any, *, clip_norm: float, **options: Any) -> None:
        super().__init__(params, **options)
        self._clip_norm = clip_norm
        self.overflow = False
        self._global_grad_norm = 0.0

    def step(self, closure: None = None) -> None:
        gradients = [
            parameter.grad
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        norm = nn.utils.get_total_norm(gradients)
        self._global_grad_norm = norm.item()
        self.overflow = not math.isfinite(self._global_grad_norm)
        if self.overflow:
            return
        if self._clip_norm > 0:
            scale = (self._clip_norm / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(gradients, scale)  # pyright: ignore[reportPrivateImportUsage]
        super().step(closure)


class _Collector(CheckpointEngine):
    """Keeps a copy of the state that DeepSpeed would write to files."""

    ROOT = "collected"

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[str, Any] = {}

    def create(self, info: CheckpointCommitInfo) -> None:
        pass

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        pass

    def save(self, state_dict: Any, path: str) -> None:
        self.files[os.path.relpath(path, self.ROOT)] = _copied(state_dict)

    def load(self, path: str, map_location: Any = None) -> None:
        raise NotImplementedError

    def commit(self, info: CheckpointCommitInfo) -> Any:
        return True

    def preserves_storage_sharing(self) -> Any:
        return False  # Each tensor is copied by itself.


def _copied(state: Any) -> Any:
    """Copy nested state, with all tensors in host memory and no storage shared."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        copied = copy.copy(state)
        for key, value in state.items():
            copied[key] = _copied(value)
        return copied
    if type(state) in (list, tuple):
        return type(state)(map(_copied, state))
    return copy.deepcopy(state)


class Engine:
    """A model and its optimizer under DeepSpeed.

    Args:
        model: on CPU, fp32, unused parameters already frozen, equal on all ranks.
        engine: stage, dtype, clipping.
        optimizer: Adam's settings.
        micro_batch: samples per rank and forward pass.
        accumulation: micro-batches per update.
        device: this rank's device.
        groups: all trained parameters; if empty, they all share the run's learning rate.
    """

    def __init__(
        self,
        model: nn.Module,
        engine: EngineConfig,
        optimizer: OptimizerConfig,
        *,
        micro_batch: int,
        accumulation: int,
        device: torch.device,
        groups: Sequence[ParamGroup] = (),
    ) -> None:
        assert engine.dtype != "auto"  # resolved when the run folder was opened
        self.zero_stage = engine.zero_stage
        self.dtype = engine.dtype
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        elements = sum(parameter.numel() for parameter in trainable)
        groups = groups or [ParamGroup(trainable, 1.0)]
        assert sum(len(group.parameters) for group in groups) == len(trainable)
        self._lr_mults = [group.lr_mult for group in groups]
        settings = _deepspeed_settings(engine, micro_batch, accumulation, elements)
        plain = engine.zero_stage == 0 and engine.dtype == "fp32"
        adam = partial(_CheckedAdam, clip_norm=engine.clip_grad_norm) if plain else torch.optim.Adam
        client = adam(
            [{"params": group.parameters} for group in groups],
            # Some wrappers step on zero gradients to create the state: a rate of 0 changes nothing.
            lr=0.0,
            betas=(optimizer.beta1, optimizer.beta2),
            eps=optimizer.epsilon,
            weight_decay=optimizer.weight_decay,
            decoupled_weight_decay=optimizer.name == "adamw",
            fused=True,  # one pass over weights, gradients and moments
        )
        leaves = {type(one) for one in model.modules() if getattr(one, "is_zero3_leaf", False)}
        if engine.zero_stage == 3 and leaves:
            deepspeed.utils.set_z3_leaf_modules(model, list(leaves))
        with quiet_deepspeed():
            initialized: tuple[Any, ...] = deepspeed.initialize(
                model=model.to(device), optimizer=client, config=settings
            )
        self._engine, self._optimizer = initialized[:2]
        if isinstance(self._optimizer, BF16_Optimizer):
            _use_flat_gradients(self._optimizer)
        # It would copy scripts into each checkpoint, on whatever disk, between collectives.
        self._engine._copy_recovery_script = lambda save_path: None
        self._client = client
        for state in client.state.values():
            if "step" in state:  # that first empty step does not count
                state["step"] = torch.zeros_like(
                    torch.as_tensor(state["step"], dtype=torch.float32)
                )

    @property
    def module(self) -> nn.Module:
        """The model; call it under `torch.no_grad`, or follow it by `backward`."""
        return self._engine.module

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        return self._engine(*inputs, **options)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a micro-batch's loss; the mean over micro-batches is applied.

        A loss that is not finite makes every gradient nan, so that all ranks skip the update even
        if the gradients themselves would have been finite.
        """
        self._engine.backward(loss * (loss.detach() * 0 + 1))  # times 1, or nan

    def accumulate(self) -> None:
        """Tell DeepSpeed that a micro-batch is done and more follow before the update."""
        self._engine.step()

    def update(self, learning_rate: float) -> Update:
        """Apply the accumulated gradients on all ranks, or on none if one is not finite."""
        for group, lr_mult in zip(self._client.param_groups, self._lr_mults, strict=True):
            group["lr"] = learning_rate * lr_mult
        self._engine.step()
        norm = self._optimizer._global_grad_norm
        device = self._engine.device
        of_device = torch.is_tensor(norm)
        norm = norm.to(device) if of_device else torch.full((), norm, device=device)
        return Update(applied=not self._optimizer.overflow, gradient_norm=norm)

    def snapshot(self) -> dict[str, Any]:
        """Copy this rank's part of weights and optimizer state to host memory; all ranks call it.

        Returns:
            State by the name of the file that `load` expects it in, as `torch.save` writes it.
        """
        collector = _Collector()
        reader, self._engine.checkpoint_engine = self._engine.checkpoint_engine, collector
        try:
            with quiet_deepspeed():
                self._engine.save_checkpoint(_Collector.ROOT, tag="state", save_latest=False)
        finally:
            self._engine.checkpoint_engine = reader
        return collector.files

    def load(self, folder: Path, *, converted: bool = False) -> None:
        """Read the files of a `snapshot`; all ranks call it.

        Args:
            folder: holds the files of all ranks.
            converted: whether `folder` was converted for any rank count (`convert_checkpoint`).

        Raises:
            ValueError: a file holds something else than data; nothing in it was run.
        """
        if converted:
            self._engine._config.load_universal_checkpoint = True
        with quiet_deepspeed(), state_read_as_data():
            self._engine.load_checkpoint(str(folder), tag="universal" if converted else "state")

    def full_state_dict(self) -> dict[str, torch.Tensor]:
        """Gather all parameters in fp32 on rank 0, from the fp32 masters if the stage has them.

        Returns:
            Parameters by name on rank 0, an empty dictionary elsewhere.
        """
        state: dict[str, torch.Tensor] = {}
        for name, parameter in self._engine.module.named_parameters():
            full = (
                deepspeed.utils.safe_get_full_fp32_param(parameter)
                if parameter.requires_grad and self.zero_stage > 0
                else None
            )
            if full is None:
                with deepspeed.zero.GatheredParameters([parameter], enabled=self.zero_stage == 3):
                    full = parameter.detach().float()
                    if dist.get_rank() == 0:
                        full = full.clone()
            if dist.get_rank() == 0:
                state[name] = full.cpu()
        return state


def _use_flat_gradients(optimizer: BF16_Optimizer) -> None:
    """Spare stage 1 in bf16 two kernels for each parameter and micro-batch, and two in an update.

    Each gradient is added to its fp32 sum, and freed, in the backward pass; norm and clipping take
    all sums of a parameter group as one tensor.
    """

    def add(total: torch.Tensor, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        total.add_(parameter.grad.view(-1))
        parameter.grad = None

    for parameters, sums in zip(
        optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True
    ):
        for parameter, total in zip(parameters, sums, strict=True):
            parameter.register_post_accumulate_grad_hook(partial(add, total))
    flat = optimizer.fp32_groups_actual_gradients_flat
    optimizer.get_grads_for_norm = lambda for_clipping=False: flat if for_clipping else (flat, {})


def _deepspeed_settings(
    engine: EngineConfig, micro_batch: int, accumulation: int, elements: int
) -> dict[str, Any]:
    bf16 = engine.dtype == "bf16"
    # Some stages allocate the whole bucket up front, however small the model is.
    bucket = min(elements, LARGEST_BUCKET_ELEMENTS)
    zero: dict[str, Any] = {"stage": engine.zero_stage, "reduce_bucket_size": bucket}
    if engine.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    # Stage 0 accumulates in the parameters' own gradients, so in their dtype.
    accumulate = "bf16" if bf16 and engine.zero_stage == 0 else "fp32"
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0 if engine.zero_stage == 0 and not bf16 else engine.clip_grad_norm,
        "bf16": {"enabled": bf16, "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": accumulate},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**62,
        "timers": {"throughput": {"enabled": False}},  # it waits for the device at each micro-batch
    }
