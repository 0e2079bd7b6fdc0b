"""Rotary kernel: a program makes the cos and sin of some tokens once and turns all their heads; backward turns them back."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flame.kernels.direct import Direct
from flame.kernels.layout import cdiv, power_of_2


@triton.jit
def _kernel(
    x, positions, inverse, y, T, H, positions_stride, batch_stride, token_stride, head_stride,
    SIGN: tl.constexpr, HALF: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program (token block, batch). x `[B, T, H, 2 * HALF]` with any strides but the last, y contiguous."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    j = tl.arange(0, BLOCK_D)
    b = tl.program_id(1).to(tl.int64)
    position = tl.load(positions + b * positions_stride + t, mask=t < T, other=0).to(tl.float32)
    angle = position[:, None] * tl.load(inverse + j, mask=j < HALF, other=0.0)[None, :]
    # Rounded to the activation's type, as a table of that type would be.
    cos = tl.cos(angle).to(x.dtype.element_ty).to(tl.float32)
    sin = tl.sin(angle).to(x.dtype.element_ty).to(tl.float32) * SIGN
    mask = (t < T)[:, None] & (j < HALF)[None, :]
    source = x + b * batch_stride + t.to(tl.int64)[:, None] * token_stride + j[None, :]
    target = y + (b * T + t.to(tl.int64)[:, None]) * H * (2 * HALF) + j[None, :]
    for _ in range(H):
        first = tl.load(source, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
        tl.store(target, (first * cos - second * sin).to(y.dtype.element_ty), mask=mask)
        tl.store(target + HALF, (first * sin + second * cos).to(y.dtype.element_ty), mask=mask)
        source += head_stride
        target += 2 * HALF


@lru_cache(maxsize=16)
def _inverse_frequencies(width: int, theta: float, device: torch.device) -> Tensor:
    exponent = torch.arange(0, width, 2, device=device, dtype=torch.float32) / width
    return 1.0 / theta**exponent


def _forward(x: Tensor, positions: Tensor, theta: float, back: bool) -> Tensor:
    """x `[B, T, H, D]` turned by its positions `[T]` or `[B, T]`, or turned back."""
    x = x if x.stride(3) == 1 else x.contiguous()
    B, T, H, D = x.shape
    y = torch.empty(B, T, H, D, dtype=x.dtype, device=x.device)
    positions = positions.contiguous()
    block = power_of_2(D // 2)
    block_t = max(1, 512 // block)
    _kernel[(cdiv(T, block_t), B)](
        x, positions, _inverse_frequencies(D, theta, x.device), y, T, H, T if positions.dim() == 2 else 0,
        x.stride(0), x.stride(1), x.stride(2),
        SIGN=-1 if back else 1, HALF=D // 2, BLOCK_T=block_t, BLOCK_D=block, num_warps=4,
    )  # fmt: skip
    return y


_rotary = torch.library.custom_op("flame::rotary", _forward, mutates_args=())


@_rotary.register_fake
def _(x, positions, theta, back):
    return x.new_empty(x.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, positions, ctx.theta, ctx.back = inputs
    ctx.save_for_backward(positions)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
    return rotary(dy, ctx.saved_tensors[0], ctx.theta, not ctx.back), None, None, None


_rotary.register_autograd(_backward, setup_context=_save)
rotary = Direct(_rotary, _forward, _save, _backward)
