"""Token shift kernels: the neighbour of a token in its own document, by a search of cu_seqlens in registers."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flame.kernels.direct import Direct
from flame.kernels.layout import cdiv, power_of_2
from flame.kernels.short_convolution.triton_convolution import find_sequence


@triton.jit
def _bounds(cu_seqlens, token, T, N, STEPS: tl.constexpr):
    """Sequence of each flat token, and its first and end token."""
    if cu_seqlens is not None:
        n = find_sequence(cu_seqlens, N, token, STEPS)
        start = tl.load(cu_seqlens + n).to(tl.int32)
        end = tl.load(cu_seqlens + n + 1).to(tl.int32)
    else:
        n = token // T
        start = n * T
        end = start + T
    return n, start, end


@triton.jit
def _kernel(
    x, state, cu_seqlens, y, tokens, T, C, N, BACK: tl.constexpr, STEPS: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y_t = x_{t-1} - x_t; with BACK its adjoint x_{t+1} - x_t. Program (channel block, token block), x `[tokens, C]`."""
    token = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = (tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    n, start, end = _bounds(cu_seqlens, tl.minimum(token, tokens - 1), T, N, STEPS)
    inside = (token < tokens)[:, None] & (c < C)
    at = x + token.to(tl.int64)[:, None] * C + c
    own = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if BACK:
        other = tl.load(at + C, mask=inside & (token + 1 < end)[:, None], other=0.0).to(tl.float32)
    else:
        other = tl.load(at - C, mask=inside & (token > start)[:, None], other=0.0).to(tl.float32)
        if state is not None:
            before = state + n.to(tl.int64)[:, None] * C + c
            other += tl.load(before, mask=inside & (token == start)[:, None], other=0.0).to(tl.float32)
    tl.store(y + token.to(tl.int64)[:, None] * C + c, (other - own).to(y.dtype.element_ty), mask=inside)


def _launch(x: Tensor, state: Tensor | None, cu_seqlens: Tensor | None, back: bool) -> Tensor:
    x = x.contiguous()
    B, T, C = x.shape
    y = torch.empty_like(x)
    N = B if cu_seqlens is None else len(cu_seqlens) - 1
    block_c = min(512, power_of_2(C))
    block_t = 2048 // block_c
    if x.numel():
        _kernel[(cdiv(C, block_c), cdiv(B * T, block_t))](
            x, None if state is None else state.contiguous(), cu_seqlens, y, B * T, T, C, N,
            BACK=back, STEPS=N.bit_length(), BLOCK_T=block_t, BLOCK_C=block_c, num_warps=4,
        )  # fmt: skip
    return y


def _forward(x: Tensor, state: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """x_{t-1} - x_t `[B, T, C]`."""
    return _launch(x, state, cu_seqlens, back=False)


_shift = torch.library.custom_op("flame::token_shift", _forward, mutates_args=())


@_shift.register_fake
def _(x, state, cu_seqlens):
    return x.new_empty(x.shape)


def _gradient(dy: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """dy_{t+1} - dy_t `[B, T, C]`."""
    return _launch(dy, None, cu_seqlens, back=True)


_shift_backward = torch.library.custom_op("flame::token_shift_backward", _gradient, mutates_args=())


@_shift_backward.register_fake
def _(dy, cu_seqlens):
    return dy.new_empty(dy.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, state, cu_seqlens = inputs
    ctx.save_for_backward(cu_seqlens)
    ctx.state_dtype = None if state is None else state.dtype


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, None]:
    (cu_seqlens,) = ctx.saved_tensors
    return token_shift_backward(dy, cu_seqlens), _state_gradient(dy, cu_seqlens, ctx.state_dtype), None


def _state_gradient(dy: Tensor, cu_seqlens: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    """dy at the first token of every sequence `[N, C]`, zero for empty ones."""
    if dtype is None:
        return None
    if cu_seqlens is None:
        return dy[:, 0].to(dtype)
    first = dy[0][cu_seqlens[:-1].clamp(max=dy.shape[1] - 1)]
    return torch.where((cu_seqlens.diff() > 0)[:, None], first, 0.0).to(dtype)


_shift.register_autograd(_backward, setup_context=_save)
token_shift_backward = Direct(_shift_backward, _gradient)
token_shift = Direct(_shift, _forward, _save, _backward)
