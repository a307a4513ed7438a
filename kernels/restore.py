"""The decoder's input: kept tokens back at their places, the mask token everywhere else.

Un-shuffling, mask tokens, positions and modality are one pass over the output. The backward pass
reads the gradient once as well: it writes the kept tokens' rows and adds up, for each token, what
the samples of a part of the batch send to its position; the parts are added in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from cavmae.kernels.backend import Backend, check_floats, choose_backend, has_values, jit
from cavmae.kernels.gather import row_tile

BATCH_PARTS = 8
"""Parts of the batch whose position gradients are added up apart; more of them keep more of a GPU
busy and take `BATCH_PARTS * tokens * width * 4` bytes."""


def restore_tokens(
    x: torch.Tensor,
    restore_ids: torch.Tensor,
    mask_token: torch.Tensor,
    position: torch.Tensor,
    modality: torch.Tensor,
    *,
    backend: Backend | None = None,
) -> torch.Tensor:
    """`out[b, t] = (x[b, p] if p < kept else mask_token) + position[t] + modality[t]` with
    `p = restore_ids[b, t]`.

    Bytes moved: kept rows read, all rows written; backward, all rows read and kept rows written.

    Args:
        x: (batch, kept, width) float, kept tokens in mask order.
        restore_ids: (batch, tokens) int64: the place of each token in `x`; `kept` or more stands
            for a token that was removed. Each place below `kept` comes once in a row.
        mask_token: (1, 1, width).
        position: (1, tokens, width).
        modality: (1, 1, width), or (1, tokens, width) where the tokens are of both modalities.
        backend: see `cavmae.kernels.backend`.

    Returns:
        (batch, tokens, width), dtype of `x`; the Triton kernel adds in float32.

    Raises:
        ValueError: shapes, dtypes or devices that don't fit; a place below 0 (on a GPU: NaN).
    """
    tensors = {"x": x, "restore_ids": restore_ids, "mask_token": mask_token}
    chosen = choose_backend(backend, **tensors, position=position, modality=modality)
    _check_shapes(x, restore_ids, mask_token, position, modality)
    if chosen == "torch":
        return _reference(x, restore_ids, mask_token, position, modality)
    check_floats(x=x, mask_token=mask_token, position=position, modality=modality)
    # A sum of transposed tensors is transposed as well; the kernel reads rows.
    table = (position[0].float() + modality[0].float()).contiguous()  # (tokens, width)
    return _RestoreTokens.apply(x, restore_ids, mask_token, table)


def _check_shapes(
    x: torch.Tensor,
    restore_ids: torch.Tensor,
    mask_token: torch.Tensor,
    position: torch.Tensor,
    modality: torch.Tensor,
) -> None:
    if x.ndim != 3:
        raise ValueError(f"x has shape {tuple(x.shape)}; it has to be (batch, kept, width)")
    batch, kept, width = x.shape
    if restore_ids.ndim != 2 or len(restore_ids) != batch or restore_ids.dtype != torch.int64:
        raise ValueError(
            f"restore_ids are {restore_ids.dtype} of shape {tuple(restore_ids.shape)}; they have "
            f"to be int64 of shape ({batch}, tokens)"
        )
    tokens = restore_ids.shape[1]
    if kept > tokens:
        raise ValueError(f"x has {kept} kept tokens and restore_ids only {tokens} in all")
    if has_values(restore_ids) and int(restore_ids.min()) < 0:
        raise ValueError(f"restore_ids holds {int(restore_ids.min())}; places go from 0")
    allowed = {
        "mask_token": (mask_token, ((1, 1, width),)),
        "position": (position, ((1, tokens, width),)),
        "modality": (modality, ((1, 1, width), (1, tokens, width))),
    }
    for name, (tensor, shapes) in allowed.items():
        if tuple(tensor.shape) not in shapes:
            expected = " or ".join(map(str, shapes))
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it has to be {expected}")


def _reference(
    x: torch.Tensor,
    restore_ids: torch.Tensor,
    mask_token: torch.Tensor,
    position: torch.Tensor,
    modality: torch.Tensor,
) -> torch.Tensor:
    batch, kept, width = x.shape
    full = torch.cat([x, mask_token.to(x.dtype).expand(batch, 1, width)], 1)
    places = restore_ids.clamp(max=kept)[:, :, None].expand(-1, -1, width)
    return full.gather(1, places) + (position + modality).to(x.dtype)


@jit
def _restore_kernel(
    x,
    restore_ids,
    mask_token,
    table,
    out,
    rows,
    tokens,
    kept,
    width,
    x_batch_stride,
    x_token_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    inside = row < rows
    batch, token = row // tokens, row % tokens
    place = tl.load(restore_ids + row, mask=inside, other=0)
    seen = (place >= 0) & (place < kept)
    source = x + batch * x_batch_stride + place * x_token_stride
    for first in range(0, width, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        there = (column < width)[None, :]
        wanted = inside[:, None] & there
        value = tl.load(source[:, None] + column[None, :], mask=wanted & seen[:, None], other=0.0)
        missing = tl.load(mask_token + column[None, :], mask=there, other=0.0).to(tl.float32)
        added = tl.load(table + token[:, None] * width + column[None, :], mask=wanted, other=0.0)
        value = tl.where(seen[:, None], value.to(tl.float32), missing) + added
        value = tl.where((place >= 0)[:, None], value, float("nan"))
        tl.store(out + row[:, None] * width + column[None, :], value, mask=wanted)


@jit
def _restore_backward_kernel(
    grad,
    restore_ids,
    grad_x,
    table_parts,
    mask_parts,
    batch,
    tokens,
    kept,
    width,
    grad_batch_stride,
    grad_token_stride,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One block of tokens and columns over one part of the batch."""
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    part = tl.program_id(1).to(tl.int64)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    inside = token < tokens
    wanted = inside[:, None] & (column < width)[None, :]
    to_table = tl.zeros((ROWS, COLUMNS), tl.float32)
    to_mask = tl.zeros((ROWS, COLUMNS), tl.float32)
    samples = tl.cdiv(batch, PARTS)
    for sample in range(part * samples, tl.minimum(batch, (part + 1) * samples)):
        place = tl.load(restore_ids + sample * tokens + token, mask=inside, other=0)
        source = grad + sample * grad_batch_stride + token * grad_token_stride
        value = tl.load(source[:, None] + column[None, :], mask=wanted, other=0.0)
        seen = (place >= 0) & (place < kept)
        target = grad_x + (sample * kept + place) * width
        tl.store(target[:, None] + column[None, :], value, mask=wanted & seen[:, None])
        exact = value.to(tl.float32)
        to_table += exact
        to_mask += tl.where(seen[:, None], 0.0, exact)
    target = (part * tokens + token)[:, None] * width + column[None, :]
    tl.store(table_parts + target, to_table, mask=wanted)
    block = part * tl.num_programs(0) + tl.program_id(0)
    tl.store(mask_parts + block * width + column, tl.sum(to_mask, 0), mask=column < width)


