"""The one owner of DeepSpeed: sharding, reduction, update, and the files of its state.

Above DeepSpeed this adds three promises: a non-finite loss or gradient is never applied, in any
stage and dtype; all stages start Adam at step 0; and a checkpoint of one rank count can be loaded
by another.
"""

import atexit
import contextlib
import copy
import fcntl
import hashlib
import logging
import math
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import nn

from cavmae.trainer.config.configs import EngineConfig, OptimizerConfig
from cavmae.trainer.distributed.env import Ranks

log = logging.getLogger(__name__)

LARGEST_BUCKET_ELEMENTS = 500_000_000
"""What is reduced at once at most: DeepSpeed's default."""

_FILE_OF_RANK = re.compile(r"zero_pp_rank_(\d+)_mp_rank_\d+_(?:model|optim)_states\.pt$")

# DeepSpeed chooses its accelerator when it is imported, and asks for one where there is no GPU.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("DS_LOG_LEVEL", "warning")
# What it compiles is rebuilt whenever the paths of torch or DeepSpeed differ, so each environment
# has its own.
_cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "cavmae"
_environment = f"{sys.prefix} torch {torch.__version__} deepspeed {version('deepspeed')}"
os.environ.setdefault(
    "TORCH_EXTENSIONS_DIR",
    str(_cache / f"torch_extensions-{hashlib.sha256(_environment.encode()).hexdigest()[:16]}"),
)
# Compiling takes the ninja of this environment, also where nobody has activated it; another version
# of ninja would compile everything again.
os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])

# DeepSpeed's autotuner imports MLflow where it is there, on every rank, and nothing here calls the
# autotuner.
if _no_mlflow := "mlflow" not in sys.modules:
    sys.modules["mlflow"] = None  # pyright: ignore[reportArgumentType]
try:
    import deepspeed
finally:
    if _no_mlflow:
        del sys.modules["mlflow"]

from deepspeed.accelerator import get_accelerator  # noqa: E402
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import (  # noqa: E402
    CheckpointCommitInfo,
    CheckpointEngine,
)
from deepspeed.utils import logger as deepspeed_logger  # noqa: E402

deepspeed_logger.setLevel(logging.WARNING)
# Of DeepSpeed's calls, one line a rank.
warnings.filterwarnings(
    "ignore", r".*(all_gather_into|reduce_scatter)_tensor. is deprecated", FutureWarning
)


@dataclass(frozen=True)
class ParamGroup:
    """Trained parameters that learn alike.

    Attributes:
        parameters: of the model.
        ratio: their learning rate as a multiple of the run's.
    """

    parameters: list[nn.Parameter]
    ratio: float


@dataclass(frozen=True)
class Update:
    """What one optimizer step did.

    Attributes:
        applied: False where a loss or gradient was not finite: nothing has changed.
        gradient_norm: over all parameters and ranks, before clipping; inf or nan if not applied.
    """

    applied: bool
    gradient_norm: float


class _CheckedAdam(torch.optim.Adam):
    """Adam that leaves out a non-finite update, with the attributes of DeepSpeed's optimizers.

    DeepSpeed wraps the optimizer of every stage and dtype in one that looks at the gradients first,
    but for stage 0 in fp32, where this class is the optimizer itself. Gradients are already
    reduced there, so every rank decides alike.
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
            share = (self._clip_norm / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(gradients, share)  # pyright: ignore[reportPrivateImportUsage]
        super().step(closure)


def start_process_group(ranks: Ranks) -> torch.device:
    """Join the other ranks and return this rank's device.

    DeepSpeed's CPU operator is compiled once per machine and torch version; the first rank to come
    builds it, the others wait.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", ranks.local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    compile_operators(cuda=cuda)
    with _no_chatter():
        deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", verbose=False)
    return device


