"""The kernels of a compiled transformer block, as torch's compiler would make them, without making
them.

The block is traced, partitioned into forward and backward pass, and fused by Inductor's own
scheduler, on tensors without values. The scheduler is that of CPUs, which needs neither a GPU nor a
compiler; it fuses nearly as that of GPUs does: the test compares both.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor import compile_fx
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import ExternKernelSchedulerNode, NopKernelSchedulerNode
from torch._inductor.virtualized import V
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from cavmae.trainer.cost_model.kernel import Kernel, Pass, kernel, operation
from cavmae.trainer.model.blocks import Block, Stream


@dataclass(frozen=True)
class BlockCall:
    """A call of a block; equal ones are compiled once.

    Attributes:
        block: of these sizes; not compared.
        input_shape: (batch, tokens, width).
        input_requires_grad, grad_enabled: what autograd is to do.
        segments: see `Block.forward`, as items.
        queries: whose output is wanted; None: of all tokens.
    """

    block: Block = field(compare=False)
    input_shape: tuple[int, ...]
    input_requires_grad: bool
    grad_enabled: bool
    segments: tuple[tuple[Stream, int], ...]
    queries: int | None

    @staticmethod
    def of(
        block: Block,
        x: torch.Tensor,
        segments: dict[Stream, int] | None = None,
        query_ids: torch.Tensor | None = None,
    ) -> "BlockCall":
        """Take the arguments of `Block.forward`."""
        return BlockCall(
            block,
            tuple(x.shape),
            x.requires_grad,
            torch.is_grad_enabled(),
            tuple((segments or {}).items()),
            None if query_ids is None else query_ids.shape[1],
        )


def compiled_block(call: BlockCall) -> list[Kernel]:
    """Return the kernels of both passes; takes seconds. Fake tensors are the active mode."""
    found: list[Kernel] = []

    def lower(during: Pass, graph: torch.fx.GraphModule, _inputs: Any) -> Callable[..., Any]:
        with _disable_current_modes():
            found.extend(_kernels(during, graph))
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    backend = aot_autograd(
        fw_compiler=lambda *given: lower("forward", *given),
        bw_compiler=lambda *given: lower("backward", *given),
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table,
    )
    compiled = torch.compile(call.block, backend=backend, fullgraph=True, dynamic=False)
    weight = call.block.norm1.weight
    with torch.set_grad_enabled(call.grad_enabled):
        x = torch.empty(call.input_shape, dtype=weight.dtype).requires_grad_(
            call.input_requires_grad
        )
        ids = None
        if call.queries is not None:
            ids = torch.empty(len(x), call.queries, dtype=torch.int64)
        out = compiled(x, dict(call.segments) or None, ids)
        if out.requires_grad:
            out.backward(torch.empty_like(out))
    return found


def _kernels(during: Pass, module: torch.fx.GraphModule) -> list[Kernel]:
    """Return the kernels of a graph: products and attention by their nodes, others as fused."""
    apart = [
        _node_kernel(during, node) for node in module.graph.nodes if node.op == "call_function"
    ]
    inputs = [node.meta["val"] for node in module.graph.nodes if node.op == "placeholder"]
    fake = next(one.fake_mode for one in inputs if isinstance(one, FakeTensor))
    with V.set_fake_mode(fake):
        compile_fx._recursive_post_grad_passes(module, is_inference=False)
    graph = GraphLowering(module, example_inputs=inputs, is_inference=False)
    handlers = (
        V.set_debug_handler(DebugContext()),
        V.set_fake_mode(fake),
        V.set_graph_handler(graph),
        V.set_extern_kernel_nodes([]),
    )
    with ExitStack() as stack:
        for handler in handlers:
            stack.enter_context(handler)
        graph.run(*inputs)
        graph._update_scheduler()
        _, counted, _ = graph.count_bytes()
    fused = [
        Kernel(during, "", "other", "fused", (), "", 0, 4 * quarter)
        for node, quarter in counted
        if not isinstance(node, ExternKernelSchedulerNode | NopKernelSchedulerNode)
    ]
    return [one for one in apart if one.kind != "other"] + fused


def _node_kernel(during: Pass, node: torch.fx.Node) -> Kernel:
    # torch wraps attention that is computed again, so that its random numbers would be the same
    given = tree_leaves((node.args, node.kwargs))
    target = next((one for one in [node.target, *given] if isinstance(one, OpOverload)), None)
    inputs = [one.meta.get("val") for one in given if isinstance(one, torch.fx.Node)]
    outputs = tree_leaves(node.meta.get("val"))
    return kernel(
        during,
        "",
        operation(target) if target else "",
        [one for one in inputs if isinstance(one, torch.Tensor)],
        [one for one in outputs if isinstance(one, torch.Tensor)],
    )
