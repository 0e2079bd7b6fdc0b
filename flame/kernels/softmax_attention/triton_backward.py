"""Tiled softmax attention backward: one sweep over keys for dq, one over queries for dk, dv.

Two sweeps compute the scores twice and need no atomics, so that results repeat. In the second everything is transposed
from the start, `S^T = K Q^T`: transposing an accumulator and feeding it to another product is miscompiled on Hopper.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flame.kernels.softmax_attention.triton_forward import columns, key_ranges, sums_from, visible


@triton.jit
def dq_sweep(
    dq, total, q, do, lse, delta, k_ptr, v_ptr, k_stride, v_stride, high, low, high0, low0, i, begin, lower, upper, Tk,
    scale, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr,
    GATED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dS K and the row sums of dS over the tiles of keys in [lower, upper)."""
    for start in range(lower, upper, BN):
        j = start + tl.arange(0, BN)
        k = columns(k_ptr, j, k_stride, K, BK, j < Tk, MASKED)
        v = columns(v_ptr, j, v_stride, V, BV, j < Tk, MASKED)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if GATED:
            s -= sums_from(high, low, j, j < Tk, high0, low0, MASKED)[None, :]
        p = tl.exp2(s - lse[:, None])
        if MASKED:
            p = tl.where(visible(i[:, None], j[None, :], begin, Tk, CAUSAL, WINDOW, PACKED), p, 0.0)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        if GATED:
            total += tl.sum(ds, 1)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq, total