def compile_operators(*, cuda: bool) -> Path:
    """Compile what ranks on CPUs need to join each other, where that was not done yet: joining
    would do it, but in all ranks at the same time.

    Args:
        cuda: ranks have GPUs, and need nothing.

    Returns:
        The folder of what was compiled.
    """
    with _extension_lock():
        if not cuda:
            accelerator: Any = get_accelerator()
            accelerator.create_op_builder("ShareMemCommBuilder").load(verbose=False)
    return Path(os.environ["TORCH_EXTENSIONS_DIR"])


def end_rank() -> NoReturn:
    """Part from the other ranks and end this process, which has done all it had to.

    gloo's threads let go of a collective's tensors shortly after it is done, and outlive the
    process group, which DeepSpeed refers to until the end. One that does so while the interpreter
    ends aborts the process ("terminate called without an active exception"), and the starter takes
    a run that is finished for one that failed. So the interpreter does not end: what was registered
    for its end is done, and the process is left.
    """
    dist.destroy_process_group()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


@contextlib.contextmanager
def _no_chatter() -> Iterator[None]:
    """Leave out what DeepSpeed prints while all goes well: memory tables, names of operators, and
    a warning of the optimizer that we choose on purpose. Its failures are exceptions."""
    deepspeed_logger.setLevel(logging.ERROR)
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            yield
    finally:
        deepspeed_logger.setLevel(logging.WARNING)


@contextlib.contextmanager
def _extension_lock() -> Iterator[None]:
    """One process builds at a time; a lock that a killed build left behind is removed.

    The kernel drops this lock with its owner, torch's own lock file stays for ever.
    """
    folder = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "cavmae.lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        for stale in folder.glob("*/lock"):
            stale.unlink()
        yield


