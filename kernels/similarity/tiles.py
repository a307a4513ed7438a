"""Parts of both passes over the matrix: one tile of it, and the tile sizes."""

import torch
import triton
import triton.language as tl

from cavmae.kernels.backend import INTERPRETED, jit
from cavmae.kernels.similarity.matrix import Similarity

LOG2_E = tl.constexpr(1.4426950408889634)


@jit
def tile(
    queries,
    candidates,
    query,
    candidate,
    query_scale,
    candidate_scale,
    query_stride,
    candidate_stride,
    width,
    BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_W: tl.constexpr,
    EVEN: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """(BLOCK_Q, BLOCK_C) products of rows that exist, times both scales, in float32."""
    column = tl.arange(0, BLOCK_W)
    query_rows = queries + query.to(tl.int64)[:, None] * query_stride + column[None, :]
    candidate_rows = candidates + candidate.to(tl.int64)[None, :] * candidate_stride
    candidate_rows += column[:, None]
    product = tl.zeros((BLOCK_Q, BLOCK_C), tl.float32)
    for first in range(0, width, BLOCK_W):
        if EVEN:
            a = tl.load(query_rows + first)
            b = tl.load(candidate_rows + first)
        else:
            a = tl.load(query_rows + first, mask=(first + column < width)[None, :], other=0.0)
            b = tl.load(candidate_rows + first, mask=(first + column < width)[:, None], other=0.0)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        product = tl.dot(a, b, product, input_precision="ieee")
    return product * query_scale[:, None] * candidate_scale[None, :]


def tile_options(similarity: Similarity) -> dict[str, int | bool]:
    """Choose tile sizes: small ones where large ones would leave a GPU idle."""
    longest = max(similarity.queries.shape[1], similarity.candidates.shape[1])
    full = similarity.queries.dtype == torch.float32
    block = min(64 if full or longest <= 1024 else 128, max(16, triton.next_power_of_2(longest)))
    width = similarity.queries.shape[2]
    step = min(32 if full else 64, max(16, triton.next_power_of_2(width)))
    even = width % step == 0
    # Square tiles of these would spill: from sm_100 on a product is read from tensor memory all at
    # once, products of float32 are made in registers, and masks of uneven widths take some as well.
    narrow = block >= 64 and (full or not even or major_capability(similarity.queries.device) >= 10)
    return {
        "BLOCK_Q": block,
        "BLOCK_C": block // 2 if narrow else block,
        "BLOCK_W": step,
        "EVEN": even,
        # The interpreter's product of bf16 is garbage (triton issue 11584).
        "UPCAST": INTERPRETED and not full,
        "num_warps": 8 if block == 128 else 4,
        "num_stages": 3,
    }


def major_capability(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
