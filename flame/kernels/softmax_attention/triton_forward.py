"""Tiled softmax attention forward: running maximum and sum over tiles of keys (Dao, arXiv 2307.08691).

Beyond torch's kernels: a bias that is a difference of running sums (FoX's gates), a learned sink logit a head, and, with
gates, leaving out keys that provably carry no weight. Exponents are base 2; a row's constant drops out of its softmax, so
only the key's share of the bias is added, which costs the multiply-add that scaling needs anyway.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def columns(x, rows, stride, D: tl.constexpr, BD: tl.constexpr, live, MASKED: tl.constexpr):
    """A tile of rows `[len(rows), BD]`, zero beyond D columns and, with MASKED, where not `live`."""
    d = tl.arange(0, BD)
    at = x + rows[:, None] * stride + d[None, :]
    if MASKED:
        if D == BD:
            return tl.load(at, mask=live[:, None], other=0.0)
        return tl.load(at, mask=live[:, None] & (d < D)[None, :], other=0.0)
    if D == BD:
        return tl.load(at)
    return tl.load(at, mask=(d < D)[None, :], other=0.0)


@triton.jit
def sums_from(high, low, at, live, high0, low0, MASKED: tl.constexpr):
    """Running sums of gates relative to a reference: differences of the two halves keep their relative accuracy."""
    if MASKED:
        return (tl.load(high + at, mask=live, other=0.0) - high0) + (tl.load(low + at, mask=live, other=0.0) - low0)
    return (tl.load(high + at) - high0) + (tl.load(low + at) - low0)


@triton.jit
def visible(i, j, begin, Tk, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr):
    """Causal, inside the window, in the query's document; i, j and begin are shaped to broadcast to the tile."""
    seen = j < Tk
    if CAUSAL:
        seen = seen & (j <= i)
    if WINDOW > 0:
        seen = seen & (j > i - WINDOW)
    if PACKED:
        seen = seen & (j >= begin)
    return seen


