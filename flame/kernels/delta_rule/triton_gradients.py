"""Gradients of a chunk's inputs from its boundary states and their gradients: all chunks and tiles of keys at once.

With W the chunk's writes, U = beta X, and dU, dO given (see triton_sweep): the scores' dP = dO W^T and the system's
dL = -dU W^T (the adjoint of a triangular solve) are formed once, by `score_gradients`. Then, tile by tile of key channels,
dQ comes from dO S^T and dP K, the erase read's dA from dU S^T and dL K, the write's dK from W dS'^T, dP^T Q and dL^T A.
Taking the rows' lengths out of dq and dk needs sums over all key channels at once: they are had from value channels,
q . dq = o . do, and k . dk = w . du for the write, w . du - v . dv for the erase read.

What is read transposed went through memory: a transposed accumulator fed to another product is miscompiled on Hopper by
Triton 3.4 to 3.7.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flame.kernels.delta_rule.triton_prepare import (
    A_LENGTH,
    BETA,
    K_LENGTH,
    Q_LENGTH,
    READ,
    ROWS,
    SCALAR,
    TOTAL,
    state_tile,
    tile_of,
)

# Rows of `sums` [chunks, H, 4, C] fp32.
O_DO = tl.constexpr(0)
V_DU = tl.constexpr(1)
W_DU = tl.constexpr(2)
OWN = tl.constexpr(3)  # gradient of the score of a row with itself, which no decay touches
SUMS = tl.constexpr(4)


@triton.jit
def score_gradients(
    v_ptr,
    o_ptr,  # [T, H, V]
    do_ptr,
    vector_ptr,
    chunk_ptr,
    write_ptr,  # [T, H, V]
    du_ptr,  # [T, H, V]
    dv_ptr,  # [T, H, V]
    dscore_ptr,  # [chunks, H, C, C] strictly lower, to multiply raw keys and queries
    dsystem_ptr,  # [chunks, H, C, C] strictly lower, beta left out
    sum_ptr,
    stride_vt,
    stride_vh,
    stride_ot,
    stride_oh,
    H: tl.constexpr,
    V: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    DECAY: tl.constexpr,
    ERASE: tl.constexpr,
    EXCLUSIVE: tl.constexpr,
    DOT: tl.constexpr,
):
    program = tl.program_id(0)
    chunk, head = program // H, program % H
    start = tl.load(chunk_ptr + 2 * chunk).to(tl.int64)
    length = tl.load(chunk_ptr + 2 * chunk + 1)
    if length == 0:
        return
    row = tl.arange(0, C)
    keep = row < length
    vector = vector_ptr + program.to(tl.int64) * (ROWS * C) + row
    do_ptr += start * stride_ot + head * stride_oh
    v_ptr += start * stride_vt + head * stride_vh
    at_value = (start * H + head) * V
    beta = tl.load(vector + BETA * C)
    dscores = tl.zeros([C, C], tl.float32)
    dsystem = tl.zeros([C, C], tl.float32)
    o_do = tl.zeros([C], tl.float32)
    v_du = tl.zeros([C], tl.float32)
    w_du = tl.zeros([C], tl.float32)
    for offset in range(0, V, BV):
        column = offset + tl.arange(0, BV)
        inside = column < V
        do = tile_of(do_ptr, row, stride_ot, column, keep, inside, V % BV == 0)
        du = tile_of(du_ptr + at_value, row, H * V, column, keep, inside, V % BV == 0)
        write = tile_of(write_ptr + at_value, row, H * V, column, keep, inside, V % BV == 0)
        o = tile_of(o_ptr + at_value, row, H * V, column, keep, inside, V % BV == 0)
        v = tile_of(v_ptr, row, stride_vt, column, keep, inside, V % BV == 0)
        dscores = tl.dot(do, tl.trans(write), dscores, input_precision=DOT)
        dsystem = tl.dot(du, tl.trans(write), dsystem, input_precision=DOT)
        wide = du.to(tl.float32)
        o_do += tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
        v_du += tl.sum(v.to(tl.float32) * wide, 1)
        w_du += tl.sum(write.to(tl.float32) * wide, 1)
        at = dv_ptr + at_value + row[:, None] * (H * V) + column[None, :]
        tl.store(at, (wide * beta[:, None]).to(dv_ptr.dtype.element_ty), mask=keep[:, None] & inside[None, :])
    k_length = tl.load(vector + K_LENGTH * C)
    a_length = tl.load(vector + A_LENGTH * C) if ERASE else k_length
    dscores = dscores * tl.load(vector + Q_LENGTH * C)[:, None] * k_length[None, :]
    dsystem = dsystem * -a_length[:, None] * k_length[None, :]
    if DECAY == SCALAR:
        total = tl.load(vector + TOTAL * C)
        read = tl.load(vector + READ * C) if EXCLUSIVE else total
        dscores = dscores * tl.exp2(tl.minimum(total[:, None] - total[None, :], 0.0))
        dsystem = dsystem * tl.exp2(tl.minimum(read[:, None] - total[None, :], 0.0))
    sums = sum_ptr + program.to(tl.int64) * (SUMS * C) + row
    tl.store(sums + O_DO * C, o_do)
    tl.store(sums + V_DU * C, v_du)
    tl.store(sums + W_DU * C, w_du)
    tl.store(sums + OWN * C, tl.sum(tl.where(row[:, None] == row[None, :], dscores, 0.0), 1))
    below = row[:, None] > row[None, :]
    cell = program.to(tl.int64) * (C * C) + row[:, None] * C + row[None, :]
    dtype: tl.constexpr = dscore_ptr.dtype.element_ty
    tl.store(dscore_ptr + cell, tl.where(below, dscores, 0.0).to(dtype))
    tl.store(dsystem_ptr + cell, tl.where(below, dsystem, 0.0).to(dtype))


@triton.jit
def store_rows(ptr, d, x, length, along, row, stride, channel, mask, NORMALIZE: tl.constexpr):
    """Store the gradient of raw rows x from d, that through their unit form; along = <unit, its gradient>."""
    if NORMALIZE:
        d -= x * (length * length * along)[:, None]
    tl.store(ptr + row[:, None] * stride + channel[None, :], d.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def row_gradients(
    q_ptr,
    k_ptr,
    a_ptr,
    do_ptr,
    vector_ptr,
    chunk_ptr,
    state_ptr,  # [chunks, H, K, V]
    dstate_ptr,  # [chunks, H, K, V]
    write_ptr,  # [T, H, V]
    du_ptr,  # [T, H, V]
    dscore_ptr,
    dsystem_ptr,
    sum_ptr,
    dq_ptr,  # [T, H, K]
    dk_ptr,
    da_ptr,
    dbeta_ptr,  # [tiles, T, H] fp32, to be summed over the tiles of keys
    ddecay_ptr,  # [tiles, T, H] fp32
    scale,
    tokens,  # rows of a tile's part
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_at,
    stride_ah,
    stride_ot,
    stride_oh,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    TK: tl.constexpr,  # key channels of a tile
    BV: tl.constexpr,
    C: tl.constexpr,
    DECAY: tl.constexpr,
    HAS_BETA: tl.constexpr,
    ERASE: tl.constexpr,
    EXCLUSIVE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    DOT: tl.constexpr,
):
    TILES: tl.constexpr = (K + TK - 1) // TK
    tile = tl.program_id(0) % TILES
    program = tl.program_id(0) // TILES
    chunk, head = program // H, program % H
    start = tl.load(chunk_ptr + 2 * chunk).to(tl.int64)
    length = tl.load(chunk_ptr + 2 * chunk + 1)
    if length == 0:
        return
    dtype: tl.constexpr = k_ptr.dtype.element_ty
    row = tl.arange(0, C)
    keep = row < length
    block = program.to(tl.int64)
    vector = vector_ptr + block * (ROWS * C) + row
    state_ptr += block * (K * V)
    dstate_ptr += block * (K * V)
    do_ptr += start * stride_ot + head * stride_oh
    at_value = (start * H + head) * V
    q_ptr += start * stride_qt + (head // GROUP) * stride_qh
    k_ptr += start * stride_kt + (head // GROUP) * stride_kh
    a_ptr += start * stride_at + (head // GROUP) * stride_ah
    at_key = (start * H + head) * K
    square = block * (C * C)
    channel = tile * TK + tl.arange(0, TK)
    in_keys = channel < K
    # All but the tiles of values is asked for at once, before anything is used: a load costs the time to wait for it.
    beta = tl.load(vector + BETA * C)
    q_length = tl.load(vector + Q_LENGTH * C)  # scale included
    k_length = tl.load(vector + K_LENGTH * C)
    a_length = tl.load(vector + A_LENGTH * C) if ERASE else k_length
    if DECAY == SCALAR:
        total = tl.load(vector + TOTAL * C)
        whole = tl.load(vector_ptr + block * (ROWS * C) + TOTAL * C + C - 1)
        read = tl.load(vector + READ * C) if EXCLUSIVE else total
    dscores = tl.load(dscore_ptr + square + row[:, None] * C + row[None, :])
    dsystem = tl.load(dsystem_ptr + square + row[:, None] * C + row[None, :])
    sums = sum_ptr + block * (SUMS * C) + row
    o_do = tl.load(sums + O_DO * C)
    v_du = tl.load(sums + V_DU * C)
    w_du = tl.load(sums + W_DU * C)
    own = tl.load(sums + OWN * C)
    q_factor = q_length
    a_factor = -a_length
    k_factor = k_length
    if DECAY == SCALAR:
        q_factor = q_factor * tl.exp2(total)
        a_factor = a_factor * tl.exp2(read)
        k_factor = k_factor * tl.exp2(whole - total)
    q = tile_of(q_ptr, row, stride_qt, channel, keep, in_keys, K % TK == 0)
    k = tile_of(k_ptr, row, stride_kt, channel, keep, in_keys, K % TK == 0)
    dq = tl.zeros([C, TK], tl.float32)
    da = tl.zeros([C, TK], tl.float32)
    dk = tl.zeros([C, TK], tl.float32)
    overlap = tl.zeros([TK], tl.float32)  # <S, dS'> by key
    for offset in range(0, V, BV):
        column = offset + tl.arange(0, BV)
        inside = column < V
        do = tile_of(do_ptr, row, stride_ot, column, keep, inside, V % BV == 0)
        du = tile_of(du_ptr + at_value, row, H * V, column, keep, inside, V % BV == 0)
        write = tile_of(write_ptr + at_value, row, H * V, column, keep, inside, V % BV == 0)
        state = state_tile(state_ptr, channel, V, column, in_keys, inside, K % TK == 0 and V % BV == 0)
        dstate = state_tile(dstate_ptr, channel, V, column, in_keys, inside, K % TK == 0 and V % BV == 0)
        dq = tl.dot(do, tl.trans(state), dq, input_precision=DOT)
        da = tl.dot(du, tl.trans(state), da, input_precision=DOT)
        dk = tl.dot(write, tl.trans(dstate), dk, input_precision=DOT)
        if DECAY == SCALAR:
            overlap += tl.sum(state.to(tl.float32) * dstate.to(tl.float32), 1)
    a = tile_of(a_ptr, row, stride_at, channel, keep, in_keys, K % TK == 0) if ERASE else k
    dq = tl.dot(dscores, k, dq * q_factor[:, None], input_precision=DOT)
    da = tl.dot(dsystem, k, da * a_factor[:, None], input_precision=DOT)
    dk = dk * k_factor[:, None]
    wide_k = k.to(tl.float32)
    if DECAY == SCALAR:
        dwhole = tl.sum(wide_k * dk, 1)
    # Transposed as they were loaded: a product's own result must not be.
    dk = tl.dot(tl.trans(dscores), q, dk, input_precision=DOT)
    dk = tl.dot(tl.trans(dsystem), (a * beta[:, None]).to(dtype), dk, input_precision=DOT)
    wide_q = q.to(tl.float32)
    wide_a = a.to(tl.float32)
    erased = tl.sum(wide_a * da, 1)
    if DECAY == SCALAR:
        dtotal = tl.sum(wide_q * dq - wide_k * dk, 1) + erased * beta
    dq += own[:, None] * wide_k
    dk += own[:, None] * wide_q
    da = da * beta[:, None]
    mask = keep[:, None] & in_keys[None, :]
    erase_along = w_du - v_du * beta
    store_rows(dq_ptr + at_key, dq, wide_q, q_length / scale, o_do, row, H * K, channel, mask, NORMALIZE)
    if ERASE:
        store_rows(da_ptr + at_key, da, wide_a, a_length, erase_along, row, H * K, channel, mask, NORMALIZE)
        store_rows(dk_ptr + at_key, dk, wide_k, k_length, w_du, row, H * K, channel, mask, NORMALIZE)
    else:
        along = w_du + erase_along
        store_rows(dk_ptr + at_key, dk + da, wide_k, k_length, along, row, H * K, channel, mask, NORMALIZE)
    part = (tile * tokens.to(tl.int64) + start) * H + head + row * H
    if HAS_BETA:
        tl.store(dbeta_ptr + part, tl.where(tile == 0, v_du, 0.0) + erased, mask=keep)
    if DECAY == SCALAR:
        dwhole = tl.sum(dtotal + dwhole, 0) + tl.sum(overlap, 0) * tl.exp2(whole)
        ddecay = dwhole - tl.cumsum(dtotal, 0) + dtotal  # suffix sums
        if EXCLUSIVE:
            ddecay -= erased * beta
        tl.store(ddecay_ptr + part, ddecay, mask=keep)
