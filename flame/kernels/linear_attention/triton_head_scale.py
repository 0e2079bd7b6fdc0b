"""`x * factor` per token and head in one pass, and both gradients in one: torch makes six passes through fp32 of them."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flame.kernels.direct import Direct
from flame.kernels.layout import cdiv, power_of_2


@triton.jit
def _scale(
    x_ptr, dy_ptr, factor_ptr, out_ptr, dfactor_ptr, rows_total, tokens, stride_xb, stride_xt, stride_xh,
    H: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr, BP: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK rows of [B * T * H, P]. out is y, or in BACKWARD dx, with dfactor the row sums of x * dy."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    p = tl.arange(0, BP)
    keep = rows < rows_total
    inside = keep[:, None] & (p < P)[None, :]
    token = rows // H
    at_x = (token // tokens).to(tl.int64) * stride_xb + (token % tokens).to(tl.int64) * stride_xt
    at_x += (rows % H) * stride_xh
    dense = rows.to(tl.int64)[:, None] * P + p[None, :]
    x = tl.load(x_ptr + at_x[:, None] + p[None, :], mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(factor_ptr + rows, mask=keep, other=0.0).to(tl.float32)[:, None]
    if BACKWARD:
        dy = tl.load(dy_ptr + dense, mask=inside, other=0.0).to(tl.float32)
        tl.store(dfactor_ptr + rows, tl.sum(x * dy, 1), mask=keep)
        out = dy * factor
    else:
        out = x * factor
    tl.store(out_ptr + dense, out.to(out_ptr.dtype.element_ty), mask=inside)


def _launch(x: Tensor, factor: Tensor, dy: Tensor | None, out: Tensor, dfactor: Tensor) -> None:
    tokens, H, P = x.shape[1:]
    width = power_of_2(P)
    block = max(1, 4096 // width)
    if out.numel():
        _scale[(cdiv(factor.numel(), block),)](
            x, x if dy is None else dy, factor, out, dfactor, factor.numel(), tokens, *x.stride()[:3],
            H=H, P=P, BLOCK=block, BP=width, BACKWARD=dy is not None, num_warps=4,
        )  # fmt: skip


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def multiply(x: Tensor, factor: Tensor) -> Tensor:
    """x * factor `[B, T, H, P]`."""
    y = x.new_empty(x.shape)
    _launch(_dense(x), factor.contiguous(), None, y, y)
    return y


def gradients(x: Tensor, factor: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """dx `[B, T, H, P]` and dfactor `[B, T, H]` fp32."""
    dx, dfactor = x.new_empty(x.shape), factor.new_empty(factor.shape, dtype=torch.float32)
    _launch(_dense(x), factor.contiguous(), dy.contiguous(), dx, dfactor)
    return dx, dfactor


_op = torch.library.custom_op("flame::scale_heads", multiply, mutates_args=())


@_op.register_fake
def _(x, factor):
    return x.new_empty(x.shape)


_backward_op = torch.library.custom_op("flame::scale_heads_backward", gradients, mutates_args=())


@_backward_op.register_fake
def _(x, factor, dy):
    return x.new_empty(x.shape), factor.new_empty(factor.shape, dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
    x, factor = ctx.saved_tensors
    dx, dfactor = scale_heads_backward(x, factor, dy)
    return dx, dfactor.to(factor.dtype)


_op.register_autograd(_backward, setup_context=_save)
scale_heads_backward = Direct(_backward_op, gradients)
scale_heads = Direct(_op, multiply, _save, _backward)
