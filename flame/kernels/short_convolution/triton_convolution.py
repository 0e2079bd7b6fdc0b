"""Short convolution on a GPU: a program walks along time with the last three inputs in registers, four tokens a step.

So every input is read once (and three tokens a segment again), however wide the filter. The backward recomputes the
convolution, keeps the three unfinished input gradients in registers, and writes each once; weight gradients are summed per
segment in a fixed order and then over segments. Filters of up to four taps; missing taps are zero.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from flame.kernels import tiles
from flame.kernels.layout import cdiv, power_of_2
from flame.kernels.short_convolution import chunked
from flame.kernels.triton_sum import sum_partials

WIDEST = 4


@triton.jit
def find_sequence(cu_seqlens, N, token, STEPS: tl.constexpr):
    """The sequence that holds `token` (scalar or block): the last n with cu_seqlens[n] <= token."""
    low = token * 0
    high = low + N - 1
    for _ in tl.static_range(STEPS):
        middle = (low + high + 1) // 2
        right = tl.load(cu_seqlens + middle).to(tl.int32) <= token
        low = tl.where(right, middle, low)
        high = tl.where(right, high, tl.maximum(middle - 1, low))
    return low


@triton.jit
def _tap(weight, channel, inside, W: tl.constexpr, BACK: tl.constexpr):
    """weight of the token `BACK` before the current one, fp32; zero past the filter."""
    if BACK < W:
        tap = tl.load(weight + channel * W + (W - 1 - BACK), mask=inside, other=0.0).to(tl.float32)
    else:
        tap = tl.zeros_like(channel).to(tl.float32)
    return tap


@triton.jit
def _row(t, stride):
    """t * stride in 64 bits."""
    return (tl.full((), 0, tl.int64) + t) * stride


@triton.jit
def _when(inside, channel, t, low, high):
    """The mask `inside` if low <= t < high. Compared as a block: the interpreter cannot spread a scalar condition."""
    time = channel * 0 + t
    return inside & (time >= low) & (time < high)


@triton.jit
def _history(x, t, start, channel, inside, stride):
    """Input t of the sequence that begins at `start`, zero before it; states are added where a token is used."""
    mask = _when(inside, channel, t, start, t + 1)
    return tl.load(x + _row(t, stride) + channel, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _within(value, state, t, BACK: tl.constexpr, start, n, channel, inside, C, W: tl.constexpr):
    """`value` = x_{t-BACK} where that is of t's own sequence, else its state or zero."""
    own = t - BACK >= start
    value = tl.where(own, value, 0.0)
    if state is not None and BACK < W:
        before = state + (n.to(tl.int64) * C + channel) * W + (W + t - BACK - start)
        value += tl.load(before, mask=_when(inside, channel, t - BACK, t - BACK, start), other=0.0).to(tl.float32)
    return value


@triton.jit
def _advance(cu_seqlens, N, t, n, start, end):
    """The sequence that holds t, knowing the one that holds t - 1; empty ones are passed over."""
    while (t >= end) & (n < N - 1):
        n += 1
        start = end
        end = tl.load(cu_seqlens + n + 1).to(tl.int32)
    return n, start, end


