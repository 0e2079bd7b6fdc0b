"""Attention between the units of a group: a query of unit a and a key of unit b < a meet through M[a, b].

Queries are moved to the end of the unit that they visit, once a unit, and see all its keys: flash attention without masks and
with one small product more a unit. No step depends on the one before, so a row is rounded once on its way however far it
goes. Workspaces are [rows, tokens, D] with a row for each head of a batch row; o, do and v are the caller's.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flame.kernels.path_attention.triton_chain import entry, matrix
from flame.kernels.softmax_attention.triton_forward import columns, sums_from


@triton.jit
def since(gates, gates_size, i, end):
    """Base-2 gates between token `end` and tokens i of a row."""
    return sums_from(
        gates, gates + gates_size, i, i >= 0, tl.load(gates + end), tl.load(gates + gates_size + end), False
    )


@triton.jit
def tile_of(ptr, row, tokens, t, D: tl.constexpr):
    """Addresses of rows t of a workspace [rows, tokens, D]."""
    return ptr + (row * tokens + t)[:, None] * D + tl.arange(0, D)[None, :]


@triton.jit
def walk_forward(
    q_ptr, k_ptr, v_ptr, m_ptr, o_ptr, lse_ptr, gates_ptr, v_batch, v_row, v_head, T, tokens, fan, groups, entries, H, Hk,
    gates_size, scale,
    V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, UNIT: tl.constexpr, GATED: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A tile of queries takes what it sees of the units before its own into o [rows, tokens, BV] and lse [rows, tokens]."""
    tiles = tokens // BM
    tile = tiles - 1 - tl.program_id(0) % tiles
    row = (tl.program_id(0) // tiles).to(tl.int64)
    unit = tile * BM // UNIT
    a = unit % fan
    if (a == 0) | (tile * BM >= T):
        return
    kh = row % H // (H // Hk)
    krow = row // H * Hk + kh
    t = tile * BM + tl.arange(0, BM)
    q = tl.load(tile_of(q_ptr, row, tokens, t, BK))
    acc = tl.load(tile_of(o_ptr, row, tokens, t, BV))
    m = tl.load(lse_ptr + row * tokens + t)
    mass = tl.full([BM], 1.0, tl.float32)
    table = m_ptr + (krow * groups + unit // fan) * entries * (BK * BK)
    v_ptr += row // H * v_batch + kh * v_head
    gates = gates_ptr + row * tokens
    d = tl.arange(0, BK)
    for back in range(0, a):
        b = a - 1 - back
        moved = tl.dot(q, tl.load(matrix(table + entry(a, b) * (BK * BK), BK)), input_precision=PRECISION).to(q.dtype)
        first = (unit - a + b) * UNIT
        end = first + UNIT - 1
        apart = tl.zeros([BM], tl.float32)
        if GATED:
            apart = since(gates, gates_size, t, end)
        before = m - apart  # relative to this unit's end
        near = before
        for start in range(first, first + UNIT, BN):
            j = start + tl.arange(0, BN)
            keys = tl.load(k_ptr + (krow * tokens + j)[None, :] * BK + d[:, None])
            s = tl.dot(moved, keys, input_precision=PRECISION) * scale
            if GATED:
                s -= since(gates, gates_size, j, end)[None, :]
            peak = tl.maximum(near, tl.max(s, 1))
            p = tl.exp2(s - peak[:, None])
            shrink = tl.exp2(near - peak)
            mass = mass * shrink + tl.sum(p, 1)
            v = columns(v_ptr, j, v_row, V, BV, j < T, False)
            acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
            near = peak
        m = tl.where(near == before, m, near + apart)  # where nothing was seen, keep what rounding would take
    tl.store(tile_of(o_ptr, row, tokens, t, BV), acc / mass[:, None])
    tl.store(lse_ptr + row * tokens + t, m + tl.log2(mass))


@triton.jit
def walk_dq(
    q_ptr, k_ptr, v_ptr, m_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, dm_ptr, total_ptr, gates_ptr,
    v_batch, v_row, v_head, do_batch, do_row, do_head, T, tokens, fan, groups, entries, H, Hk, gates_size, scale, natural,
    V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, UNIT: tl.constexpr, PART: tl.constexpr, GATED: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """PART queries of a unit: adds to dq [rows, tokens, BK] and, with gates, the row sums of dS to total; writes the gradient
    of M[a, b], dm [rows, groups, UNIT / PART, entries, BK, BK]."""
    parts = tl.cdiv(tokens, PART)
    part = parts - 1 - tl.program_id(0) % parts
    row = (tl.program_id(0) // parts).to(tl.int64)
    unit = part * PART // UNIT
    a = unit % fan
    if a == 0:
        return
    kh = row % H // (H // Hk)
    krow = row // H * Hk + kh
    table = m_ptr + (krow * groups + unit // fan) * entries * (BK * BK)
    split = part % (UNIT // PART)
    dtable = dm_ptr + ((row * groups + unit // fan) * (UNIT // PART) + split) * entries * (BK * BK)
    v_ptr += row // H * v_batch + kh * v_head
    do_ptr += row // H * do_batch + row % H * do_head
    gates = gates_ptr + row * tokens
    for begin in range(part * PART, tl.minimum((part + 1) * PART, tokens), BM):
        t = begin + tl.arange(0, BM)
        q = tl.load(tile_of(q_ptr, row, tokens, t, BK))
        do = columns(do_ptr, t, do_row, V, BV, t < T, True)
        lse = tl.load(lse_ptr + row * tokens + t)
        delta = tl.load(delta_ptr + row * tokens + t)
        dq = tl.load(tile_of(dq_ptr, row, tokens, t, BK)).to(tl.float32)
        total = tl.zeros([BM], tl.float32)
        for back in range(0, a):
            b = a - 1 - back
            between = tl.load(matrix(table + entry(a, b) * (BK * BK), BK))
            moved = tl.dot(q, between, input_precision=PRECISION).to(q.dtype)
            first = (unit - a + b) * UNIT
            end = first + UNIT - 1
            norm = lse
            if GATED:
                norm -= since(gates, gates_size, t, end)
            du = tl.zeros([BM, BK], tl.float32)
            for start in range(first, first + UNIT, BN):
                j = start + tl.arange(0, BN)
                k = tl.load(tile_of(k_ptr, krow, tokens, j, BK))
                s = tl.dot(moved, tl.trans(k), input_precision=PRECISION) * scale
                if GATED:
                    s -= since(gates, gates_size, j, end)[None, :]
                p = tl.exp2(s - norm[:, None])
                v = columns(v_ptr, j, v_row, V, BV, j < T, True)
                ds = p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - delta[:, None])
                if GATED:
                    total += tl.sum(ds, 1)
                du = tl.dot(ds.to(k.dtype), k, du, input_precision=PRECISION)
            du = (du * natural).to(q.dtype)
            dq = tl.dot(du, tl.trans(between), dq, input_precision=PRECISION)
            if back > 0:
                at = matrix(dtable + entry(a, b) * (BK * BK), BK)
                grad = tl.dot(tl.trans(q), du, input_precision=PRECISION)
                if begin > part * PART:
                    grad += tl.load(at).to(tl.float32)
                tl.store(at, grad.to(dm_ptr.dtype.element_ty))
        tl.store(tile_of(dq_ptr, row, tokens, t, BK), dq.to(dq_ptr.dtype.element_ty))
        if GATED:
            at = total_ptr + row * tokens + t
            tl.store(at, tl.load(at) + total)
        if PART > BM:
            tl.debug_barrier()  # the parts of dm just written are read again


@triton.jit
def walk_dkv(
    q_ptr, k_ptr, v_ptr, m_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, total_ptr, gates_ptr,
    v_batch, v_row, v_head, do_batch, do_row, do_head, T, tokens, fan, groups, entries, H, Hk, gates_size, scale, natural,
    V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, UNIT: tl.constexpr, GATED: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A tile of keys: adds to dk [rows of keys, tokens, BK] and dv [rows of keys, tokens, BV] and, with gates, takes the
    column sums of dS off total [rows, tokens]."""
    tiles = tokens // BN
    tile = tl.program_id(0) % tiles
    krow = (tl.program_id(0) // tiles).to(tl.int64)
    unit = tile * BN // UNIT
    b = unit % fan
    group = unit // fan
    last = tl.minimum(fan, tl.cdiv(T, UNIT) - group * fan)
    if b >= last - 1:
        return
    bt = krow // Hk
    kh = krow % Hk
    each = H // Hk
    j = tile * BN + tl.arange(0, BN)
    k = tl.load(tile_of(k_ptr, krow, tokens, j, BK))
    v = columns(v_ptr + bt * v_batch + kh * v_head, j, v_row, V, BV, j < T, True)
    dk = tl.load(tile_of(dk_ptr, krow, tokens, j, BK)).to(tl.float32)
    dv = tl.load(tile_of(dv_ptr, krow, tokens, j, BV)).to(tl.float32)
    table = m_ptr + (krow * groups + group) * entries * (BK * BK)
    for h in range(kh * each, (kh + 1) * each):
        row = bt * H + h
        do_head_ptr = do_ptr + bt * do_batch + h * do_head
        gates = gates_ptr + row * tokens
        end = (unit + 1) * UNIT - 1
        own = tl.zeros([BN], tl.float32)
        if GATED:
            own = since(gates, gates_size, j, end)
        total = tl.zeros([BN], tl.float32)
        for a in range(b + 1, last):
            between = tl.load(matrix(table + entry(a, b) * (BK * BK), BK))
            moved = tl.dot(k, tl.trans(between), input_precision=PRECISION).to(k.dtype)
            first = (unit - b + a) * UNIT
            dl = tl.zeros([BN, BK], tl.float32)
            for start in range(first, tl.minimum(first + UNIT, tokens), BM):
                t = start + tl.arange(0, BM)
                q = tl.load(tile_of(q_ptr, row, tokens, t, BK))
                do = columns(do_head_ptr, t, do_row, V, BV, t < T, True)
                norm = tl.load(lse_ptr + row * tokens + t)
                delta = tl.load(delta_ptr + row * tokens + t)
                s = tl.dot(moved, tl.trans(q), input_precision=PRECISION) * scale
                if GATED:
                    s -= own[:, None]
                    norm -= since(gates, gates_size, t, end)
                p = tl.exp2(s - norm[None, :])
                dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
                ds = p * (tl.dot(v, tl.trans(do), input_precision=PRECISION) - delta[None, :])
                if GATED:
                    total += tl.sum(ds, 1)
                dl = tl.dot(ds.to(q.dtype), q, dl, input_precision=PRECISION)
            dl = (dl * natural).to(k.dtype)
            dk = tl.dot(dl, between, dk, input_precision=PRECISION)
        if GATED:
            at = total_ptr + row * tokens + j
            tl.store(at, tl.load(at) - total)
    tl.store(tile_of(dk_ptr, krow, tokens, j, BK), dk.to(dk_ptr.dtype.element_ty))
    tl.store(tile_of(dv_ptr, krow, tokens, j, BV), dv.to(dv_ptr.dtype.element_ty))
