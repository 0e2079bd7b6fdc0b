"""Gradients of a chunk's inputs, diagonal plus low rank: all chunks and tiles of key channels at once.

With V and the chunk's Z, and dO and dX (see `triton_dplr`), the scores' gradients are dA_qk = dO V^T, dA_qb = dO Z^T,
dA_ak = dX V^T and dA_ab = dX Z^T (the adjoint of a triangular solve). They are formed where they are needed, both ways round:
a transposed accumulator fed to another product is miscompiled on Hopper by Triton 3.4 to 3.7. Where one pivot serves the
chunk, rows carry their decay since the pivot; other chunks are halved again and again (see `triton_keys`).

The decay's gradient is a suffix sum in which a pair of rows cancels unless the sum's start is between them. It is taken from
the rounded rows that enter the products, of which both rows of a pair see the same.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flame.kernels.delta_rule.triton_dplr import AK, MATRICES, QK
from flame.kernels.delta_rule.triton_key_forms import pairs, pairs_transposed, pivots
from flame.kernels.delta_rule.triton_prepare import pivot_row, state_tile, tile_of


@triton.jit
def score_products(
    x_ptr,  # [C, V] at the chunk's first row
    y_ptr,
    z_ptr,
    state_ptr,  # [K, V]
    row,
    stride,
    keep,
    channel,
    in_keys,
    V: tl.constexpr,
    BV: tl.constexpr,
    WHOLE: tl.constexpr,
    DOT: tl.constexpr,
):
    """x S^T [C, TK], x y^T and x z^T [C, C], fp32."""
    held = tl.zeros([row.shape[0], channel.shape[0]], tl.float32)
    first = tl.zeros([row.shape[0], row.shape[0]], tl.float32)
    second = tl.zeros([row.shape[0], row.shape[0]], tl.float32)
    for offset in range(0, V, BV):
        column = offset + tl.arange(0, BV)
        inside = column < V
        x = tile_of(x_ptr, row, stride, column, keep, inside, V % BV == 0)
        y = tile_of(y_ptr, row, stride, column, keep, inside, V % BV == 0)
        z = tile_of(z_ptr, row, stride, column, keep, inside, V % BV == 0)
        state = state_tile(state_ptr, channel, V, column, in_keys, inside, WHOLE and V % BV == 0)
        held = tl.dot(x, tl.trans(state), held, input_precision=DOT)
        first = tl.dot(x, tl.trans(y), first, input_precision=DOT)
        second = tl.dot(x, tl.trans(z), second, input_precision=DOT)
    return held, first, second


@triton.jit
def own_sum(scores, row):
    """The diagonal of scores [C, C]."""
    return tl.sum(tl.where(row[:, None] == row[None, :], scores, 0.0), 1)


@triton.jit
def read_rows(
    x_ptr,  # [C, K], q or a
    dx_ptr,  # [C, V], dO or dX
    v_ptr,
    z_ptr,
    state_ptr,
    k_ptr,  # [C, K]
    b_ptr,
    total_ptr,
    row,
    length,
    keep,
    channel,
    in_keys,
    scale,
    STRIDE: tl.constexpr,  # of keys' rows
    BEFORE: tl.constexpr,  # 1 where the read does not see its own row's decay
    V: tl.constexpr,
    VSTRIDE: tl.constexpr,
    BV: tl.constexpr,
    WHOLE: tl.constexpr,
    HALVES: tl.constexpr,
    DOT: tl.constexpr,
):
    """Gradient d [C, TK] of rows x that read, without what a row gets from itself; x d; and the two own scores' [C]."""
    dtype: tl.constexpr = k_ptr.dtype.element_ty
    d, by_key, by_back = score_products(
        dx_ptr, v_ptr, z_ptr, state_ptr, row, VSTRIDE, keep, channel, in_keys, V, BV, WHOLE, DOT
    )
    by_key = by_key * scale
    by_back = by_back * scale
    own_key = own_sum(by_key, row)
    own_back = own_sum(by_back, row)
    x = tile_of(x_ptr, row, STRIDE, channel, keep, in_keys, WHOLE)
    k = tile_of(k_ptr, row, STRIDE, channel, keep, in_keys, WHOLE)
    b = tile_of(b_ptr, row, STRIDE, channel, keep, in_keys, WHOLE)
    total = tile_of(total_ptr, row, STRIDE, channel, keep, in_keys, WHOLE)
    read = total
    if BEFORE:
        read = tile_of(total_ptr - STRIDE, row, STRIDE, channel, keep & (row > 0), in_keys, WHOLE)
    if HALVES:
        by_key = by_key.to(dtype)
        by_back = by_back.to(dtype)
        d = d * (tl.exp2(read) * scale)
        along = x * d
        half = row.shape[0] // 2
        while half > 0:
            pivot = pivots(total_ptr, row, length, STRIDE, channel, in_keys, half)
            chosen = pairs(row, half)
            decay = tl.exp2(-tl.abs(total - pivot))
            change = tl.dot(tl.where(chosen, by_key, 0.0), (k * decay).to(dtype), input_precision=DOT)
            change = tl.dot(tl.where(chosen, by_back, 0.0), (b * decay).to(dtype), change, input_precision=DOT)
            decay = tl.exp2(tl.minimum(read - pivot, 0.0))
            d += decay * change
            along += (x * decay).to(dtype) * change
            half = half // 2
    else:
        below = row[:, None] > row[None, :]
        by_key = tl.where(below, by_key, 0.0).to(dtype)
        by_back = tl.where(below, by_back, 0.0).to(dtype)
        pivot = tl.load(total_ptr + pivot_row(length, row.shape[0]) * STRIDE + channel, mask=in_keys, other=0.0)
        decay = tl.exp2(pivot[None, :] - total)
        # What the state gives is decayed from the chunk's start: by e^p more than what the keys give.
        d = d * (tl.exp2(pivot) * scale)[None, :]
        d = tl.dot(by_key, (k * decay).to(dtype), d, input_precision=DOT)
        d = tl.dot(by_back, (b * decay).to(dtype), d, input_precision=DOT)
        decay = tl.exp2(read - pivot[None, :])
        along = (x * decay).to(dtype) * d
        d = d * decay
    return d, along, own_key, own_back