@triton.jit
def _forward_token(
    a, p1, p2, p3, w0, w1, w2, w3, bias, y, state, cu_seqlens, t, n, start, end, limit, channel, inside, C, N,
    SILU: tl.constexpr, PACKED: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    if PACKED:
        n, start, end = _advance(cu_seqlens, N, t, n, start, end)
    z = bias + w0 * a
    z += w1 * _within(p1, state, t, 1, start, n, channel, inside, C, W)
    z += w2 * _within(p2, state, t, 2, start, n, channel, inside, C, W)
    z += w3 * _within(p3, state, t, 3, start, n, channel, inside, C, W)
    if SILU:
        z *= tl.sigmoid(z)
    tl.store(y + _row(t, C) + channel, z.to(y.dtype.element_ty), mask=_when(inside, channel, t, 0, limit))
    return n, start, end


@triton.jit
def forward_kernel(
    x, weight, bias_ptr, state, cu_seqlens, y, T, C, N, batch_stride, stride,
    SILU: tl.constexpr, W: tl.constexpr, STEPS: tl.constexpr, SEGMENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (channel block, segment of time, batch)."""
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < C
    begin = tl.program_id(1) * SEGMENT
    n = tl.program_id(2)
    x += n.to(tl.int64) * batch_stride
    y += n.to(tl.int64) * T * C
    PACKED: tl.constexpr = cu_seqlens is not None
    start = 0
    end = T
    if PACKED:
        n = find_sequence(cu_seqlens, N, begin, STEPS)
        start = tl.load(cu_seqlens + n).to(tl.int32)
        end = tl.load(cu_seqlens + n + 1).to(tl.int32)
    w0 = _tap(weight, channel, inside, W, 0)
    w1 = _tap(weight, channel, inside, W, 1)
    w2 = _tap(weight, channel, inside, W, 2)
    w3 = _tap(weight, channel, inside, W, 3)
    bias = tl.zeros((BLOCK,), tl.float32)
    if bias_ptr is not None:
        bias += tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    p1 = _history(x, begin - 1, start, channel, inside, stride)
    p2 = _history(x, begin - 2, start, channel, inside, stride)
    p3 = _history(x, begin - 3, start, channel, inside, stride)
    for t in range(begin, tl.minimum(begin + SEGMENT, T), 4):
        row = x + _row(t, stride) + channel
        a0 = tl.load(row, mask=inside, other=0.0).to(tl.float32)
        a1 = tl.load(row + stride, mask=_when(inside, channel, t, 0, T - 1), other=0.0).to(tl.float32)
        a2 = tl.load(row + 2 * stride, mask=_when(inside, channel, t, 0, T - 2), other=0.0).to(tl.float32)
        a3 = tl.load(row + 3 * stride, mask=_when(inside, channel, t, 0, T - 3), other=0.0).to(tl.float32)
        n, start, end = _forward_token(a0, p1, p2, p3, w0, w1, w2, w3, bias, y, state, cu_seqlens, t, n, start, end, T,
                                       channel, inside, C, N, SILU, PACKED, W)  # fmt: skip
        n, start, end = _forward_token(a1, a0, p1, p2, w0, w1, w2, w3, bias, y, state, cu_seqlens, t + 1, n, start, end, T,
                                       channel, inside, C, N, SILU, PACKED, W)  # fmt: skip
        n, start, end = _forward_token(a2, a1, a0, p1, w0, w1, w2, w3, bias, y, state, cu_seqlens, t + 2, n, start, end, T,
                                       channel, inside, C, N, SILU, PACKED, W)  # fmt: skip
        n, start, end = _forward_token(a3, a2, a1, a0, w0, w1, w2, w3, bias, y, state, cu_seqlens, t + 3, n, start, end, T,
                                       channel, inside, C, N, SILU, PACKED, W)  # fmt: skip
        p1, p2, p3 = a3, a2, a1


@triton.jit
def _backward_token(
    a, p1, p2, p3, dy, g1, g2, g3, d0, d1, d2, d3, dbias, w0, w1, w2, w3, bias, dx, state, cu_seqlens, t, begin, stop,
    n, start, end, channel, inside, C, N, SILU: tl.constexpr, PACKED: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Token t: its share of the weight gradients, and of the gradients of the inputs t-3 .. t (g3, g2, g1, new)."""
    if PACKED:
        n, start, end = _advance(cu_seqlens, N, t, n, start, end)
    x1 = _within(p1, state, t, 1, start, n, channel, inside, C, W)
    x2 = _within(p2, state, t, 2, start, n, channel, inside, C, W)
    x3 = _within(p3, state, t, 3, start, n, channel, inside, C, W)
    dz = dy
    if SILU:
        z = bias + w0 * a + w1 * x1 + w2 * x2 + w3 * x3
        s = tl.sigmoid(z)
        dz = dy * (s * (1.0 + z * (1.0 - s)))
    own = tl.where(t < stop, dz, 0.0)  # tokens past the segment are counted by the next program
    d0 += own * a
    d1 += own * x1
    d2 += own * x2
    d3 += own * x3
    dbias += own
    g1 += tl.where(t - 1 >= start, w1 * dz, 0.0)
    g2 += tl.where(t - 2 >= start, w2 * dz, 0.0)
    g3 += tl.where(t - 3 >= start, w3 * dz, 0.0)
    done = t - 3
    tl.store(dx + _row(done, C) + channel, g3.to(dx.dtype.element_ty), mask=_when(inside, channel, done, begin, stop))
    return w0 * dz, g1, g2, d0, d1, d2, d3, dbias, n, start, end


@triton.jit
def backward_kernel(
    dy, x, weight, bias_ptr, state, cu_seqlens, dx, dweight, dbias_ptr, T, C, N, batch_stride, stride,
    SILU: tl.constexpr, W: tl.constexpr, STEPS: tl.constexpr, SEGMENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (channel block, segment of time, batch). dweight `[B * segments, 4, C]`: shift 0 .. 3; dbias `[.., C]`."""
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < C
    begin = tl.program_id(1) * SEGMENT
    n = tl.program_id(2)
    partial = n.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    x += n.to(tl.int64) * batch_stride
    dy += n.to(tl.int64) * T * C
    dx += n.to(tl.int64) * T * C
    PACKED: tl.constexpr = cu_seqlens is not None
    start = 0
    end = T
    if PACKED:
        n = find_sequence(cu_seqlens, N, begin, STEPS)
        start = tl.load(cu_seqlens + n).to(tl.int32)
        end = tl.load(cu_seqlens + n + 1).to(tl.int32)
    w0 = _tap(weight, channel, inside, W, 0)
    w1 = _tap(weight, channel, inside, W, 1)
    w2 = _tap(weight, channel, inside, W, 2)
    w3 = _tap(weight, channel, inside, W, 3)
    zero = tl.zeros((BLOCK,), tl.float32)
    bias = zero
    if bias_ptr is not None:
        bias += tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    p1 = _history(x, begin - 1, start, channel, inside, stride)
    p2 = _history(x, begin - 2, start, channel, inside, stride)
    p3 = _history(x, begin - 3, start, channel, inside, stride)
    g1, g2, g3 = zero, zero, zero
    d0, d1, d2, d3, dbias = zero, zero, zero, zero, zero
    stop = tl.minimum(begin + SEGMENT, T)
    for t in range(begin, stop + 3, 4):
        row = x + _row(t, stride) + channel
        grad = dy + _row(t, C) + channel
        m0 = _when(inside, channel, t, 0, T)
        m1 = _when(inside, channel, t, 0, T - 1)
        m2 = _when(inside, channel, t, 0, T - 2)
        m3 = _when(inside, channel, t, 0, T - 3)
        a0 = tl.load(row, mask=m0, other=0.0).to(tl.float32)
        a1 = tl.load(row + stride, mask=m1, other=0.0).to(tl.float32)
        a2 = tl.load(row + 2 * stride, mask=m2, other=0.0).to(tl.float32)
        a3 = tl.load(row + 3 * stride, mask=m3, other=0.0).to(tl.float32)
        y0 = tl.load(grad, mask=m0, other=0.0).to(tl.float32)
        y1 = tl.load(grad + C, mask=m1, other=0.0).to(tl.float32)
        y2 = tl.load(grad + 2 * C, mask=m2, other=0.0).to(tl.float32)
        y3 = tl.load(grad + 3 * C, mask=m3, other=0.0).to(tl.float32)
        g1, g2, g3, d0, d1, d2, d3, dbias, n, start, end = _backward_token(
            a0, p1, p2, p3, y0, g1, g2, g3, d0, d1, d2, d3, dbias, w0, w1, w2, w3, bias, dx, state, cu_seqlens, t,
            begin, stop, n, start, end, channel, inside, C, N, SILU, PACKED, W)  # fmt: skip
        g1, g2, g3, d0, d1, d2, d3, dbias, n, start, end = _backward_token(
            a1, a0, p1, p2, y1, g1, g2, g3, d0, d1, d2, d3, dbias, w0, w1, w2, w3, bias, dx, state, cu_seqlens, t + 1,
            begin, stop, n, start, end, channel, inside, C, N, SILU, PACKED, W)  # fmt: skip
        g1, g2, g3, d0, d1, d2, d3, dbias, n, start, end = _backward_token(
            a2, a1, a0, p1, y2, g1, g2, g3, d0, d1, d2, d3, dbias, w0, w1, w2, w3, bias, dx, state, cu_seqlens, t + 2,
            begin, stop, n, start, end, channel, inside, C, N, SILU, PACKED, W)  # fmt: skip
        g1, g2, g3, d0, d1, d2, d3, dbias, n, start, end = _backward_token(
            a3, a2, a1, a0, y3, g1, g2, g3, d0, d1, d2, d3, dbias, w0, w1, w2, w3, bias, dx, state, cu_seqlens, t + 3,
            begin, stop, n, start, end, channel, inside, C, N, SILU, PACKED, W)  # fmt: skip
        p1, p2, p3 = a3, a2, a1
    out = dweight + partial * 4 * C + channel
    tl.store(out, d0, mask=inside)
    tl.store(out + C, d1, mask=inside)
    tl.store(out + 2 * C, d2, mask=inside)
    tl.store(out + 3 * C, d3, mask=inside)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + partial * C + channel, dbias, mask=inside)


@lru_cache(maxsize=256)
def tile_key(kernel: str, packed: bool, dtype: torch.dtype) -> str:
    """Key of the tile of 'forward' or 'backward'."""
    return tiles.key(kernel, packed=packed, dtype=dtype)


def choose(kernel: str, x: Tensor, packed: bool) -> dict[str, int]:
    """SEGMENT: tokens of a program, a multiple of 4. BLOCK: its channels."""
    default = {"SEGMENT": 128 if kernel == "backward" else 32, "BLOCK": 512, "num_warps": 4}
    tile = tiles.choose("short_convolution", tile_key(kernel, packed, x.dtype), default, x.device)
    return {**tile, "BLOCK": min(tile["BLOCK"], power_of_2(x.shape[2]))}


def readable(x: Tensor) -> Tensor:
    """x `[B, T, C]` itself when its channels are adjacent (slices of a packed projection are), else a copy."""
    return x if x.stride(2) == 1 else x.contiguous()


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, cu_seqlens: Tensor | None, silu: bool,
) -> Tensor:  # fmt: skip
    """y `[B, T, C]`, contiguous, in x.dtype."""
    x = readable(x)
    B, T, C = x.shape
    y = torch.empty(B, T, C, dtype=x.dtype, device=x.device)
    if y.numel():
        tile = choose("forward", x, cu_seqlens is not None)
        N = B if cu_seqlens is None else len(cu_seqlens) - 1
        forward_kernel[(cdiv(C, tile["BLOCK"]), cdiv(T, tile["SEGMENT"]), B)](
            x, weight.contiguous(), bias, None if state is None else state.contiguous(), cu_seqlens, y,
            T, C, N, x.stride(0), x.stride(1),
            SILU=silu, W=weight.shape[1], STEPS=N.bit_length(), **tile,
        )  # fmt: skip
    return y


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, cu_seqlens: Tensor | None, silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, weight, bias and state; empty for what is None."""
    x, dy = readable(x), dy.contiguous()
    B, T, C = x.shape
    W = weight.shape[1]
    tile = choose("backward", x, cu_seqlens is not None)
    segments = max(1, cdiv(T, tile["SEGMENT"]))
    dx = torch.empty(B, T, C, dtype=x.dtype, device=x.device)
    dweight = torch.empty(B * segments, 4, C, dtype=torch.float32, device=x.device)
    dbias = None if bias is None else torch.empty(B * segments, C, dtype=torch.float32, device=x.device)
    N = B if cu_seqlens is None else len(cu_seqlens) - 1
    backward_kernel[(cdiv(C, tile["BLOCK"]), segments, B)](
        dy, x, weight.contiguous(), bias, None if state is None else state.contiguous(), cu_seqlens, dx, dweight, dbias,
        T, C, N, x.stride(0), x.stride(1),
        SILU=silu, W=W, STEPS=N.bit_length(), **tile,
    )  # fmt: skip
    taps = sum_partials(dweight, weight.dtype, planes=W)
    dstate = x.new_empty(0) if state is None else state_gradient(dy, x, weight, bias, state, cu_seqlens, silu)
    return dx, taps, x.new_empty(0) if bias is None or dbias is None else sum_partials(dbias, bias.dtype), dstate


def state_gradient(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, cu_seqlens: Tensor | None, silu: bool
) -> Tensor:
    """Gradient of the initial states, from the first W - 1 tokens of every sequence, which alone saw them."""
    first = weight.shape[1] - 1
    if cu_seqlens is None:
        head, grad = x[:, :first], dy[:, :first]
    else:
        offset = torch.arange(first, device=x.device)
        token = (cu_seqlens[:-1, None] + offset).clamp(max=x.shape[1] - 1)
        exists = (offset < cu_seqlens.diff()[:, None])[..., None]  # [N, W - 1, 1]
        head, grad = (torch.where(exists, t[0][token], 0.0) for t in (x, dy))
    head, dz, taps = head.float(), grad.float(), weight.float()
    if silu:
        z = chunked.short_convolution(head, weight, bias, None, state.float(), None)
        sigmoid = torch.sigmoid(z)
        dz = dz * sigmoid * (1 + z * (1 - sigmoid))
    dstate = torch.zeros_like(state, dtype=torch.float32)
    for before in range(1, weight.shape[1]):  # the input `before` tokens ahead of the sequence
        for at in range(min(first + 1 - before, dz.shape[1])):
            dstate[..., -before] += taps[:, first - at - before] * dz[:, at]
    return dstate.to(state.dtype)
