"""First pass: statistics of queries and candidates over all tiles, and their merging.

A grid of programs x splits goes over the tiles in a fixed order without atomics; each row of it has
a separate buffer for the candidates' partial statistics.
"""

import torch
import triton
import triton.language as tl

from cavmae.kernels.backend import jit
from cavmae.kernels.gather import row_tile
from cavmae.kernels.similarity.matrix import SMALLEST_NORM, Similarity, Statistics
from cavmae.kernels.similarity.tiles import LOG2_E, tile, tile_options

_LN_2 = tl.constexpr(0.6931471805599453)
_LOW = tl.constexpr(-1e30)  # a floor for maxima, because infinity minus infinity is NaN


@jit
def _inverse_norm_kernel(
    x,
    out,
    count,
    width,
    group_stride,
    row_stride,
    SMALLEST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    group = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    inside = row < count
    square = tl.zeros((ROWS,), tl.float32)
    for first in range(0, width, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        source = x + group * group_stride + row[:, None] * row_stride + column[None, :]
        value = tl.load(source, mask=inside[:, None] & (column < width)[None, :], other=0.0)
        value = value.to(tl.float32)
        square += tl.sum(value * value, 1)
    norm = tl.sqrt(square)
    inverse = tl.where(norm < float("inf"), 1.0 / tl.maximum(norm, SMALLEST), float("nan"))
    tl.store(out + group * count + row, inverse, mask=inside)


@jit
def _statistics_kernel(
    queries,
    candidates,
    query_inverse,
    candidate_inverse,
    inverse_temperature,
    query_parts,
    candidate_parts,
    query_count,
    candidate_count,
    width,
    shift,
    query_group_stride,
    query_stride,
    candidate_group_stride,
    candidate_stride,
    REVERSE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_W: tl.constexpr,
    EVEN: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Every `programs`-th block of queries against every `splits`-th block of candidates.

    Similarities are in base 2 here. A query's statistics stay in registers; a candidate's are kept
    in this program's part, which no other program touches.
    """
    program, split = tl.program_id(0), tl.program_id(1)
    programs, splits = tl.num_programs(0), tl.num_programs(1)
    group, groups = tl.program_id(2).to(tl.int64), tl.num_programs(2)
    queries += group * query_group_stride
    candidates += group * candidate_group_stride
    scale = tl.load(inverse_temperature) * LOG2_E
    query_plane = groups.to(tl.int64) * splits * query_count
    candidate_plane = groups.to(tl.int64) * programs * candidate_count
    query_part = query_parts + (split * groups + group) * query_count
    candidate_part = candidate_parts + (program * groups + group) * candidate_count

    for block in range(program, tl.cdiv(query_count, BLOCK_Q), programs):
        query = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
        is_query = query < query_count
        at_query = tl.minimum(query, query_count - 1)
        query_scale = tl.load(query_inverse + group * query_count + at_query) * scale
        top = tl.full((BLOCK_Q,), _LOW, tl.float32)
        total = tl.zeros((BLOCK_Q,), tl.float32)
        hardest = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
        positive = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
        for candidate_block in range(split, tl.cdiv(candidate_count, BLOCK_C), splits):
            candidate = candidate_block * BLOCK_C + tl.arange(0, BLOCK_C)
            is_candidate = candidate < candidate_count
            at_candidate = tl.minimum(candidate, candidate_count - 1)
            s = tile(
                queries,
                candidates,
                at_query,
                at_candidate,
                query_scale,
                tl.load(candidate_inverse + group * candidate_count + at_candidate),
                query_stride,
                candidate_stride,
                width,
                BLOCK_Q,
                BLOCK_C,
                BLOCK_W,
                EVEN,
                UPCAST,
            )
            s = tl.where(is_query[:, None] & is_candidate[None, :], s, float("-inf"))
            pair = candidate[None, :] == query[:, None] + shift
            others = tl.where(pair, float("-inf"), s)
            own = tl.max(tl.where(pair, s, float("-inf")), 1)
            best = tl.max(others, 1)
            positive = tl.maximum(positive, own)
            hardest = tl.maximum(hardest, best)
            new_top = tl.maximum(top, tl.maximum(own, best))
            total = total * tl.exp2(top - new_top) + tl.sum(tl.exp2(s - new_top[:, None]), 1)
            top = new_top
            if REVERSE:
                best = tl.max(others, 0)
                tile_top = tl.maximum(tl.max(s, 0), _LOW)
                log_sum = tile_top + tl.log2(tl.sum(tl.exp2(s - tile_top[None, :]), 0))
                # This program's first block of queries finds nothing there yet.
                again = candidate < tl.where(block == program, 0, candidate_count)
                kept = candidate_part + candidate
                before = tl.load(kept, mask=again, other=float("-inf")) * LOG2_E
                best_before = tl.load(kept + candidate_plane, mask=again, other=float("-inf"))
                high = tl.maximum(tl.maximum(before, log_sum), _LOW)
                log_sum = high + tl.log2(tl.exp2(before - high) + tl.exp2(log_sum - high))
                tl.store(kept, log_sum * _LN_2, mask=is_candidate)
                best = tl.maximum(best_before, best * _LN_2)
                tl.store(kept + candidate_plane, best, mask=is_candidate)
        place = query_part + query
        tl.store(place, (top + tl.log2(total)) * _LN_2, mask=is_query)
        tl.store(place + query_plane, hardest * _LN_2, mask=is_query)
        tl.store(place + 2 * query_plane, positive * _LN_2, mask=is_query)
        tl.debug_barrier()  # the next block reads the candidates' part that this one wrote


@jit
def _merged_maximum(place, parts, part_stride, mask):
    top = tl.load(place, mask=mask, other=0.0)
    for part in range(1, parts):
        top = tl.maximum(top, tl.load(place + part * part_stride, mask=mask, other=0.0))
    return top


@jit
def _merged_log_sum(place, parts, part_stride, mask):
    """Merge logs of sums of exp over parts, in the order of the parts."""
    top = tl.maximum(_merged_maximum(place, parts, part_stride, mask), _LOW)
    total = top * 0.0
    for part in range(parts):
        total += tl.exp(tl.load(place + part * part_stride, mask=mask, other=0.0) - top)
    return top + tl.log(total)


@jit
def _merge_kernel(
    query_parts,
    candidate_parts,
    query_log_sum,
    candidate_log_sum,
    terms,
    query_part_count,
    candidate_part_count,
    query_count,
    candidate_count,
    shift,
    first_query,
    pairs,
    REVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    group, groups = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    part_stride = groups.to(tl.int64) * query_count
    plane = part_stride * query_part_count
    term_plane = groups.to(tl.int64) * pairs

    here = index < query_count
    place = query_parts + group * query_count + index
    log_sum = _merged_log_sum(place, query_part_count, part_stride, here)
    hardest = _merged_maximum(place + plane, query_part_count, part_stride, here)
    positive = _merged_maximum(place + 2 * plane, query_part_count, part_stride, here)
    pair = index - first_query
    paired = (pair >= 0) & (pair < pairs)
    kept = tl.where(paired, log_sum, float("inf"))
    tl.store(query_log_sum + group * query_count + index, kept, mask=here)
    term = terms + group * pairs + pair
    tl.store(term, log_sum - positive, mask=paired)
    tl.store(term + term_plane, (positive > hardest).to(tl.float32), mask=paired)
    if REVERSE:
        here = index < candidate_count
        stride = groups.to(tl.int64) * candidate_count
        place = candidate_parts + group * candidate_count + index
        log_sum = _merged_log_sum(place, candidate_part_count, stride, here)
        hardest = _merged_maximum(
            place + stride * candidate_part_count, candidate_part_count, stride, here
        )
        query = index - shift
        pair = query - first_query
        paired = (pair >= 0) & (pair < pairs)
        place = query_parts + 2 * plane + group * query_count + query
        positive = _merged_maximum(place, query_part_count, part_stride, paired)
        kept = tl.where(paired, log_sum, float("inf"))
        tl.store(candidate_log_sum + group * candidate_count + index, kept, mask=here)
        term = terms + 2 * term_plane + group * pairs + pair
        tl.store(term, log_sum - positive, mask=paired)
        tl.store(term + term_plane, (positive > hardest).to(tl.float32), mask=paired)


def launch_inverse_norms(x: torch.Tensor) -> torch.Tensor:
    """Launch the kernel of `inverse_norms`."""
    groups, count, width = x.shape
    out = x.new_empty(groups, count, dtype=torch.float32)
    columns, rows_each = row_tile(x)
    _inverse_norm_kernel[(triton.cdiv(count, rows_each), groups)](
        x,
        out,
        count,
        width,
        x.stride(0),
        x.stride(1),
        SMALLEST=SMALLEST_NORM,
        ROWS=rows_each,
        COLUMNS=columns,
        num_warps=4,
    )
    return out


def launch_statistics(similarity: Similarity, reverse: bool) -> Statistics:
    """Launch the kernels of `statistics`: over tiles, and the one that merges their parts."""
    queries, candidates = similarity.queries, similarity.candidates
    groups, query_count, width = queries.shape
    candidate_count = candidates.shape[1]
    options = tile_options(similarity)
    query_blocks = triton.cdiv(query_count, int(options["BLOCK_Q"]))
    candidate_blocks = triton.cdiv(candidate_count, int(options["BLOCK_C"]))
    splits = min(candidate_blocks, 4)
    programs = min(query_blocks, max(1, _programs(queries.device) // (splits * groups)))
    # Log of the sum and hardest negative of each part, in float32, and the queries' positive.
    new_empty = similarity.query_inverse.new_empty
    query_parts = new_empty(3, splits, groups, query_count)
    candidate_parts = new_empty(2, programs, groups, candidate_count) if reverse else query_parts
    _statistics_kernel[(programs, splits, groups)](
        queries,
        candidates,
        similarity.query_inverse.contiguous(),  # a block's are a slice of every group's
        similarity.candidate_inverse.contiguous(),
        similarity.inverse_temperature,
        query_parts,
        candidate_parts,
        query_count,
        candidate_count,
        width,
        similarity.shift,
        queries.stride(0),
        queries.stride(1),
        candidates.stride(0),
        candidates.stride(1),
        REVERSE=reverse,
        **options,
    )
    query_log_sum = new_empty(groups, query_count)
    candidate_log_sum = new_empty(groups, candidate_count) if reverse else None
    paired = similarity.paired
    pairs = paired.stop - paired.start
    terms = new_empty(1 + reverse, 2, groups * pairs)
    longest = max(query_count, candidate_count) if reverse else query_count
    block = 128
    _merge_kernel[(triton.cdiv(longest, block), groups)](
        query_parts,
        candidate_parts,
        query_log_sum,
        query_log_sum if candidate_log_sum is None else candidate_log_sum,
        terms,
        splits,
        programs,
        query_count,
        candidate_count,
        similarity.shift,
        paired.start,
        pairs,
        REVERSE=reverse,
        BLOCK=block,
        num_warps=4,
    )
    return Statistics(query_log_sum, candidate_log_sum, terms)


def _programs(device: torch.device) -> int:
    """Return two for each multiprocessor: one multiplies while the other adds up."""
    if device.type != "cuda":
        return 8
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count