@triton.jit
def write_rows(
    x_ptr,  # [C, K], k or b
    value_ptr,  # [C, V], V or Z
    do_ptr,
    dx_ptr,
    dstate_ptr,
    q_ptr,  # [C, K]
    a_ptr,
    total_ptr,
    row,
    length,
    keep,
    channel,
    in_keys,
    scale,
    STRIDE: tl.constexpr,
    V: tl.constexpr,
    VSTRIDE: tl.constexpr,
    BV: tl.constexpr,
    WHOLE: tl.constexpr,
    HALVES: tl.constexpr,
    DOT: tl.constexpr,
):
    """Gradient [C, TK] of rows x that are written; x times its parts through the state and through the scores; the own
    scores' [C], which are in neither."""
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    d, by_query, by_read = score_products(
        value_ptr, do_ptr, dx_ptr, dstate_ptr, row, VSTRIDE, keep, channel, in_keys, V, BV, WHOLE, DOT
    )
    by_query = by_query * scale
    own = own_sum(by_query, row)
    x = tile_of(x_ptr, row, STRIDE, channel, keep, in_keys, WHOLE)
    q = tile_of(q_ptr, row, STRIDE, channel, keep, in_keys, WHOLE)
    a = tile_of(a_ptr, row, STRIDE, channel, keep, in_keys, WHOLE)
    total = tile_of(total_ptr, row, STRIDE, channel, keep, in_keys, WHOLE)
    read = tile_of(total_ptr - STRIDE, row, STRIDE, channel, keep & (row > 0), in_keys, WHOLE)
    whole = tl.load(total_ptr + (length - 1) * STRIDE + channel, mask=in_keys, other=0.0)
    d = d * tl.exp2(tl.minimum(whole[None, :] - total, 0.0))
    by_state = x * d
    if HALVES:
        by_query = by_query.to(dtype)
        by_read = by_read.to(dtype)
        along = tl.zeros_like(d)
        half = row.shape[0] // 2
        while half > 0:
            pivot = pivots(total_ptr, row, length, STRIDE, channel, in_keys, half)
            chosen = pairs_transposed(row, half)
            decay = tl.exp2(-tl.abs(total - pivot))
            change = tl.dot(tl.where(chosen, by_query, 0.0), (q * decay).to(dtype), input_precision=DOT)
            right = (a * tl.exp2(tl.minimum(read - pivot, 0.0))).to(dtype)
            change = tl.dot(tl.where(chosen, by_read, 0.0), right, change, input_precision=DOT)
            d += decay * change
            along += (x * decay).to(dtype) * change
            half = half // 2
    else:
        above = row[:, None] < row[None, :]
        by_query = tl.where(above, by_query, 0.0).to(dtype)
        by_read = tl.where(above, by_read, 0.0).to(dtype)
        pivot = tl.load(total_ptr + pivot_row(length, row.shape[0]) * STRIDE + channel, mask=in_keys, other=0.0)
        change = tl.dot(by_query, (q * tl.exp2(total - pivot[None, :])).to(dtype), input_precision=DOT)
        right = (a * tl.exp2(read - pivot[None, :])).to(dtype)
        change = tl.dot(by_read, right, change, input_precision=DOT)
        decay = tl.exp2(pivot[None, :] - total)
        along = (x * decay).to(dtype) * change
        d += decay * change
    return d, by_state, along, own


