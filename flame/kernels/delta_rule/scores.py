"""Decayed scores between the rows of a chunk, safe for any decay.

A decay per channel cannot be factored as ``exp(R_i) exp(-G_j)`` over a chunk: the second factor overflows. The chunk is
halved again and again; rows of a right half meet those of the left half through the pivot at the left half's end, where
both exponents are <= 0, and only blocks of eight rows are formed channel by channel (GLA, Yang et al., 2312.06635).
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 8  # rows of the smallest diagonal block


def scores(rows: Tensor, columns: Tensor, read: Tensor | None, write: Tensor | None, strict: bool) -> Tensor:
    """sum_c rows_ic columns_jc exp(read_i - write_j)_c for j <= i (j < i if strict), else 0: [B, M, H, C, C].

    rows, columns [B, M, H, C, K]; read, write: cumulative log decays [B, M, H, C, 1 | K], or None for no decay.
    """
    diagonal = -1 if strict else 0
    if read is None or write is None:
        return (rows @ columns.mT).tril(diagonal)
    if read.shape[-1] == 1 and rows.shape[-1] != 1:
        return (rows @ columns.mT) * _lower_exp(read - write.mT, diagonal)
    return _channel_scores(rows, columns, read, write, diagonal)


def _lower_exp(exponent: Tensor, diagonal: int) -> Tensor:
    """exp below the diagonal of axes 3 and 4, 0 above: masked before exp, which would overflow."""
    keep = torch.ones(exponent.shape[3:5], dtype=torch.bool, device=exponent.device).tril(diagonal)
    return exponent.masked_fill(~keep.view(*keep.shape, *(1,) * (exponent.dim() - 5)), float("-inf")).exp()


def _channel_scores(rows: Tensor, columns: Tensor, read: Tensor, write: Tensor, diagonal: int) -> Tensor:
    size = rows.shape[3]
    blocks = [x.unflatten(3, (-1, BLOCK)).flatten(2, 3) for x in (rows, columns, read, write)]
    r, c, at_row, at_column = blocks
    weight = _lower_exp(at_row.unsqueeze(-2) - at_column.unsqueeze(-3), diagonal)
    inner = ((r.unsqueeze(-2) * weight) * c.unsqueeze(-3)).sum(-1)  # [B, M, H * C / 8, 8, 8]
    total = _block_diagonal(inner.unflatten(2, (rows.shape[2], -1)))
    half = BLOCK
    while half < size:
        left, right = _halves(write, half)[0], _halves(read, half)[1]
        pivot = left[..., -1:, :]
        block = (_halves(rows, half)[1] * (right - pivot).exp()) @ (_halves(columns, half)[0] * (pivot - left).exp()).mT
        quarter = block.new_zeros(*block.shape[:-2], 2 * half, 2 * half)
        quarter[..., half:, :half] = block
        total = total + _block_diagonal(quarter)
        half *= 2
    return total


def _halves(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """Left and right halves [..., C / 2 half, half, D] of every block of 2 half rows."""
    blocks = x.unflatten(3, (-1, 2, half))
    return blocks[..., 0, :, :], blocks[..., 1, :, :]


def _block_diagonal(blocks: Tensor) -> Tensor:
    """[..., n, c, c] to [..., n c, n c]."""
    n, c = blocks.shape[-3], blocks.shape[-1]
    if n == 1:
        return blocks.squeeze(-3)
    full = torch.diag_embed(blocks.movedim(-3, -1), dim1=-4, dim2=-2)
    return full.reshape(*blocks.shape[:-3], n * c, n * c)
