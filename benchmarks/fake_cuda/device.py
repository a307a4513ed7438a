"""The device as torch, Triton and Inductor see it; for a process that has loaded the guard."""

import types
from typing import Any

import torch
import torch.cuda
import torch.nn.functional as F
import torch.utils._triton
import triton
from torch._dynamo.device_interface import CudaInterface
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from cavmae.benchmarks.fake_cuda import lowering
from cavmae.benchmarks.fake_cuda.gpu import FakeGpu
from cavmae.benchmarks.fake_cuda.trace import note_launch, note_wait, read_list

DEVICE = torch.device("cuda", 0)


def install(gpu: FakeGpu) -> None:
    """Put the device in the place of torch's and Triton's drivers, for the rest of the process."""
    _install_torch(gpu)
    _install_dynamo(gpu)
    _install_triton(gpu)
    lowering.install()
    F.scaled_dot_product_attention = _attention  # pyright: ignore[reportAttributeAccessIssue]


def _properties(gpu: FakeGpu) -> types.SimpleNamespace:
    return types.SimpleNamespace(
        name=gpu.name,
        major=gpu.capability[0],
        minor=gpu.capability[1],
        multi_processor_count=gpu.multiprocessors,
        total_memory=gpu.memory_bytes,
        L2_cache_size=gpu.l2_bytes,
        shared_memory_per_block=48 << 10,
        shared_memory_per_block_optin=gpu.shared_bytes,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        warp_size=32,
        gcnArchName="",
        uuid="fake",
    )


class _Stream:
    """A stream, or an event: nothing is ever in flight, and waiting for it is noted."""

    device = DEVICE
    cuda_stream = device_index = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *error: Any) -> None:
        pass

    def wait_stream(self, other: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def wait(self, stream: Any = None) -> None:
        pass

    def record_event(self, event: Any = None) -> "_Stream":
        return self

    def record(self, stream: Any = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 1.0

    def synchronize(self) -> None:
        note_wait("synchronize")


class _Generator(torch.Generator):
    """The generator that recomputed attention would be handed."""

    device = DEVICE

    def clone_state(self) -> "_Generator":
        return self


def _install_torch(gpu: FakeGpu) -> None:
    cuda: Any = torch.cuda
    stream = _Stream()
    answers = {
        "is_available": True,
        "is_initialized": True,
        "is_bf16_supported": True,
        "device_count": 1,
        "current_device": 0,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "memory_allocated": 0,
        "max_memory_allocated": 0,
        "memory_reserved": 0,
        "max_memory_reserved": 0,
        "get_rng_state": torch.get_rng_state(),
        "get_device_name": gpu.name,
        "get_device_capability": gpu.capability,
        "get_device_properties": _properties(gpu),
        "current_stream": stream,
        "default_stream": stream,
    }
    nothing = ("init", "_lazy_init", "set_device", "set_rng_state", "empty_cache")
    answers |= dict.fromkeys([*nothing, "reset_peak_memory_stats"])
    for name, answer in answers.items():
        # One function each: the compiler tells them apart by identity.
        setattr(cuda, name, lambda *args, answer=answer, **kwargs: answer)
    cuda.default_generators = (_Generator(),)
    cuda.Stream = cuda.Event = _Stream
    cuda.stream = lambda stream: stream
    cuda.synchronize = lambda device=None: note_wait("torch.cuda.synchronize")
    module: Any = torch.nn.Module
    module.to = _move
    fake: Any = FakeTensor
    fake.tolist = lambda tensor: read_list(tensor, "tolist")
    mode: Any = FakeTensorMode
    mode.avoid_device_init = True  # values of the host reach the device as tensors without any
    tensor: Any = torch.Tensor
    tensor.record_stream = lambda tensor, stream: None


def _move(module: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
    """`Module.to` for tensors without values: the parameters stay the same objects."""
    private: Any = torch
    device, dtype, *_ = private._C._nn._parse_to(*args, **kwargs)
    for tensor in [*module.parameters(), *module.buffers()]:
        moved = tensor.detach().to(device, dtype if tensor.is_floating_point() else None)
        if isinstance(tensor, FakeTensor):
            tensor.data, tensor.fake_device = moved, moved.device
        else:
            moved.requires_grad_(tensor.requires_grad)
            tensor.__class__, tensor.__dict__ = moved.__class__, moved.__dict__ | tensor.__dict__
            private._C._swap_tensor_impl(tensor, moved)
    return module


def _install_dynamo(gpu: FakeGpu) -> None:
    interface: Any = CudaInterface
    properties = staticmethod(lambda device=None: _properties(gpu))
    interface.get_device_properties = interface.Worker.get_device_properties = properties
    major, minor = gpu.capability
    interface.get_compute_capability = staticmethod(lambda device=None: 10 * major + minor)
    interface.is_available = staticmethod(lambda: True)
    interface.current_device = staticmethod(lambda: 0)


def _install_triton(gpu: FakeGpu) -> None:
    utilities: Any = torch.utils._triton
    utilities.has_triton = lambda: True
    jitted: Any = JITFunction
    jitted.run = _launch

    class Driver:
        """Triton's view of the device: enough to lower for it, nothing to launch with."""

        utils = types.SimpleNamespace(
            get_device_properties=lambda device: {
                "max_shared_mem": gpu.shared_bytes,
                "multiprocessor_count": gpu.multiprocessors,
                "max_num_regs": 65536,
                "warpSize": 32,
            }
        )

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 10 * gpu.capability[0] + gpu.capability[1], 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int = 0) -> int:
            return 0

        def get_active_torch_device(self) -> torch.device:
            return DEVICE

        def get_device_interface(self) -> Any:
            return torch.cuda

        def map_python_to_cpp_type(self, name: str) -> str:
            return name

    driver: Any = Driver()
    triton.runtime.driver.set_active(driver)


def _launch(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
    """Note a launch instead of launching; refuses what a driver would."""
    tensors = [argument for argument in arguments if isinstance(argument, torch.Tensor)]
    for tensor in tensors:
        if tensor.device != DEVICE:
            raise RuntimeError(f"{kernel.__name__} gets a tensor on {tensor.device}")
    if callable(grid):
        grid = grid(options)
    if min(grid) < 1 or max(grid) >= 2**31 or max((0, *grid[1:])) > 65535:
        raise RuntimeError(f"{kernel.__name__} is launched on a grid of {grid}")
    note_launch(kernel.__name__, tensors)


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Attention by the first enabled of torch's fused kernels that takes the dtype, in the order of
    its CUDA builds: flash, memory-efficient, cuDNN."""
    assert attn_mask is None and not dropout_p and not is_causal and scale is None
    operations = torch.ops.aten
    kernel = _attention_kernel(query.dtype)
    if kernel == "flash":
        return operations._scaled_dot_product_flash_attention(query, key, value)[0]
    gradient = torch.is_grad_enabled()
    if kernel == "efficient":
        attend = operations._scaled_dot_product_efficient_attention
    else:
        attend = operations._scaled_dot_product_cudnn_attention
    return attend(query, key, value, None, gradient)[0]


@torch.compiler.assume_constant_result
def _attention_kernel(dtype: torch.dtype) -> str:
    enabled, half = torch.backends.cuda, dtype in (torch.bfloat16, torch.float16)
    if half and enabled.flash_sdp_enabled():
        return "flash"
    if enabled.mem_efficient_sdp_enabled():
        return "efficient"
    if half and enabled.cudnn_sdp_enabled():
        return "cudnn"
    raise RuntimeError(f"no enabled attention kernel takes {dtype}")
