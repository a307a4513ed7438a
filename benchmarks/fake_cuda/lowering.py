"""Inductor for the fake device: which kernels it would make of a compiled block, and their bytes.

Everything up to the code of the kernels is Inductor's own work for this GPU: partition of forward
and backward pass, passes over the graphs, fusion. The kernels are then neither compiled nor run:
each call of a graph notes them in the current trace.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch._functorch.config
import torch._inductor.config
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._inductor import compile_fx
from torch._inductor.debug import DebugContext
from torch._inductor.fx_passes import joint_graph
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import (
    BaseSchedulerNode,
    ExternKernelSchedulerNode,
    NopKernelSchedulerNode,
)
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from cavmae.benchmarks.fake_cuda.trace import note_fused, noting_only


def install() -> None:
    """Let `torch.compile` lower for the fake device, for the rest of the process."""
    inductor: Any = compile_fx
    inductor.compile_fx = partial(inductor.compile_fx, inner_compile=_lower)
    # Patterns of attention that is written out, and padding that is chosen by timing products.
    patterns: Any = joint_graph
    patterns.lazy_init = lambda device: None
    config: Any = torch
    config._inductor.config.joint_graph_constant_folding = False  # it would compute on the device
    config._inductor.config.compile_threads = 1
    config._inductor.config.fx_graph_cache = False
    config._functorch.config.enable_autograd_cache = False


def _lower(graph: torch.fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
    inputs = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
    inference = bool(options.get("is_inference"))
    fake_mode = next(value.fake_mode for value in inputs if isinstance(value, FakeTensor))
    handlers = (V.set_debug_handler(DebugContext()), V.set_fake_mode(fake_mode))
    with _disable_current_modes(), handlers[0], handlers[1]:
        compile_fx._recursive_record_original_output_strides(graph)
        compile_fx._recursive_post_grad_passes(graph, is_inference=inference)
        lowering = GraphLowering(graph, example_inputs=inputs, is_inference=inference)
        with V.set_graph_handler(lowering), V.set_extern_kernel_nodes([]):
            lowering.run(*inputs)
            lowering.codegen()
            fused = [
                (node.get_name(), node.get_read_write_buffers_sizes())
                for node in lowering.scheduler.nodes
                if _is_kernel_of_inductor(node)
            ]

    def call(*values: Any) -> Any:
        for name, size in fused:
            note_fused(name, size)
        with noting_only("product", "attention", "triton"):
            return graph.forward(*values)

    return make_boxed_func(call)


def _is_kernel_of_inductor(node: BaseSchedulerNode) -> bool:
    return not isinstance(node, ExternKernelSchedulerNode | NopKernelSchedulerNode)