@triton.jit
def attention_dq(
    q_ptr, k_ptr, v_ptr, o_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, total_ptr, sums_ptr, begin_ptr, start_ptr,
    q_row, q_head, k_row, k_head, v_row, v_head, do_row, do_head, Tq, Tk, count, sums_size, scale, natural,
    H: tl.constexpr, Hk: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr,
    PRUNE: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dq [B, Tq, H, K] of a tile of queries, delta = rowsum(o do) [B, H, Tq] and, with gates, rowsum(dS) [B, H, Tq]."""
    tile = count - 1 - tl.program_id(0) % count
    b = (tl.program_id(0) // count // H).to(tl.int64)
    h = tl.program_id(0) // count % H
    kh = h // (H // Hk)
    row = tile * BM + tl.arange(0, BM)
    live = row < Tq
    i = row + (Tk - Tq)
    first = tile * BM + (Tk - Tq)
    last = tl.minimum(first + BM, Tk) - 1
    do = columns(do_ptr + b * Tq * do_row + h * do_head, row, do_row, V, BV, live, True)
    o = columns(o_ptr + (b * Tq * H + h) * V, row, H * V, V, BV, live, True)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    of_row = (b * H + h) * Tq + row
    tl.store(delta_ptr + of_row, delta, mask=live)
    q = columns(q_ptr + b * Tq * q_row + h * q_head, row, q_row, K, BK, live, True)
    lse = tl.load(lse_ptr + of_row, mask=live, other=float("inf"))
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
            lse -= sums_from(high, low, i, live, high0, low0, True)
    dq = tl.zeros([BM, BK], tl.float32)
    total = tl.zeros([BM], tl.float32)
    at = (b * H + h) * count + tile
    lower, clear, full, end = key_ranges(first, last, begin_ptr, start_ptr, at, Tk, CAUSAL, WINDOW, PACKED, PRUNE, BN)
    if PACKED or WINDOW > 0:
        dq, total = dq_sweep(
            dq, total, q, do, lse, delta, k_ptr, v_ptr, k_row, v_row, high, low, high0, low0, i, begin, lower, clear, Tk,
            scale, K, V, BK, BV, BN, GATED, CAUSAL, WINDOW, PACKED, True, PRECISION,
        )  # fmt: skip
    dq, total = dq_sweep(
        dq, total, q, do, lse, delta, k_ptr, v_ptr, k_row, v_row, high, low, high0, low0, i, begin, clear, full, Tk,
        scale, K, V, BK, BV, BN, GATED, CAUSAL, WINDOW, PACKED, False, PRECISION,
    )  # fmt: skip
    dq, total = dq_sweep(
        dq, total, q, do, lse, delta, k_ptr, v_ptr, k_row, v_row, high, low, high0, low0, i, begin, full, end, Tk,
        scale, K, V, BK, BV, BN, GATED, CAUSAL, WINDOW, PACKED, True, PRECISION,
    )  # fmt: skip
    if GATED:
        tl.store(total_ptr + of_row, total, mask=live)
    d = tl.arange(0, BK)
    at = dq_ptr + ((b * Tq + row) * H + h)[:, None] * K + d[None, :]
    tl.store(at, (dq * natural).to(dq_ptr.dtype.element_ty), mask=live[:, None] & (d < K)[None, :])


@triton.jit
def dkv_sweep(
    dk, dv, total, k, v, c, q_ptr, do_ptr, lse_ptr, delta_ptr, q_stride, do_stride, high, low, high0, low0, begin_ptr, j,
    lower, upper, Tq, Tk, scale, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr,
    GATED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dS^T Q, P^T dO and the row sums of dS^T over the tiles of query rows in [lower, upper)."""
    for start in range(lower, upper, BM):
        row = start + tl.arange(0, BM)
        live = row < Tq
        i = row + (Tk - Tq)
        q = columns(q_ptr, row, q_stride, K, BK, live, MASKED)
        do = columns(do_ptr, row, do_stride, V, BV, live, MASKED)
        if MASKED:
            lse = tl.load(lse_ptr + row, mask=live, other=float("inf"))
            delta = tl.load(delta_ptr + row, mask=live, other=0.0)
        else:
            lse = tl.load(lse_ptr + row)
            delta = tl.load(delta_ptr + row)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
        if GATED:
            s -= c[:, None]
            if CAUSAL:
                lse -= sums_from(high, low, i, live, high0, low0, MASKED)
        p = tl.exp2(s - lse[None, :])
        if MASKED:
            begin = 0
            if PACKED:
                begin = tl.load(begin_ptr + i, mask=live, other=0)[None, :]
            p = tl.where(visible(i[None, :], j[:, None], begin, Tk, CAUSAL, WINDOW, PACKED), p, 0.0)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        ds = p * (dp - delta[None, :])
        if GATED:
            total += tl.sum(ds, 1)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv, total


@triton.jit
def row_ranges(
    first,
    last,
    end_ptr,
    stop_ptr,
    at,
    Tq,
    Tk,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    PACKED: tl.constexpr,
    PRUNE: tl.constexpr,
    BM: tl.constexpr,
):
    """Bounds of the tiles of query rows that see keys first .. last: [low, full) and [clear, end) need a mask."""
    if not CAUSAL:
        return 0, 0, Tq // BM * BM, Tq
    offset = Tk - Tq
    low = tl.maximum(first - offset, 0) // BM * BM
    clear = Tq
    end = Tq
    if PACKED:
        clear = tl.minimum(clear, tl.load(end_ptr + first) - offset)
        end = tl.minimum(end, tl.load(end_ptr + last) - offset)
    if WINDOW > 0:
        clear = tl.minimum(clear, first + WINDOW - offset)
        end = tl.minimum(end, last + WINDOW - offset)
    if PRUNE:
        stop = tl.load(stop_ptr + at)
        clear = tl.minimum(clear, stop)
        end = tl.minimum(end, stop)
    full = tl.cdiv(tl.maximum(last - offset, 0), BM) * BM
    full = tl.maximum(low, tl.minimum(full, tl.cdiv(end, BM) * BM))
    clear = tl.maximum(clear // BM * BM, full)
    return low, full, clear, end


@triton.jit
def attention_dkv(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, total_ptr, sums_ptr, begin_ptr, end_ptr, stop_ptr,
    q_row, q_head, k_row, k_head, v_row, v_head, do_row, do_head, Tq, Tk, count, sums_size, scale, natural,
    H: tl.constexpr, Hk: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr,
    PRUNE: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dk [B, Tk, Hk, K], dv [B, Tk, Hk, V] of a tile of keys over all query heads that read it and, with gates, the column
    sums of dS of each of them [B, H, Tk]."""
    tile = tl.program_id(0) % count
    b = (tl.program_id(0) // count // Hk).to(tl.int64)
    kh = tl.program_id(0) // count % Hk
    j = tile * BN + tl.arange(0, BN)
    live = j < Tk
    first = tile * BN
    last = tl.minimum(first + BN, Tk) - 1
    k = columns(k_ptr + b * Tk * k_row + kh * k_head, j, k_row, K, BK, live, True)
    v = columns(v_ptr + b * Tk * v_row + kh * v_head, j, v_row, V, BV, live, True)
    dk = tl.zeros([BN, BK], tl.float32)
    dv = tl.zeros([BN, BV], tl.float32)
    for h in range(kh * (H // Hk), (kh + 1) * (H // Hk)):
        q = q_ptr + b * Tq * q_row + h * q_head
        do = do_ptr + b * Tq * do_row + h * do_head
        lse = lse_ptr + (b * H + h) * Tq
        delta = delta_ptr + (b * H + h) * Tq
        high = sums_ptr
        low = sums_ptr
        high0 = 0.0
        low0 = 0.0
        c = tl.zeros([BN], tl.float32)
        if GATED:
            high = sums_ptr + (b * H + h) * Tk
            low = high + sums_size
            if CAUSAL:
                high0 = tl.load(high + first)
                low0 = tl.load(low + first)
            c = sums_from(high, low, j, live, high0, low0, True)
        total = tl.zeros([BN], tl.float32)
        at = (b * H + h) * count + tile
        lower, full, clear, end = row_ranges(
            first, last, end_ptr, stop_ptr, at, Tq, Tk, CAUSAL, WINDOW, PACKED, PRUNE, BM
        )
        dk, dv, total = dkv_sweep(
            dk, dv, total, k, v, c, q, do, lse, delta, q_row, do_row, high, low, high0, low0, begin_ptr, j, lower, full,
            Tq, Tk, scale, K, V, BK, BV, BM, GATED, CAUSAL, WINDOW, PACKED, True, PRECISION,
        )  # fmt: skip
        dk, dv, total = dkv_sweep(
            dk, dv, total, k, v, c, q, do, lse, delta, q_row, do_row, high, low, high0, low0, begin_ptr, j, full, clear,
            Tq, Tk, scale, K, V, BK, BV, BM, GATED, CAUSAL, WINDOW, PACKED, False, PRECISION,
        )  # fmt: skip
        dk, dv, total = dkv_sweep(
            dk, dv, total, k, v, c, q, do, lse, delta, q_row, do_row, high, low, high0, low0, begin_ptr, j, clear, end,
            Tq, Tk, scale, K, V, BK, BV, BM, GATED, CAUSAL, WINDOW, PACKED, True, PRECISION,
        )  # fmt: skip
        if GATED:
            tl.store(total_ptr + (b * H + h) * Tk + j, total, mask=live)
    d = tl.arange(0, BK)
    at = dk_ptr + ((b * Tk + j) * Hk + kh)[:, None] * K + d[None, :]
    tl.store(at, (dk * natural).to(dk_ptr.dtype.element_ty), mask=live[:, None] & (d < K)[None, :])
    d = tl.arange(0, BV)
    at = dv_ptr + ((b * Tk + j) * Hk + kh)[:, None] * V + d[None, :]
    tl.store(at, dv.to(dv_ptr.dtype.element_ty), mask=live[:, None] & (d < V)[None, :])
