"""Gradients of a chunk's inputs from its boundary states and their gradients: all chunks and tiles of keys at once.

With W the chunk's writes, U = beta X, and dU, dO given (see triton_sweep), every gradient is a sum over value tiles:
scores' dP = dO W^T, the system's dL = -dU W^T (the adjoint of a triangular solve), dQ from dO S^T, the write's dK from
W dS'^T, the erase read's dA from dU S^T. Gradients of beta and the decays are sums over key channels, so every tile of
keys stores its part of them. Taking the rows' lengths out of dq and dk needs whole sums at once: they are had from value
channels, q . dq = o . do, and k . dk = w . du for the write, w . du - v . dv for the erase read.

Queries and keys have a kernel each, which keeps registers few. Both score gradients are formed twice, once transposed, by a
product of their own: a transposed accumulator fed to another product is miscompiled on Hopper by Triton 3.4 to 3.7.
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


@triton.jit
def store_rows(ptr, d, along, x, length, row, stride, channel, mask, NORMALIZE: tl.constexpr):
    """Store the gradient of raw rows x from d, that of their unit form, with along = <unit, d> over all channels."""
    if NORMALIZE:
        d = (d - x.to(tl.float32) * (length * along)[:, None]) * length[:, None]
    tl.store(ptr + row[:, None] * stride + channel[None, :], d.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def query_gradients(
    q_ptr,
    k_ptr,
    o_ptr,  # [T, H, V]
    do_ptr,
    vector_ptr,
    chunk_ptr,
    state_ptr,  # [chunks, H, K, V]
    write_ptr,  # [T, H, V]
    dq_ptr,  # [T, H, K]
    ddecay_ptr,  # [tiles, T, H] fp32, to be summed over the tiles of keys
    scale,
    tokens,  # rows of a tile's part
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
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
    channel = tile * TK + tl.arange(0, TK)
    in_keys = channel < K
    block = program.to(tl.int64)
    vector = vector_ptr + block * (ROWS * C) + row
    state_ptr += block * (K * V)
    do_ptr += start * stride_ot + head * stride_oh
    at_value = (start * H + head) * V

    dscores = tl.zeros([C, C], tl.float32)
    dq = tl.zeros([C, TK], tl.float32)
    o_do = tl.zeros([C], tl.float32)
    for offset in range(0, V, BV):
        column = offset + tl.arange(0, BV)
        inside = column < V
        do = tile_of(do_ptr, row, stride_ot, column, keep, inside, V % BV == 0)
        write = tile_of(write_ptr + at_value, row, H * V, column, keep, inside, V % BV == 0)
        state = state_tile(state_ptr, channel, V, column, in_keys, inside, K % TK == 0 and V % BV == 0)
        dscores = tl.dot(do, tl.trans(write), dscores, input_precision=DOT)
        dq = tl.dot(do, tl.trans(state), dq, input_precision=DOT)
        if NORMALIZE:
            o = tile_of(o_ptr + at_value, row, H * V, column, keep, inside, V % BV == 0)
            o_do += tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    q_length = tl.load(vector + Q_LENGTH * C) / scale
    above = row[:, None] < row[None, :]
    dscores = tl.where(above, 0.0, dscores * tl.load(vector + K_LENGTH * C)[None, :])
    if DECAY == SCALAR:
        total = tl.load(vector + TOTAL * C)
        dq = dq * tl.exp2(total)[:, None]
        dscores = dscores * tl.exp2(tl.where(above, 0.0, total[:, None] - total[None, :]))
    k = tile_of(
        k_ptr + start * stride_kt + (head // GROUP) * stride_kh, row, stride_kt, channel, keep, in_keys, K % TK == 0
    )
    dq = tl.dot(dscores.to(dtype), k, dq, input_precision=DOT) * scale
    q = tile_of(
        q_ptr + start * stride_qt + (head // GROUP) * stride_qh, row, stride_qt, channel, keep, in_keys, K % TK == 0
    )
    if DECAY == SCALAR:
        dtotal = tl.sum(q.to(tl.float32) * dq, 1) * q_length
        ddecay = tl.sum(dtotal, 0) - tl.cumsum(dtotal, 0) + dtotal  # suffix sums
        part = (tile * tokens.to(tl.int64) + start) * H + head
        tl.store(ddecay_ptr + part + row * H, ddecay, mask=keep)
    mask = keep[:, None] & in_keys[None, :]
    store_rows(dq_ptr + (start * H + head) * K, dq, o_do, q, q_length, row, H * K, channel, mask, NORMALIZE)


@triton.jit
def key_value_gradients(
    q_ptr,
    k_ptr,
    v_ptr,
    a_ptr,
    do_ptr,
    vector_ptr,
    chunk_ptr,
    state_ptr,  # [chunks, H, K, V]
    dstate_ptr,  # [chunks, H, K, V]
    write_ptr,  # [T, H, V]
    du_ptr,  # [T, H, V]
    dk_ptr,  # [T, H, K]
    da_ptr,
    dv_ptr,  # [T, H, V]
    dbeta_ptr,  # [tiles, T, H] fp32, to be summed over the tiles of keys
    ddecay_ptr,  # [tiles, T, H] fp32
    tokens,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_at,
    stride_ah,
    stride_vt,
    stride_vh,
    stride_ot,
    stride_oh,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    TK: tl.constexpr,
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
    channel = tile * TK + tl.arange(0, TK)
    in_keys = channel < K
    block = program.to(tl.int64)
    vector = vector_ptr + block * (ROWS * C) + row
    state_ptr += block * (K * V)
    dstate_ptr += block * (K * V)
    do_ptr += start * stride_ot + head * stride_oh
    v_ptr += start * stride_vt + head * stride_vh
    q_ptr += start * stride_qt + (head // GROUP) * stride_qh
    at_value = (start * H + head) * V
    beta = tl.load(vector + BETA * C)
    k_length = tl.load(vector + K_LENGTH * C)
    a_length = tl.load(vector + A_LENGTH * C) if ERASE else k_length
    if DECAY == SCALAR:
        total = tl.load(vector + TOTAL * C)
        whole = tl.load(vector_ptr + block * (ROWS * C) + TOTAL * C + C - 1)
        read = tl.load(vector + READ * C) if EXCLUSIVE else total
    k = tile_of(
        k_ptr + start * stride_kt + (head // GROUP) * stride_kh, row, stride_kt, channel, keep, in_keys, K % TK == 0
    )

    # da: gradient of the unit erase key, which opens the sum for the write key where that is the same.
    dsystem = tl.zeros([C, C], tl.float32)
    da = tl.zeros([C, TK], tl.float32)
    v_du = tl.zeros([C], tl.float32)
    w_du = tl.zeros([C], tl.float32)
    for offset in range(0, V, BV):
        column = offset + tl.arange(0, BV)
        inside = column < V
        du = tile_of(du_ptr + at_value, row, H * V, column, keep, inside, V % BV == 0)
        write = tile_of(write_ptr + at_value, row, H * V, column, keep, inside, V % BV == 0)
        state = state_tile(state_ptr, channel, V, column, in_keys, inside, K % TK == 0 and V % BV == 0)
        dsystem = tl.dot(du, tl.trans(write), dsystem, input_precision=DOT)
        da = tl.dot(du, tl.trans(state), da, input_precision=DOT)
        wide = du.to(tl.float32)
        v = tile_of(v_ptr, row, stride_vt, column, keep, inside, V % BV == 0)
        v_du += tl.sum(wide * v.to(tl.float32), 1)
        w_du += tl.sum(wide * write.to(tl.float32), 1)
        if tile == 0:
            dv = (wide * beta[:, None]).to(dv_ptr.dtype.element_ty)
            at = dv_ptr + at_value + row[:, None] * (H * V) + column[None, :]
            tl.store(at, dv, mask=keep[:, None] & inside[None, :])
    v_dv = v_du * beta
    below = row[:, None] > row[None, :]
    dsystem = tl.where(below, dsystem * -k_length[None, :], 0.0)
    da = -da
    if DECAY == SCALAR:
        da = da * tl.exp2(read)[:, None]
        dsystem = dsystem * tl.exp2(tl.where(below, read[:, None] - total[None, :], 0.0))
    da = tl.dot(dsystem.to(dtype), k, da, input_precision=DOT)
    if ERASE:
        a_ptr += start * stride_at + (head // GROUP) * stride_ah
        erase = tile_of(a_ptr, row, stride_at, channel, keep, in_keys, K % TK == 0)
    else:
        erase = k
    erased = tl.sum(erase.to(tl.float32) * da, 1) * a_length
    part = (tile * tokens.to(tl.int64) + start) * H + head
    if HAS_BETA:
        tl.store(dbeta_ptr + part + row * H, tl.where(tile == 0, v_du, 0.0) + erased, mask=keep)
    erased = erased * beta
    dk = da * beta[:, None]
    at_key = (start * H + head) * K
    mask = keep[:, None] & in_keys[None, :]
    if ERASE:
        store_rows(da_ptr + at_key, dk, w_du - v_dv, erase, a_length, row, H * K, channel, mask, NORMALIZE)
        dk = tl.zeros([C, TK], tl.float32)
        along = w_du
    else:
        along = 2.0 * w_du - v_dv

    # dk: gradient of the unit write key.
    dscores_t = tl.zeros([C, C], tl.float32)
    dsystem_t = tl.zeros([C, C], tl.float32)
    if DECAY == SCALAR:
        in_dk = 0.0 if ERASE else erased  # what of k . dk is not the write key's
        closing = tl.exp2(whole - total)
    overlap = tl.zeros([TK], tl.float32)  # <S, dS'> by key
    for offset in range(0, V, BV):
        column = offset + tl.arange(0, BV)
        inside = column < V
        write = tile_of(write_ptr + at_value, row, H * V, column, keep, inside, V % BV == 0)
        do = tile_of(do_ptr, row, stride_ot, column, keep, inside, V % BV == 0)
        du = tile_of(du_ptr + at_value, row, H * V, column, keep, inside, V % BV == 0)
        dstate = state_tile(dstate_ptr, channel, V, column, in_keys, inside, K % TK == 0 and V % BV == 0)
        dscores_t = tl.dot(write, tl.trans(do), dscores_t, input_precision=DOT)
        dsystem_t = tl.dot(write, tl.trans(du), dsystem_t, input_precision=DOT)
        if DECAY == SCALAR:
            state = state_tile(state_ptr, channel, V, column, in_keys, inside, K % TK == 0 and V % BV == 0)
            overlap += tl.sum(state.to(tl.float32) * dstate.to(tl.float32), 1)
            write = (write.to(tl.float32) * closing[:, None]).to(dtype)
        dk = tl.dot(write, tl.trans(dstate), dk, input_precision=DOT)
    q_length = tl.load(vector + Q_LENGTH * C)  # scale included
    dscores_t = tl.where(row[:, None] > row[None, :], 0.0, dscores_t * q_length[None, :])
    dsystem_t = tl.where(row[:, None] < row[None, :], dsystem_t * (-beta * a_length)[None, :], 0.0)
    if DECAY == SCALAR:
        after = tl.where(row[:, None] > row[None, :], 0.0, total[None, :] - total[:, None])
        dscores_t = dscores_t * tl.exp2(after)
        if EXCLUSIVE:
            after = tl.where(row[:, None] < row[None, :], read[None, :] - total[:, None], 0.0)
        dsystem_t = dsystem_t * tl.exp2(after)
        to_end = tl.sum(k.to(tl.float32) * dk, 1) * k_length - in_dk
        dwhole = tl.sum(overlap, 0) * tl.exp2(whole) + tl.sum(to_end, 0)
    q = tile_of(q_ptr, row, stride_qt, channel, keep, in_keys, K % TK == 0)
    dk = tl.dot(dscores_t.to(dtype), q, dk, input_precision=DOT)
    dk = tl.dot(dsystem_t.to(dtype), erase, dk, input_precision=DOT)
    if DECAY == SCALAR:
        dtotal = erased + in_dk - tl.sum(k.to(tl.float32) * dk, 1) * k_length
        ddecay = tl.sum(dtotal, 0) + dwhole - tl.cumsum(dtotal, 0) + dtotal  # suffix sums
        if EXCLUSIVE:
            ddecay -= erased
        tl.store(ddecay_ptr + part + row * H, ddecay, mask=keep)
    store_rows(dk_ptr + at_key, dk, along, k, k_length, row, H * K, channel, mask, NORMALIZE)