@triton.jit
def gradients_dplr(
    q_ptr,  # [T, H, K]
    k_ptr,
    a_ptr,
    b_ptr,
    v_ptr,  # [T, H, V]
    do_ptr,
    write_ptr,  # Z
    dx_ptr,
    total_ptr,
    moderate_ptr,
    chunk_ptr,
    key_ptr,  # [T, H, K] k e^(Gc - G)
    score_ptr,
    state_ptr,  # [chunks, H, K, V]
    dstate_ptr,  # [chunks, H, K, V]
    dq_ptr,  # [T, H, K]
    dk_ptr,
    da_ptr,
    db_ptr,
    dv_ptr,  # [T, H, V]
    ddecay_ptr,  # [T, H, K] fp32
    scale,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    TK: tl.constexpr,  # key channels of a tile
    BV: tl.constexpr,
    C: tl.constexpr,
    READS: tl.constexpr,  # make dq and da; without WRITES their share of the decay's gradient is left in `ddecay`
    WRITES: tl.constexpr,  # make dk and db, and the decay's gradient
    VALUES: tl.constexpr,  # make dv
    HALVES: tl.constexpr,  # serve the chunks that are not moderate, by halving; else the others
    DOT: tl.constexpr,
):
    TILES: tl.constexpr = (K + TK - 1) // TK
    WHOLE: tl.constexpr = K % TK == 0
    STRIDE: tl.constexpr = H * K
    VSTRIDE: tl.constexpr = H * V
    tile = tl.program_id(0) % TILES
    program = tl.program_id(0) // TILES
    chunk, head = program // H, program % H
    start = tl.load(chunk_ptr + 2 * chunk).to(tl.int64)
    length = tl.load(chunk_ptr + 2 * chunk + 1)
    if length == 0:
        return
    if tl.load(moderate_ptr + program) == HALVES:
        return
    row = tl.arange(0, C)
    keep = row < length
    channel = tile * TK + tl.arange(0, TK)
    in_keys = channel < K
    mask = keep[:, None] & in_keys[None, :]
    block = program.to(tl.int64)
    state_ptr += block * (K * V)
    dstate_ptr += block * (K * V)
    at_value = (start * H + head) * V
    at_key = (start * H + head) * K
    cell = row[:, None] * STRIDE + channel[None, :]
    v_ptr += at_value
    do_ptr += at_value
    write_ptr += at_value
    dx_ptr += at_value
    total_ptr += at_key
    q_ptr += at_key
    k_ptr += at_key
    a_ptr += at_key
    b_ptr += at_key
    ddecay_ptr += at_key
    dtype: tl.constexpr = dq_ptr.dtype.element_ty
    dtotal = tl.zeros([C, TK], tl.float32)  # gradient of G
    ddecay = tl.zeros([C, TK], tl.float32)
    if READS:
        dq, along, own_key, own_back = read_rows(
            q_ptr, do_ptr, v_ptr, write_ptr, state_ptr, k_ptr, b_ptr, total_ptr, row, length, keep, channel, in_keys,
            scale, STRIDE, 0, V, VSTRIDE, BV, WHOLE, HALVES, DOT,
        )  # fmt: skip
        dtotal += along
        k = tile_of(k_ptr, row, STRIDE, channel, keep, in_keys, WHOLE)
        b = tile_of(b_ptr, row, STRIDE, channel, keep, in_keys, WHOLE)
        dq += own_key[:, None] * k + own_back[:, None] * b
        tl.store(dq_ptr + at_key + cell, dq.to(dtype), mask=mask)
        da, along, own_key, own_back = read_rows(
            a_ptr, dx_ptr, v_ptr, write_ptr, state_ptr, k_ptr, b_ptr, total_ptr, row, length, keep, channel, in_keys,
            1.0, STRIDE, 1, V, VSTRIDE, BV, WHOLE, HALVES, DOT,
        )  # fmt: skip
        tl.store(da_ptr + at_key + cell, da.to(dtype), mask=mask)
        dtotal += along
        ddecay -= along  # the read by `a` does not see its own row's decay
        if not WRITES:
            ddecay += tl.sum(dtotal, 0)[None, :] - tl.cumsum(dtotal, 0) + dtotal  # suffix sums
            tl.store(ddecay_ptr + cell, ddecay, mask=mask)
    if WRITES:
        dk, by_state, along, own = write_rows(
            k_ptr, v_ptr, do_ptr, dx_ptr, dstate_ptr, q_ptr, a_ptr, total_ptr, row, length, keep, channel, in_keys,
            scale, STRIDE, V, VSTRIDE, BV, WHOLE, HALVES, DOT,
        )  # fmt: skip
        dtotal -= along + by_state
        dwhole = tl.sum(by_state, 0)
        q = tile_of(q_ptr, row, STRIDE, channel, keep, in_keys, WHOLE)
        tl.store(dk_ptr + at_key + cell, (dk + own[:, None] * q).to(dtype), mask=mask)
        db, by_state, along, own = write_rows(
            b_ptr, write_ptr, do_ptr, dx_ptr, dstate_ptr, q_ptr, a_ptr, total_ptr, row, length, keep, channel, in_keys,
            scale, STRIDE, V, VSTRIDE, BV, WHOLE, HALVES, DOT,
        )  # fmt: skip
        dtotal -= along + by_state
        dwhole += tl.sum(by_state, 0)
        q = tile_of(q_ptr, row, STRIDE, channel, keep, in_keys, WHOLE)
        tl.store(db_ptr + at_key + cell, (db + own[:, None] * q).to(dtype), mask=mask)
        overlap = tl.zeros([TK], tl.float32)  # <S, dS'> by key
        for offset in range(0, V, BV):
            column = offset + tl.arange(0, BV)
            inside = column < V
            state = state_tile(state_ptr, channel, V, column, in_keys, inside, WHOLE and V % BV == 0)
            dstate = state_tile(dstate_ptr, channel, V, column, in_keys, inside, WHOLE and V % BV == 0)
            overlap += tl.sum(state.to(tl.float32) * dstate.to(tl.float32), 1)
        whole = tl.load(total_ptr + (length - 1) * STRIDE + channel, mask=in_keys, other=0.0)
        dwhole += overlap * tl.exp2(whole)
        if not READS:
            ddecay += tl.load(ddecay_ptr + cell, mask=mask, other=0.0)
        ddecay += (tl.sum(dtotal, 0) + dwhole)[None, :] - tl.cumsum(dtotal, 0) + dtotal
        tl.store(ddecay_ptr + cell, ddecay, mask=mask)
    if VALUES:
        square = score_ptr + block * (MATRICES * C * C) + row[:, None] * C + row[None, :]
        key_ptr += at_key
        for offset in range(tile * BV, V, TILES * BV):  # tiles of keys share the values
            column = offset + tl.arange(0, BV)
            inside = column < V
            do = tile_of(do_ptr, row, VSTRIDE, column, keep, inside, V % BV == 0)
            dx = tile_of(dx_ptr, row, VSTRIDE, column, keep, inside, V % BV == 0)
            dv = tl.dot(tl.trans(tl.load(square + QK * C * C)), do, input_precision=DOT)
            dv = tl.dot(tl.trans(tl.load(square + AK * C * C)), dx, dv, input_precision=DOT)
            for part in tl.static_range(TILES):
                other = part * TK + tl.arange(0, TK)
                in_part = other < K
                key = tile_of(key_ptr, row, STRIDE, other, keep, in_part, WHOLE)
                dstate = state_tile(dstate_ptr, other, V, column, in_part, inside, WHOLE and V % BV == 0)
                dv = tl.dot(key, dstate, dv, input_precision=DOT)
            at = row[:, None] * VSTRIDE + column[None, :]
            tl.store(dv_ptr + at_value + at, dv.to(dtype), mask=keep[:, None] & inside[None, :])