@triton.jit
def key_ranges(
    first,
    last,
    begin_ptr,
    start_ptr,
    at,
    Tk,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    PACKED: tl.constexpr,
    PRUNE: tl.constexpr,
    BN: tl.constexpr,
):
    """Bounds of the tiles of keys that queries first .. last see: [low, clear) and [full, end) need a mask, the middle none."""
    if not CAUSAL:
        return 0, 0, Tk // BN * BN, Tk
    low = 0
    clear = 0
    if PACKED:
        low = tl.load(begin_ptr + first)
        clear = tl.load(begin_ptr + last)
    if WINDOW > 0:
        low = tl.maximum(low, first - WINDOW + 1)
        clear = tl.maximum(clear, last - WINDOW + 1)
    if PRUNE:
        low = tl.maximum(low, tl.load(start_ptr + at))
    low = low // BN * BN
    full = tl.maximum((first + 1) // BN * BN, low)
    clear = tl.minimum(tl.maximum(tl.cdiv(clear, BN) * BN, low), full)
    return low, clear, full, tl.minimum(last + 1, Tk)


@triton.jit
def attend(
    m, mass, acc, q, k_ptr, v_ptr, k_stride, v_stride, high, low, high0, low0, i, begin, lower, upper, Tk, scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr,
    GATED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Take the tiles of keys in [lower, upper) into the running maximum m, mass and weighted values acc."""
    for start in range(lower, upper, BN):
        j = start + tl.arange(0, BN)
        k = columns(k_ptr, j, k_stride, K, BK, j < Tk, MASKED)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if GATED:
            s -= sums_from(high, low, j, j < Tk, high0, low0, MASKED)[None, :]
        if MASKED:
            s = tl.where(visible(i[:, None], j[None, :], begin, Tk, CAUSAL, WINDOW, PACKED), s, float("-inf"))
        peak = tl.maximum(m, tl.max(s, 1))
        base = peak
        if MASKED:
            base = tl.where(peak == float("-inf"), 0.0, peak)  # nothing seen yet
        p = tl.exp2(s - base[:, None])
        shrink = tl.exp2(m - base)
        mass = mass * shrink + tl.sum(p, 1)
        v = columns(v_ptr, j, v_stride, V, BV, j < Tk, MASKED)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        m = peak
    return m, mass, acc


@triton.jit
def attention_forward(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, sums_ptr, sink_ptr, begin_ptr, start_ptr,
    q_row, q_head, k_row, k_head, v_row, v_head, Tq, Tk, count, sums_size, scale,
    H: tl.constexpr, Hk: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATED: tl.constexpr, SINK: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr,
    PRUNE: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head. Late tiles, which see most keys, start first.

    q [B, Tq, H, K], k [B, Tk, Hk, K], v [B, Tk, Hk, V] by strides of rows and heads; o [B, Tq, H, V] dense;
    lse [B, H, Tq] base 2; sums [2, B, H, Tk] base 2, high and low halves; begin [Tk]; start [B, H, tiles].
    """
    tile = count - 1 - tl.program_id(0) % count
    b = (tl.program_id(0) // count // H).to(tl.int64)
    h = tl.program_id(0) // count % H
    kh = h // (H // Hk)
    row = tile * BM + tl.arange(0, BM)
    live = row < Tq
    i = row + (Tk - Tq)  # index of the key at the query's own position
    first = tile * BM + (Tk - Tq)
    last = tl.minimum(first + BM, Tk) - 1
    q = columns(q_ptr + b * Tq * q_row + h * q_head, row, q_row, K, BK, live, True)
    k_ptr += b * Tk * k_row + kh * k_head
    v_ptr += b * Tk * v_row + kh * v_head
    begin = 0
    if PACKED:
        begin = tl.load(begin_ptr + i, mask=live, other=0)[:, None]
    high = sums_ptr
    low = sums_ptr
    high0 = 0.0
    low0 = 0.0
    if GATED:
        high = sums_ptr + (b * H + h) * Tk
        low = high + sums_size
        if CAUSAL:
            high0 = tl.load(high + first)
            low0 = tl.load(low + first)
    m = tl.full([BM], float("-inf"), tl.float32)
    mass = tl.zeros([BM], tl.float32)
    if SINK:
        m = tl.zeros([BM], tl.float32) + tl.load(sink_ptr + h) * LOG2E
        mass += 1.0
    acc = tl.zeros([BM, BV], tl.float32)
    at = (b * H + h) * count + tile
    lower, clear, full, end = key_ranges(first, last, begin_ptr, start_ptr, at, Tk, CAUSAL, WINDOW, PACKED, PRUNE, BN)
    if PACKED or WINDOW > 0:
        m, mass, acc = attend(
            m, mass, acc, q, k_ptr, v_ptr, k_row, v_row, high, low, high0, low0, i, begin, lower, clear, Tk, scale,
            K, V, BK, BV, BN, GATED, CAUSAL, WINDOW, PACKED, True, PRECISION,
        )  # fmt: skip
    m, mass, acc = attend(
        m, mass, acc, q, k_ptr, v_ptr, k_row, v_row, high, low, high0, low0, i, begin, clear, full, Tk, scale,
        K, V, BK, BV, BN, GATED, CAUSAL, WINDOW, PACKED, False, PRECISION,
    )  # fmt: skip
    m, mass, acc = attend(
        m, mass, acc, q, k_ptr, v_ptr, k_row, v_row, high, low, high0, low0, i, begin, full, end, Tk, scale,
        K, V, BK, BV, BN, GATED, CAUSAL, WINDOW, PACKED, True, PRECISION,
    )  # fmt: skip
    lse = m + tl.log2(mass)
    if GATED and CAUSAL:
        lse += sums_from(high, low, i, live, high0, low0, True)
    tl.store(lse_ptr + (b * H + h) * Tq + row, lse, mask=live)
    d = tl.arange(0, BV)
    o = o_ptr + ((b * Tq + row) * H + h)[:, None] * V + d[None, :]
    tl.store(o, (acc / mass[:, None]).to(o_ptr.dtype.element_ty), mask=live[:, None] & (d < V)[None, :])
