"""The second stage of weight gradients: partial sums of programs added up in a fixed order, rounded once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flame.kernels.layout import cdiv


@triton.jit
def _sum_kernel(partial, out, P, C, program_stride, out_column, out_plane, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Program (column block, plane): out[column * out_column + plane * out_plane] = sum over programs."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    plane = tl.program_id(1)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, P, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < P)[:, None] & (column < C)[None, :]
        at = partial + row.to(tl.int64)[:, None] * program_stride + plane * C + column[None, :]
        total += tl.load(at, mask=mask, other=0.0)
    value = tl.sum(total, axis=0).to(out.dtype.element_ty)
    tl.store(out + column * out_column + plane * out_plane, value, mask=column < C)


def sum_partials(partial: Tensor, dtype: torch.dtype, planes: int = 1) -> Tensor:
    """Sum of `[P, planes_of_partial, C]` (or `[P, C]`, fp32, contiguous) over P.

    One plane gives `[C]`; several give `[C, planes]` with the planes in reverse order, as the taps of a causal filter are.
    Planes past the given number are left out.
    """
    C = partial.shape[-1]
    out = torch.empty(C if planes == 1 and partial.dim() == 2 else (C, planes), dtype=dtype, device=partial.device)
    block = 32
    _sum_kernel[(cdiv(C, block), planes)](
        partial, out[..., planes - 1 :] if out.dim() == 2 else out, len(partial), C, partial.stride(0),
        planes, -1, ROWS=64, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return out
