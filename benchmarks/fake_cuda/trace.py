"""What a step does on the device: its operations, copies and waits, without computing any of it.

Counts are of eager operations as the host issues them; a compiled block counts by the kernels that
Inductor makes of it (`lowering.py`).
"""

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Literal

import torch
from torch._higher_order_ops.triton_kernel_wrap import (
    kernel_side_table,
    triton_kernel_wrapper_mutation,
)
from torch._ops import HigherOrderOperator
from torch._prims.rng_prims import graphsafe_run_with_rng_state
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry
from triton.runtime.jit import JITFunction

Kind = Literal["product", "attention", "triton", "fused", "collective", "other"]

_GATHERS = ("gather", "index", "index_select", "embedding")
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_scaled_mm")
_OVERWRITING = ("copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_")
_NO_KERNEL = [
    "detach",
    "set_",
    "_reshape_alias",
    "_unsafe_view",
    "lift_fresh",
    "resize_",
    "record_stream",
]
_WAITING = ("nonzero", "masked_select", "_unique2", "unique_dim", "repeat_interleave")
_CHUNK_ELEMENTS, _MOST_BLOCKS, _MOST_TENSORS = 65536, 320, (110, 64, 48, 36, 30)
"""Of a launch over many tensors: aten/src/ATen/native/cuda/MultiTensorApply.cuh."""


@dataclass(frozen=True)
class Operation:
    """Work that the host gives to the device.

    Attributes:
        name: of the operation (`aten.mm`), or of the Triton kernel.
        kind: product of matrices, attention, a Triton kernel of ours, a kernel that Inductor fused,
            or anything else.
        phase: see `Trace.phase`.
        shapes: of the tensors it reads and writes in place.
        dtype: of the first of them.
        bytes: of all tensors that it reads and writes, each counted once; of a gather, only what
            it takes.
        flops: of products and attention.
        kernels: that it launches: 1, for lists of tensors as many as torch's launcher needs.
    """

    name: str
    kind: Kind
    phase: str
    shapes: tuple[tuple[int, ...], ...]
    dtype: str
    bytes: int
    flops: int
    kernels: int


@dataclass(frozen=True)
class Copy:
    """A copy between the host's memory and the device's.

    Attributes:
        to_device: its direction.
        phase: see `Trace.phase`.
        shape: of the tensor.
        bytes: of the tensor.
        non_blocking, pinned: how it was asked for, and where the host's side lies. With both, the
            host goes on at once.
        where: `file:line` of the code that asked for it.
    """

    to_device: bool
    phase: str
    shape: tuple[int, ...]
    bytes: int
    non_blocking: bool
    pinned: bool
    where: str


@dataclass(frozen=True)
class Wait:
    """A place where the host waits for the device.

    Attributes:
        what: the operation.
        phase: see `Trace.phase`.
        where: `file:line` of the code that asked for it.
        function: its name.
    """

    what: str
    phase: str
    where: str
    function: str


@dataclass
class Trace:
    """What happened on the device, in order; it can be pickled."""

    operations: list[Operation] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)
    waits: list[Wait] = field(default_factory=list)
    _phase: str = ""

    def begin_phase(self, name: str) -> None:
        """Name what is noted from now on."""
        self._phase = name

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Name what is noted inside; the name before it is then that of what follows."""
        before, self._phase = self._phase, name
        try:
            yield
        finally:
            self._phase = before

    def of(self, *kinds: Kind, phase: str | None = None) -> list[Operation]:
        """Return the operations of some kinds (none: of all), in a phase (None: in all)."""
        return [
            operation
            for operation in self.operations
            if (not kinds or operation.kind in kinds) and phase in (None, operation.phase)
        ]


_KNOWN_ELEMENTS = 4096
"""Whole numbers of tensors of this size are followed through operations on the device."""

_FAKE = FakeTensorMode(allow_non_fake_inputs=True)
_current: list[Trace] = []


@contextmanager
def traced() -> Iterator[Trace]:
    """Note what is done with tensors on `cuda`, which have no values; those of the host have.

    The host can read back what follows from the whole numbers of small tensors that it copied
    there. All other values are read as 0; a collective leaves each rank its own values.
    """
    trace = Trace()
    with _FAKE, _Recorder(trace):
        _current.append(trace)
        try:
            yield trace
        finally:
            _current.remove(trace)


def without_values() -> FakeTensorMode:
    """Context in which tensors of the host have no values either, for models too large for it."""
    return _FAKE


def note_launch(name: str, tensors: Sequence[torch.Tensor]) -> None:
    """Note the launch of a Triton kernel that gets these tensors, and may write to them."""
    tensor: Any
    for tensor in tensors:
        tensor.known = None
    for trace in _current:
        trace.operations.append(_operation(name, "triton", trace._phase, tensors, tensors, 0, 1))


def note_fused(name: str, size: int) -> None:
    """Note a kernel that Inductor fused, which reads and writes `size` bytes."""
    for trace in _current:
        trace.operations.append(Operation(name, "fused", trace._phase, (), "", size, 0, 1))


@contextmanager
def noting_only(*kinds: Kind) -> Iterator[None]:
    """Note operations of these kinds alone: what Inductor does not fuse."""
    before = [len(trace.operations) for trace in _current]
    yield
    for trace, count in zip(_current, before, strict=True):
        new = trace.operations[count:]
        trace.operations[count:] = [operation for operation in new if operation.kind in kinds]


def note_wait(what: str) -> None:
    """Note that the host waits."""
    for trace in _current:
        trace.waits.append(Wait(what, trace._phase, *_caller()))


def _caller() -> tuple[str, str]:
    """`file:line` and function of the innermost code that is neither torch's nor this folder's."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if not module.startswith(("torch.", "cavmae.benchmarks.fake_cuda", "contextlib")):
            return f"{module.replace('.', '/')}.py:{frame.f_lineno}", frame.f_code.co_name
        frame = frame.f_back
    return "", ""


