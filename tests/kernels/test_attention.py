"""Attention by every means that runs here: the same values and gradients, nothing stored."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from three_way import dtype_name, normal
from torch.utils.flop_counter import FlopCounterMode

from cavmae.kernels import attention
from cavmae.kernels.attention import segment_ends

attend: Any = attention
"""Without a type, because tests call it with a list of tensors."""

SHAPES = [(2, 3, 7, 7, 8), (1, 1, 1, 1, 4), (3, 4, 5, 9, 6), (2, 16, 130, 130, 32)]


def written_out(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    scores = query @ key.transpose(2, 3) / query.shape[3] ** 0.5
    return scores.softmax(dim=3) @ value


def gradients(operation, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The result and the gradients of all inputs."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    out = operation(*leaves)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    out.backward(upstream.to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    batch, heads, queries, tokens, head_width = shape
    sizes = (queries, tokens, tokens)
    return [normal(batch, heads, size, head_width).to(dtype) for size in sizes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", ["blocks", "sdpa"])
def test_error_is_that_of_written_out_attention_in_the_same_dtype(backend, shape, dtype) -> None:
    tensors = inputs(shape, dtype)
    truth = gradients(written_out, [tensor.double() for tensor in tensors])
    theirs = gradients(written_out, tensors)
    ours = gradients(lambda *x: attend(*x, backend=backend), tensors)
    unit = torch.finfo(dtype).eps
    for exact, one, other in zip(truth, ours, theirs, strict=True):
        scale = exact.abs().max().clamp(min=1)
        assert (one - exact).abs().max() <= (other - exact).abs().max() + 32 * unit * scale


def test_blocks_smaller_than_the_heads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = inputs((2, 5, 6, 6, 4), torch.float32)
    whole = gradients(attention, tensors)
    for heads in (1, 3):
        monkeypatch.setattr(sys.modules[attention.__module__], "BLOCK_BYTES", heads * 6 * 6 * 4)
        for one, other in zip(gradients(attention, tensors), whole, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_strided_inputs_are_read_as_they_lie() -> None:
    packed = normal(2, 6, 3, 4, 8)  # (batch, tokens, 3, heads, head width), as a projection gives
    views = [x.transpose(1, 2) for x in packed.unbind(2)]
    torch.testing.assert_close(attend(*views), written_out(*views), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["blocks", "sdpa"])
def test_segments_do_not_see_each_other(backend) -> None:
    tensors = inputs((2, 3, 9, 9, 8), torch.float32)
    lengths = [4, 2, 3]

    def apart(*x: torch.Tensor) -> torch.Tensor:
        segments = zip(*(tensor.split(lengths, dim=2) for tensor in x), strict=True)
        return torch.cat([written_out(*segment) for segment in segments], dim=2)

    together = gradients(lambda *x: attend(*x, lengths, backend=backend), tensors)
    for one, other in zip(together, gradients(apart, tensors), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_the_ends_of_packed_segments_are_those_of_every_sample() -> None:
    ends = segment_ends(2, (4, 1, 3), torch.device("cpu"))
    assert ends.dtype == torch.int32
    assert ends.tolist() == [0, 4, 5, 8, 12, 13, 16]
    assert segment_ends(2, (4, 1, 3), torch.device("cpu")) is ends, "made once"


def test_the_ends_are_a_constant_of_a_compiled_graph() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda x: x + segment_ends(2, (3, 1), x.device), backend=keep)
    assert compiled(torch.zeros(5)).tolist() == [0, 3, 4, 7, 8]
    assert [node.op for node in graphs[0].graph.nodes].count("call_function") == 1


@pytest.mark.parametrize("lengths", [None, [4, 2, 3]], ids=["one segment", "three segments"])
def test_flash_attn_gets_every_segment_of_every_sample(
    lengths: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The package needs a GPU; here its two functions are written out by what their documentation
    # says of arguments and shapes.
    def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return written_out(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    def varlen(q, k, v, ends_q, ends_k, longest_q: int, longest_k: int) -> torch.Tensor:
        assert torch.equal(ends_q, ends_k) and ends_q[-1] == len(q)
        assert longest_q == longest_k == int(ends_q.diff().max())
        pieces = [tensor.split(ends_q.diff().tolist()) for tensor in (q, k, v)]
        return torch.cat([dense(*(x[None] for x in one))[0] for one in zip(*pieces, strict=True)])

    package = SimpleNamespace(flash_attn_func=dense, flash_attn_varlen_func=varlen)
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    tensors = inputs((2, 3, 9, 9, 8), torch.float32)
    module = sys.modules[attention.__module__]
    found = module._flash_attn(*tensors, lengths or [9])
    torch.testing.assert_close(found, attend(*tensors, lengths, backend="sdpa"))


def test_no_attention_matrix_is_kept_for_the_backward_pass() -> None:
    tensors = [tensor.requires_grad_() for tensor in inputs((2, 4, 64, 64, 8), torch.float32)]
    kept: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        attend(*tensors)
    assert kept and all(tensor.shape[-1] != 64 for tensor in kept)


def test_it_compiles_without_a_break() -> None:
    tensors = inputs((2, 3, 5, 5, 8), torch.float32)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    # Not to the bit: decompositions of other versions (torch 2.11) round in another order.
    torch.testing.assert_close(gradients(compiled, tensors), gradients(attention, tensors))


def test_its_operations_are_those_of_six_products() -> None:
    counter = FlopCounterMode(display=False)
    with counter:
        gradients(attention, inputs((2, 3, 5, 7, 8), torch.float32))
    assert counter.get_total_flops() == 6 * 2 * (2 * 3) * 5 * 7 * 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[0], k, v), "query is torch.float32 on cpu of shape"),
        (lambda q, k, v: (q, k.double(), v), "key is torch.float64"),
        (lambda q, k, v: (q, k, v[:, :, 1:]), r"value \(2, 3, 4, 8\)"),
        (lambda q, k, v: (q, k, v, [2, 2]), r"lengths \[2, 2\] add up to 4"),
        (lambda q, k, v: (q[:, :, 1:], k, v, [2, 3]), "for 4 queries and 5 tokens"),
    ],
)
def test_what_does_not_fit_is_refused(change, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attend(*change(*inputs((2, 3, 5, 5, 8), torch.float32)))


def test_a_backend_that_cannot_be_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = inputs((2, 3, 5, 5, 8), torch.float32)
    with pytest.raises(ValueError, match="backend is 'cudnn'; use blocks, sdpa, sdpa-flash"):
        attend(*tensors, backend="cudnn")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="'sdpa-cudnn' and query is on cpu"):
        attend(*tensors, backend="sdpa-cudnn")
    module = sys.modules[attention.__module__]
    monkeypatch.setattr(module, "FLASH_ATTN_IS_INSTALLED", False)
    with pytest.raises(ValueError, match="'flash-attn', which is not installed"):
        attend(*tensors, backend="flash-attn")
    monkeypatch.setattr(module, "FLASH_ATTN_IS_INSTALLED", True)
    with pytest.raises(ValueError, match=r"'flash-attn' and query is torch.float32 on cpu"):
        attend(*tensors, backend="flash-attn")
