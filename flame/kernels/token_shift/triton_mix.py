"""Token shift and its mixes in one pass: x is read once and every mix written once, nothing kept but x.

Backward in one pass as well: each gradient and x read once, dx written once. The neighbour's row is another load of a line that
the same program loads anyway. Weight gradients are summed per program and then over programs, in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flame.kernels.direct import Direct
from flame.kernels.layout import cdiv, power_of_2
from flame.kernels.token_shift import MOST_MIXES
from flame.kernels.token_shift.triton_shift import _bounds
from flame.kernels.triton_sum import sum_partials

FORWARD = {"elements": 2048, "columns": 512, "num_warps": 4}
BACKWARD = {"elements": 4096, "columns": 64, "num_warps": 4}


@triton.jit
def _difference(x, state, C, token, c, n, start, inside):
    """x_t and x_{t-1} - x_t of a tile, fp32."""
    at = x + token.to(tl.int64)[:, None] * C + c
    own = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(at - C, mask=inside & (token > start)[:, None], other=0.0).to(tl.float32)
    if state is not None:
        before = state + n.to(tl.int64)[:, None] * C + c
        other += tl.load(before, mask=inside & (token == start)[:, None], other=0.0).to(tl.float32)
    return own, other - own


@triton.jit
def _mixed(y, weight, own, difference, C, token, c, inside):
    share = tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)
    at = y + token.to(tl.int64)[:, None] * C + c
    tl.store(at, (own + difference * share).to(y.dtype.element_ty), mask=inside)


@triton.jit
def mix_forward(
    x, state, cu_seqlens, weight, y0, y1, y2, y3, y4, y5, tokens, T, C, N,
    STEPS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y_s = x_t + weight_s (x_{t-1} - x_t). Program (channel block, token block); x, y `[tokens, C]`, weight `[S, C]`."""
    token = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = (tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    n, start, _ = _bounds(cu_seqlens, tl.minimum(token, tokens - 1), T, N, STEPS)
    inside = (token < tokens)[:, None] & (c < C)
    own, difference = _difference(x, state, C, token, c, n, start, inside)
    _mixed(y0, weight, own, difference, C, token, c, inside)
    if y1 is not None:
        _mixed(y1, weight + C, own, difference, C, token, c, inside)
    if y2 is not None:
        _mixed(y2, weight + 2 * C, own, difference, C, token, c, inside)
    if y3 is not None:
        _mixed(y3, weight + 3 * C, own, difference, C, token, c, inside)
    if y4 is not None:
        _mixed(y4, weight + 4 * C, own, difference, C, token, c, inside)
    if y5 is not None:
        _mixed(y5, weight + 5 * C, own, difference, C, token, c, inside)


@triton.jit
def _gradient_of(dy, weight, partial, dx, difference, C, token, c, inside, follows):
    """dx with the part of one mix added; that mix's weight gradient over the tile's tokens goes to `partial` `[C]`."""
    share = tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)
    at = dy + token.to(tl.int64)[:, None] * C + c
    here = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    after = tl.load(at + C, mask=follows, other=0.0).to(tl.float32)
    tl.store(partial + c, tl.sum(here * difference, axis=0)[None, :], mask=c < C)
    return dx + here + share * (after - here)