def _operation(
    name: str,
    kind: Kind,
    phase: str,
    tensors: Sequence[torch.Tensor],
    touched: Sequence[torch.Tensor],
    flops: int,
    kernels: int,
) -> Operation:
    return Operation(
        name,
        kind,
        phase,
        tuple(tuple(tensor.shape) for tensor in tensors),
        str(tensors[0].dtype).removeprefix("torch.") if tensors else "",
        sum(map(_bytes, touched)),
        flops,
        kernels,
    )


def _bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's values; those that it repeats count once."""
    counts = [n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or n < 2]
    return math.prod(counts) * tensor.element_size()


class _Recorder(TorchDispatchMode):
    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self._trace = trace
        self._pinned: dict[int, Any] = {}

    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if isinstance(func, HigherOrderOperator):
            if func is triton_kernel_wrapper_mutation:
                kernel: Any = kernel_side_table.get_kernel(kwargs["kernel_idx"])
                while not isinstance(kernel, JITFunction):
                    kernel = kernel.fn
                values = kwargs["kwargs"].values()
                note_launch(kernel.__name__, [x for x in values if isinstance(x, torch.Tensor)])
            if func is graphsafe_run_with_rng_state:  # around attention that is recomputed
                kwargs.pop("rng_state")
                func, *args = args
            else:
                return func(*args, **kwargs)
        short = func._overloadpacket.__name__
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if short == "is_pinned":
            return self._is_pinned(given[0])
        if short == "_pin_memory":
            with _mode_of(given[0]):
                return self._pin(given[0].clone())
        if short == "_local_scalar_dense" and isinstance(given[0], FakeTensor):
            return read_list(given[0], "item")
        pin = kwargs.pop("pin_memory", False)
        device = torch.device(kwargs.get("device") or (given[0].device if given else "cpu"))
        if device.type == "cpu" and not any(isinstance(tensor, FakeTensor) for tensor in given):
            with unset_fake_temporarily():
                result = func(*args, **kwargs)
            return self._pin(result) if pin else result
        devices = {tensor.device.type for tensor in given} | {device.type}
        if short in ("_to_copy", "copy_") and len(devices) > 1:
            return self._copy(func, args, kwargs, device)
        if short in _WAITING and device.type == "cuda":  # the size of the result is a value
            note_wait(short)
            args, kwargs = tree_map_only(torch.Tensor, _value, (args, kwargs))
            with unset_fake_temporarily():
                result = func(*args, **kwargs)
            return tree_map_only(torch.Tensor, lambda x: _without_values(x).to(device), result)
        known = _on_the_host(func, args, kwargs, given)
        args, kwargs = tree_map_only(torch.Tensor, _without_values, (args, kwargs))
        result = func(*args, **kwargs)
        made: list[Any] = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        for tensor, value in zip(made, known, strict=False):
            tensor.known = value
        if short == "allgather_":
            for outputs, own in zip(args[0], args[1], strict=True):
                for output in outputs:
                    output.known = getattr(own, "known", None)
        if "cuda" in {tensor.device.type for tensor in given + made}:
            self._note_operation(func, args, kwargs, result, given, made)
        return result

    def _pin(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        self._pinned[storage._cdata] = storage  # kept, so that no other one gets its address
        return tensor

    def _is_pinned(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._pinned

    def _copy(self, func: Any, args: Any, kwargs: Any, device: torch.device) -> torch.Tensor:
        """Copy between host and device; what comes back are the values that are known, else 0."""
        in_place = func._overloadpacket.__name__ == "copy_"
        source: torch.Tensor = args[1] if in_place else args[0]
        to_device = device.type == "cuda"
        non_blocking = bool(kwargs.get("non_blocking", len(args) > 2 and args[2]))
        # torch allocates pinned memory for a copy that need not be waited for.
        host = source if to_device else args[0] if in_place else None
        pinned = non_blocking if host is None else self._is_pinned(host)
        self._trace.copies.append(
            Copy(
                to_device,
                self._trace._phase,
                tuple(source.shape),
                _bytes(source),
                non_blocking,
                pinned,
                _caller()[0],
            )
        )
        if source.numel() and not (non_blocking and pinned):
            note_wait(f"copy {'to' if to_device else 'from'} the device")
        if not to_device:
            value = _value(source)
            with unset_fake_temporarily():
                return func(args[0], value) if in_place else func(value, **kwargs)
        value = source
        args, kwargs = tree_map_only(torch.Tensor, _without_values, (args, kwargs))
        result = func(*args, **kwargs)
        small = value.numel() <= _KNOWN_ELEMENTS and not result.dtype.is_floating_point
        if small and not isinstance(value, FakeTensor):
            with unset_fake_temporarily():
                result.known = value.to(result.dtype, copy=True)
        return result

    def _note_operation(
        self,
        func: Any,
        args: Any,
        kwargs: Any,
        result: Any,
        given: list[torch.Tensor],
        made: list[torch.Tensor],
    ) -> None:
        schema, packet = func._schema, func._overloadpacket
        short = packet.__name__
        aliases = [value.alias_info for value in schema.returns]
        if func.namespace == "prim" or short in _NO_KERNEL or "empty" in short:
            return
        if aliases and all(alias is not None and not alias.is_write for alias in aliases):
            return  # a view
        written: list[torch.Tensor] = []
        lists: list[list[torch.Tensor]] = []
        for position, argument in enumerate(schema.arguments):
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            if argument.alias_info is not None and argument.alias_info.is_write:
                written += [x for x in tree_leaves(value) if isinstance(x, torch.Tensor)]
            if isinstance(value, list | tuple) and value and isinstance(value[0], torch.Tensor):
                lists.append(list(value))
        overwritten = {id(tensor) for tensor in written if short in _OVERWRITING}
        reads = [tensor for tensor in given if id(tensor) not in overwritten]
        if short in _GATHERS:
            reads = [*reads[1:], made[0]]
        touched = [*reads, *(made if not written else [])]
        touched += [tensor for tensor in written if schema.name.startswith("aten::")]
        kind: Kind = "other"
        flops = 0
        if func.namespace == "c10d":
            kind = "collective"
        elif short in _PRODUCTS:
            kind, flops = "product", 2 * made[0].numel() * given[-1].shape[-2]
        elif packet in flop_registry:
            kind, flops = "attention", flop_registry[packet](*args, **kwargs, out_val=result)
        kernels = 1
        if short.startswith(("_foreach", "_fused")) and lists:
            kernels = _multi_tensor_launches(lists[0], len(lists))
        self._trace.operations.append(
            _operation(
                short,
                kind,
                self._trace._phase,
                given or made,
                [tensor for tensor in touched if tensor.device.type == "cuda"],
                flops,
                kernels,
            )
        )


def _multi_tensor_launches(tensors: Sequence[torch.Tensor], depth: int) -> int:
    """Launches over lists of tensors: each takes a limited number of tensors and of chunks."""
    most = _MOST_TENSORS[min(depth, len(_MOST_TENSORS)) - 1]
    launches = held = blocks = 0
    for tensor in tensors:
        if not tensor.numel():
            continue
        held += 1
        left = math.ceil(tensor.numel() / _CHUNK_ELEMENTS)
        while left:
            taken = min(left, _MOST_BLOCKS - blocks)
            left, blocks = left - taken, blocks + taken
            if blocks == _MOST_BLOCKS or (not left and held == most):
                launches += 1
                blocks, held = 0, 1 if left else 0
    return launches + (blocks > 0)


def _mode_of(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    return nullcontext() if isinstance(tensor, FakeTensor) else unset_fake_temporarily()


def _without_values(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if isinstance(tensor, FakeTensor) else _FAKE.from_tensor(tensor)


def _on_the_host(
    func: Any, args: Any, kwargs: Any, given: list[torch.Tensor]
) -> list[torch.Tensor | None]:
    """Compute an operation on the host if it is small and its inputs' values are known."""
    everything: list[Any] = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    writes = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
    known = all(getattr(x, "known", None) is not None for x in given)
    computed = func.namespace == "aten" and "empty" not in func._overloadpacket.__name__
    if not known or not given or not computed:
        if writes and func.namespace != "c10d":
            for tensor in everything:
                tensor.known = None
        return []
    options = {k: torch.device("cpu") if k == "device" else v for k, v in kwargs.items()}
    inputs, options = tree_map_only(torch.Tensor, attrgetter("known"), (args, options))
    with unset_fake_temporarily():
        result = func(*inputs, **options)
    return [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]


def _value(tensor: torch.Tensor) -> torch.Tensor:
    """What the host reads of a tensor: the values that it knows, else 0."""
    known = getattr(tensor, "known", None)
    if known is not None:
        return known
    with unset_fake_temporarily():
        return torch.zeros(tensor.shape, dtype=tensor.dtype)


def read_list(tensor: torch.Tensor, what: str) -> Any:
    """Read a tensor as `tolist` does, in one piece; `what` is noted if it is on the device."""
    if tensor.device.type == "cuda":
        note_wait(what)
    value = _value(tensor)
    with unset_fake_temporarily():
        return value.tolist()