class _Collector(CheckpointEngine):
    """Keeps a copy of what DeepSpeed would write to files."""

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
    """The same, with nothing shared and all tensors in host memory."""
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
    """A model under DeepSpeed.

    Args:
        model: on CPU, fp32, parameters without use already frozen, equal on all ranks.
        engine: stage, dtype, clipping.
        optimizer: Adam's settings.
        micro_batch: samples per rank and forward.
        accumulation: micro-batches per update.
        device: this rank's device.
        groups: of all trained parameters; none: they all learn at the run's rate.
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
        assert engine.dtype != "auto"  # settled when the run folder was opened
        self.zero_stage = engine.zero_stage
        self.dtype = engine.dtype
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        elements = sum(parameter.numel() for parameter in trainable)
        groups = groups or [ParamGroup(trainable, 1.0)]
        assert sum(len(group.parameters) for group in groups) == len(trainable)
        self._ratios = [group.ratio for group in groups]
        settings = _deepspeed_settings(engine, micro_batch, accumulation, elements)
        plain = engine.zero_stage == 0 and engine.dtype == "fp32"
        client = _CheckedAdam(
            [{"params": group.parameters} for group in groups],
            # Some wrappers run a step on zero gradients to make the state: a rate of 0 keeps the
            # weights where they are.
            lr=0.0,
            betas=(optimizer.beta1, optimizer.beta2),
            eps=optimizer.epsilon,
            weight_decay=optimizer.weight_decay,
            decoupled_weight_decay=optimizer.name == "adamw",
            fused=True,  # one pass over weights, gradients and moments
            clip_norm=engine.clip_grad_norm if plain else 0.0,
        )
        with _no_chatter():
            initialized: tuple[Any, ...] = deepspeed.initialize(
                model=model.to(device), optimizer=client, config=settings
            )
        self._engine, self._optimizer = initialized[:2]
        # Into each checkpoint it would copy scripts, on whatever disk, in the midst of collectives.
        self._engine._copy_recovery_script = lambda save_path: None
        self._client = client
        for state in client.state.values():
            if "step" in state:  # undo the counting of that first empty step
                state["step"] = torch.zeros_like(
                    torch.as_tensor(state["step"], dtype=torch.float32)
                )

    @property
    def module(self) -> nn.Module:
        """The model, to be called under `torch.no_grad` or followed by `backward`."""
        return self._engine.module

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        return self._engine(*inputs, **options)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a micro-batch's loss; the mean over micro-batches is applied.

        A loss that is not finite makes every gradient nan, so that the update is left out on all
        ranks even where the gradients themselves would have been finite.
        """
        nan = loss.new_tensor(float("nan"))
        self._engine.backward(
            loss * torch.where(loss.detach().isfinite(), torch.ones_like(nan), nan)
        )

    def accumulate(self) -> None:
        """Tell DeepSpeed that a micro-batch short of the update is done."""
        self._engine.step()

    def update(self, learning_rate: float) -> Update:
        """Apply the accumulated gradients on all ranks, or on none if one is not finite."""
        for group, ratio in zip(self._client.param_groups, self._ratios, strict=True):
            group["lr"] = learning_rate * ratio
        self._engine.step()
        norm = float(self._optimizer._global_grad_norm)
        return Update(applied=not self._optimizer.overflow, gradient_norm=norm)

    def snapshot(self) -> dict[str, Any]:
        """This rank's part of weights and optimizer state, copied to host memory; all ranks call
        it. By the names of the files that `load` looks for, to be written with `torch.save`."""
        collector = _Collector()
        reader, self._engine.checkpoint_engine = self._engine.checkpoint_engine, collector
        try:
            with _no_chatter():
                self._engine.save_checkpoint(_Collector.ROOT, tag="state", save_latest=False)
        finally:
            self._engine.checkpoint_engine = reader
        return collector.files

    def load(self, folder: Path, *, converted: bool = False) -> None:
        """Read the files of a `snapshot`; all ranks call it.

        Args:
            folder: where they are, of all ranks.
            converted: `folder` holds what `convert` made of another rank count's files.
        """
        if converted:
            self._engine._config.load_universal_checkpoint = True
        with _no_chatter():
            self._engine.load_checkpoint(str(folder), tag="universal" if converted else "state")

    def full_state_dict(self) -> dict[str, torch.Tensor]:
        """All parameters in fp32 on rank 0 (the masters where there are any); empty elsewhere."""
        state: dict[str, torch.Tensor] = {}
        for name, parameter in self._engine.module.named_parameters():
            full = (
                deepspeed.utils.safe_get_full_fp32_param(parameter)
                if parameter.requires_grad and self._has_masters()
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

    def _has_masters(self) -> bool:
        return self.zero_stage > 0


def files_of_rank(names: Iterable[str], rank: int) -> list[str]:
    """Those of a snapshot's files that `load` reads on a rank of as many ranks as wrote them: its
    own, and those that belong to no rank.

    Args:
        names: of the files of all ranks' snapshots.
        rank: of the reader.
    """
    owners = {name: _FILE_OF_RANK.search(name) for name in names}
    return [name for name, owner in owners.items() if owner is None or int(owner[1]) == rank]


def convert_checkpoint(folder: Path, target: Path) -> None:
    """Make a checkpoint that any rank count can load; one process calls it.

    Raises:
        RuntimeError: DeepSpeed's converter failed; its output is in the message.
    """
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    command = [
        sys.executable,
        "-m",
        "deepspeed.checkpoint.ds_to_universal",
        "--input_folder",
        str(folder / "state"),
        "--output_folder",
        str(target / "universal"),
        "--num_extract_workers",
        "1",
        "--num_merge_workers",
        "1",
        "--inject_missing_state",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        shutil.rmtree(target, ignore_errors=True)
        raise RuntimeError(
            f"the checkpoint {folder} could not be converted to this rank count: "
            f"{done.stderr.strip()[-2000:]}"
        )


def _deepspeed_settings(
    engine: EngineConfig, micro_batch: int, accumulation: int, elements: int
) -> dict[str, Any]:
    bf16 = engine.dtype == "bf16"
    # Some stages make the whole bucket at the start, however small the model is.
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
    }
