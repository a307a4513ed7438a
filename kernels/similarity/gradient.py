"""Second pass: the weights `dL/ds` of a block of queries (rows), and gradients from them.

A block's weights are stored, in bf16 for 16-bit inputs, for one matrix product of the library.
"""

import torch
import triton
import triton.language as tl

from cavmae.kernels.backend import jit
from cavmae.kernels.similarity.matrix import LARGEST_INVERSE, Similarity
from cavmae.kernels.similarity.tiles import LOG2_E, tile, tile_options


@jit
def _weights_kernel(
    queries,
    candidates,
    query_inverse,
    candidate_inverse,
    inverse_temperature,
    query_log_sum,
    candidate_log_sum,
    weights,
    first_query,
    block_queries,
    candidate_count,
    width,
    shift,
    query_group_stride,
    query_stride,
    candidate_group_stride,
    candidate_stride,
    query_inverse_stride,
    candidate_inverse_stride,
    FORWARD: tl.constexpr,
    REVERSE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_W: tl.constexpr,
    EVEN: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """`dL/ds / |candidate|` for a block of queries; a log of +inf excludes a row or column."""
    group = tl.program_id(2).to(tl.int64)
    queries += group * query_group_stride
    candidates += group * candidate_group_stride
    row = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    candidate = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    query = first_query + tl.minimum(row, block_queries - 1)
    at_candidate = tl.minimum(candidate, candidate_count - 1)
    inverse = tl.load(candidate_inverse + group * candidate_inverse_stride + at_candidate)
    scale = tl.load(inverse_temperature) * LOG2_E
    s = tile(
        queries,
        candidates,
        query,
        at_candidate,
        tl.load(query_inverse + group * query_inverse_stride + query) * scale,
        inverse,
        query_stride,
        candidate_stride,
        width,
        BLOCK_Q,
        BLOCK_C,
        BLOCK_W,
        EVEN,
        UPCAST,
    )
    one = (candidate[None, :] == query[:, None] + shift).to(tl.float32)
    weight = tl.zeros((BLOCK_Q, BLOCK_C), tl.float32)
    if FORWARD:
        log_sum = tl.load(query_log_sum + group * query_inverse_stride + query) * LOG2_E
        weight += tl.exp2(s - log_sum[:, None]) - one
    if REVERSE:
        log_sum = tl.load(candidate_log_sum + group * candidate_inverse_stride + at_candidate)
        weight += tl.exp2(s - log_sum[None, :] * LOG2_E) - one
    target = (group * block_queries + row.to(tl.int64)[:, None]) * candidate_count
    wanted = (row < block_queries)[:, None] & (candidate < candidate_count)[None, :]
    tl.store(weights + target + candidate[None, :], weight * inverse[None, :], mask=wanted)


@jit
def _project_kernel(
    direction,
    x,
    inverse,
    factor,
    out,
    alignment,
    count,
    width,
    x_group_stride,
    x_stride,
    inverse_group_stride,
    out_group_stride,
    out_stride,
    alignment_group_stride,
    LARGEST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    group = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    inside = row < count
    wanted = inside[:, None] & (column < width)[None, :]
    source = direction + (group * count + row)[:, None] * width + column[None, :]
    toward = tl.load(source, mask=wanted, other=0.0)
    one_over_norm = tl.load(inverse + group * inverse_group_stride + row, mask=inside, other=0.0)
    source = x + group * x_group_stride + row[:, None] * x_stride + column[None, :]
    unit = tl.load(source, mask=wanted, other=0.0).to(tl.float32) * one_over_norm[:, None]
    aligned = tl.sum(toward * unit, 1)
    scale = tl.load(factor)
    along = unit * aligned[:, None]  # pyright: ignore[reportArgumentType]
    along = tl.where((one_over_norm > LARGEST)[:, None], 0.0, along)
    result = (toward - along) * one_over_norm[:, None] * scale
    target = out + group * out_group_stride + row[:, None] * out_stride + column[None, :]
    tl.store(target, result, mask=wanted)
    tl.store(alignment + group * alignment_group_stride + row, aligned * scale, mask=inside)


def launch_weights(
    similarity: Similarity,
    query_log_sum: torch.Tensor | None,
    candidate_log_sum: torch.Tensor | None,
    block: slice,
    group: slice,
) -> torch.Tensor:
    """Compute `dL/ds / |candidate|` of the slices: (groups, queries, candidates)."""
    queries, candidates = similarity.queries[group], similarity.candidates[group]
    query_inverse, candidate_inverse = (
        inverse[group].contiguous()
        for inverse in (similarity.query_inverse, similarity.candidate_inverse)
    )
    groups, candidate_count, width = candidates.shape
    block_queries = block.stop - block.start
    exact = queries.dtype == torch.float32
    weights = queries.new_empty(
        groups, block_queries, candidate_count, dtype=torch.float32 if exact else torch.bfloat16
    )
    options = tile_options(similarity)
    grid = (
        triton.cdiv(block_queries, int(options["BLOCK_Q"])),
        triton.cdiv(candidate_count, int(options["BLOCK_C"])),
        groups,
    )
    _weights_kernel[grid](
        queries,
        candidates,
        query_inverse,
        candidate_inverse,
        similarity.inverse_temperature,
        query_inverse if query_log_sum is None else query_log_sum[group].contiguous(),
        query_inverse if candidate_log_sum is None else candidate_log_sum[group].contiguous(),
        weights,
        block.start,
        block_queries,
        candidate_count,
        width,
        similarity.shift,
        queries.stride(0),
        queries.stride(1),
        candidates.stride(0),
        candidates.stride(1),
        query_inverse.stride(0),
        candidate_inverse.stride(0),
        FORWARD=query_log_sum is not None,
        REVERSE=candidate_log_sum is not None,
        **options,
    )
    return weights


def launch_project(
    direction: torch.Tensor,
    x: torch.Tensor,
    inverse: torch.Tensor,
    factor: torch.Tensor,
    out: torch.Tensor,
    alignment: torch.Tensor,
) -> None:
    """Launch the kernel of `project`."""
    groups, count, width = x.shape
    columns = triton.next_power_of_2(width)
    rows_each = max(1, 2048 // columns)
    _project_kernel[(triton.cdiv(count, rows_each), groups)](
        direction,
        x,
        inverse,
        factor,
        out,
        alignment,
        count,
        width,
        x.stride(0),
        x.stride(1),
        inverse.stride(0),
        out.stride(0),
        out.stride(1),
        alignment.stride(0),
        LARGEST=LARGEST_INVERSE,
        ROWS=rows_each,
        COLUMNS=columns,
        num_warps=4,
    )


def product(weights: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """Compute `weights @ candidates`, accumulated and returned in float32.

    float16 has too few exponents for the weights, so its candidates become bf16, a part at a time.
    """
    if weights.device.type == "cpu":
        return weights.float() @ candidates.float()
    if candidates.dtype == torch.float32:
        return weights @ candidates
    if candidates.dtype == torch.bfloat16:
        return torch.bmm(weights, candidates, out_dtype=torch.float32)
    total = None
    for first in range(0, candidates.shape[1], 8192):
        part = slice(first, first + 8192)
        product = torch.bmm(
            weights[:, :, part], candidates[:, part].bfloat16(), out_dtype=torch.float32
        )
        total = product if total is None else total.add_(product)
    assert total is not None
    return total