@triton.jit
def mix_backward(
    dy0, dy1, dy2, dy3, dy4, dy5, x, state, cu_seqlens, weight, dx, partial, tokens, T, C, N,
    S: tl.constexpr, STEPS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx_t = sum_s dy_s,t + weight_s (dy_s,t+1 - dy_s,t). Programs as in the forward; partial `[token blocks, S, C]` fp32."""
    token = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = (tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    n, start, end = _bounds(cu_seqlens, tl.minimum(token, tokens - 1), T, N, STEPS)
    inside = (token < tokens)[:, None] & (c < C)
    follows = inside & (token + 1 < end)[:, None]
    _, difference = _difference(x, state, C, token, c, n, start, inside)
    partial += tl.program_id(1).to(tl.int64) * (S * C)
    total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    total = _gradient_of(dy0, weight, partial, total, difference, C, token, c, inside, follows)
    if dy1 is not None:
        total = _gradient_of(dy1, weight + C, partial + C, total, difference, C, token, c, inside, follows)
    if dy2 is not None:
        total = _gradient_of(dy2, weight + 2 * C, partial + 2 * C, total, difference, C, token, c, inside, follows)
    if dy3 is not None:
        total = _gradient_of(dy3, weight + 3 * C, partial + 3 * C, total, difference, C, token, c, inside, follows)
    if dy4 is not None:
        total = _gradient_of(dy4, weight + 4 * C, partial + 4 * C, total, difference, C, token, c, inside, follows)
    if dy5 is not None:
        total = _gradient_of(dy5, weight + 5 * C, partial + 5 * C, total, difference, C, token, c, inside, follows)
    tl.store(dx + token.to(tl.int64)[:, None] * C + c, total.to(dx.dtype.element_ty), mask=inside)


def _tile(tile: dict[str, int], C: int) -> tuple[int, int, int]:
    """Tokens, channels and warps of a program."""
    columns = min(tile["columns"], power_of_2(C))
    return tile["elements"] // columns, columns, tile["num_warps"]


def _six(tensors: Sequence[Tensor]) -> list[Tensor | None]:
    return [*tensors, *[None] * (MOST_MIXES - len(tensors))]


def forward(x: Tensor, weight: Tensor, state: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, ...]:
    """S mixes `[B, T, C]` for weight `[S, C]`."""
    x, weight = x.contiguous(), weight.contiguous()
    B, T, C = x.shape
    mixes = tuple(torch.empty_like(x) for _ in range(len(weight)))
    N = B if cu_seqlens is None else len(cu_seqlens) - 1
    block_t, block_c, warps = _tile(FORWARD, C)
    if x.numel():
        mix_forward[(cdiv(C, block_c), cdiv(B * T, block_t))](
            x, None if state is None else state.contiguous(), cu_seqlens, weight, *_six(mixes), B * T, T, C, N,
            STEPS=N.bit_length(), BLOCK_T=block_t, BLOCK_C=block_c, num_warps=warps,
        )  # fmt: skip
    return mixes


def backward(
    dys: Sequence[Tensor], x: Tensor, weight: Tensor, state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of x `[B, T, C]` and weight `[S, C]`."""
    x, weight = x.contiguous(), weight.contiguous()
    B, T, C = x.shape
    N = B if cu_seqlens is None else len(cu_seqlens) - 1
    if not x.numel():
        return torch.zeros_like(x), torch.zeros_like(weight)
    block_t, block_c, warps = _tile(BACKWARD, C)
    blocks, S = cdiv(B * T, block_t), len(weight)
    dx = torch.empty_like(x)
    partial = torch.empty(blocks, S * C, dtype=torch.float32, device=x.device)
    mix_backward[(cdiv(C, block_c), blocks)](
        *_six([dy.contiguous() for dy in dys]), x, None if state is None else state.contiguous(), cu_seqlens, weight, dx,
        partial, B * T, T, C, N,
        S=S, STEPS=N.bit_length(), BLOCK_T=block_t, BLOCK_C=block_c, num_warps=warps,
    )  # fmt: skip
    return dx, sum_partials(partial, weight.dtype).view(S, C)


def _listed(x: Tensor, weight: Tensor, state: Tensor | None, cu_seqlens: Tensor | None) -> list[Tensor]:
    """The mixes, as a list: what torch.library takes for results whose number varies."""
    return list(forward(x, weight, state, cu_seqlens))


def _gradients(
    dys: Sequence[Tensor], x: Tensor, weight: Tensor, state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight."""
    return backward(dys, x, weight, state, cu_seqlens)


_mix = torch.library.custom_op("flame::token_mix", _listed, mutates_args=())
_mix_backward = torch.library.custom_op("flame::token_mix_backward", _gradients, mutates_args=())


@_mix.register_fake
def _(x, weight, state, cu_seqlens):
    return [x.new_empty(x.shape) for _ in range(len(weight))]


@_mix_backward.register_fake
def _(dys, x, weight, state, cu_seqlens):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, *dys: Any) -> tuple[Tensor | None, ...]:
    x, weight, state, cu_seqlens = ctx.saved_tensors
    dys = dys[0] if isinstance(dys[0], list | tuple) else dys  # the registered op's gradients come as one list
    given = [torch.zeros_like(x) if dy is None else dy for dy in dys]
    dx, dweight = _mix_backward(given, x, weight, state, cu_seqlens)
    return dx, dweight, _state_gradient(given, weight, state, cu_seqlens), None


def _state_gradient(
    dys: Sequence[Tensor], weight: Tensor, state: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor | None:
    """sum_s weight_s dy_s at the first token of every sequence `[N, C]`, zero for empty ones."""
    if state is None:
        return None
    if cu_seqlens is None:
        firsts = [dy[:, 0] for dy in dys]
    else:
        at, some = cu_seqlens[:-1].clamp(max=dys[0].shape[1] - 1), (cu_seqlens.diff() > 0)[:, None]
        firsts = [torch.where(some, dy[0][at], 0.0) for dy in dys]
    return (torch.stack(firsts).float() * weight[:, None].float()).sum(0).to(state.dtype)


_mix.register_autograd(_backward, setup_context=_save)
token_mix = Direct(_mix, forward, _save, _backward)