class _RestoreTokens(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx,
        x: torch.Tensor,
        restore_ids: torch.Tensor,
        mask_token: torch.Tensor,
        table: torch.Tensor,
    ) -> torch.Tensor:
        x = x if x.stride(2) == 1 else x.contiguous()
        restore_ids = restore_ids.contiguous()
        ctx.save_for_backward(restore_ids)
        ctx.kept, ctx.mask_dtype = x.shape[1], mask_token.dtype
        batch, kept, width = x.shape
        tokens = restore_ids.shape[1]
        out = x.new_empty(batch, tokens, width)
        columns, rows_each = row_tile(x)
        if out.numel():
            _restore_kernel[(triton.cdiv(batch * tokens, rows_each),)](
                x,
                restore_ids,
                mask_token.contiguous(),
                table,
                out,
                batch * tokens,
                tokens,
                kept,
                width,
                x.stride(0),
                x.stride(1),
                ROWS=rows_each,
                COLUMNS=columns,
                num_warps=4,
            )
        return out

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx, grad: torch.Tensor
    ) -> tuple[torch.Tensor, None, torch.Tensor, torch.Tensor]:
        (restore_ids,) = ctx.saved_tensors
        grad = grad if grad.stride(2) == 1 else grad.contiguous()
        batch, tokens, width = grad.shape
        columns, rows_each = row_tile(grad)
        rows_each = max(1, rows_each // 2)  # two sums of a tile are held in registers
        blocks = triton.cdiv(tokens, rows_each)
        grad_x = grad.new_empty(batch, ctx.kept, width)
        table_parts = grad.new_empty(BATCH_PARTS, tokens, width, dtype=torch.float32)
        mask_parts = grad.new_empty(BATCH_PARTS * blocks, width, dtype=torch.float32)
        if grad.numel():
            _restore_backward_kernel[(blocks, BATCH_PARTS, triton.cdiv(width, columns))](
                grad,
                restore_ids,
                grad_x,
                table_parts,
                mask_parts,
                batch,
                tokens,
                ctx.kept,
                width,
                grad.stride(0),
                grad.stride(1),
                PARTS=BATCH_PARTS,
                ROWS=rows_each,
                COLUMNS=columns,
                num_warps=4,
            )
        mask_grad = mask_parts.sum(0)[None, None].to(ctx.mask_dtype)
        return grad_x, None, mask_grad, table_parts.sum(0)
