"""Gradients of a chunk's inputs from its boundary states and their gradients: all chunks and tiles of keys at once.

With W the chunk's writes, U = beta X, and dU, dO given (see triton_sweep), every gradient is a sum over value tiles:
scores' dP = dO W^T, the system's dL = -dU W^T (the adjoint of a triangular solve), dQ from dO S^T, the write's dK from
W dS'^T, the erase read's dA from dU S^T. Gradients of beta and the decays are sums over key channels, so every tile of
keys stores its part of them. Taking the rows' lengths out of dq and dk needs whole sums at once: they are had from value
channels, q . dq = o . do, and k . dk = w . du for the write, w . du - v . dv for the erase read.

Both score gradients are formed twice, once transposed, by a product of their own: a transposed accumulator fed to another
product is miscompiled on Hopper by Triton 3.4 to 3.7.
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
    load_rows,
)


@triton.jit
def store_rows(ptr, d, along, x, length, rows, stride, channel, mask, NORMALIZE: tl.constexpr):
    """Store the gradient of raw rows x from d, that of their unit form, with along = <unit, d> over all channels."""
    if NORMALIZE:
        d = (d - x.to(tl.float32) * (length * along)[:, None]) * length[:, None]
    tl.store(ptr + rows[:, None] * stride + channel[None, :], d.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def chunk_gradients(
    q_ptr,
    k_ptr,
    v_ptr,
    a_ptr,
    o_ptr,  # [T, H, V]
    do_ptr,
    vector_ptr,
    chunk_ptr,
    state_ptr,  # [chunks, H, K, V]
    dstate_ptr,  # [chunks, H, K, V]
    write_ptr,  # [T, H, V]
    du_ptr,  # [T, H, V]
    dq_ptr,  # [T, H, K]
    dk_ptr,
    da_ptr,
    dv_ptr,  # [T, H, V]
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
    stride_vt,
    stride_vh,
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
    start = tl.load(chunk_ptr + 2 * chunk)
    length = tl.load(chunk_ptr + 2 * chunk + 1)
    if length == 0:
        return
    dtype: tl.constexpr = k_ptr.dtype.element_ty
    row = tl.arange(0, C)
    keep = row < length
    rows = (start + row).to(tl.int64)
    channel = tile * TK + tl.arange(0, TK)
    in_keys = channel < K
    key_mask = keep[:, None] & in_keys[None, :]
    k_ptr += (head // GROUP) * stride_kh
    q_ptr += (head // GROUP) * stride_qh
    a_ptr += (head // GROUP) * stride_ah
    v_ptr += head * stride_vh
    do_ptr += head * stride_oh
    block = program.to(tl.int64)
    vector = vector_ptr + block * (ROWS * C) + row
    beta = tl.load(vector + BETA * C)
    q_length = tl.load(vector + Q_LENGTH * C)  # scale included
    k_length = tl.load(vector + K_LENGTH * C)
    a_length = tl.load(vector + A_LENGTH * C) if ERASE else k_length
    if DECAY == SCALAR:
        total = tl.load(vector + TOTAL * C)
        whole = tl.load(vector_ptr + block * (ROWS * C) + TOTAL * C + C - 1)
        read = tl.load(vector + READ * C) if EXCLUSIVE else total
    state_ptr += block * (K * V)
    dstate_ptr += block * (K * V)
    cell = channel[:, None] * V
    at_value = (rows * H + head) * V
    above = row[:, None] < row[None, :]
    below = row[:, None] > row[None, :]
    k = load_rows(k_ptr, rows, stride_kt, channel, keep, K, TK)

    # dq: gradient of the unit query, over scale until the end.
    dscores = tl.zeros([C, C], tl.float32)
    dq = tl.zeros([C, TK], tl.float32)
    o_do = tl.zeros([C], tl.float32)
    for offset in range(0, V, BV):
        column = offset + tl.arange(0, BV)
        inside = column < V
        mask = keep[:, None] & inside[None, :]
        do = tl.load(do_ptr + rows[:, None] * stride_ot + column[None, :], mask=mask, other=0.0)
        write = tl.load(write_ptr + at_value[:, None] + column[None, :], mask=mask, other=0.0)
        in_state = in_keys[:, None] & inside[None, :]
        state = tl.load(state_ptr + cell + column[None, :], mask=in_state, other=0.0)
        dscores = tl.dot(do, tl.trans(write), dscores, input_precision=DOT)
        dq = tl.dot(do, tl.trans(state), dq, input_precision=DOT)
        if NORMALIZE:
            o = tl.load(o_ptr + at_value[:, None] + column[None, :], mask=mask, other=0.0)
            o_do += tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    dscores = tl.where(above, 0.0, dscores * k_length[None, :])
    if DECAY == SCALAR:
        dq = dq * tl.exp2(total)[:, None]
        dscores = dscores * tl.exp2(tl.where(above, 0.0, total[:, None] - total[None, :]))
    dq = tl.dot(dscores.to(dtype), k, dq, input_precision=DOT) * scale
    q = load_rows(q_ptr, rows, stride_qt, channel, keep, K, TK)
    if DECAY == SCALAR:
        dtotal = tl.sum(q.to(tl.float32) * dq, 1) * (q_length / scale)
    store_rows(dq_ptr + head * K, dq, o_do, q, q_length / scale, rows, H * K, channel, key_mask, NORMALIZE)

    # da: gradient of the unit erase key, which opens the sum for the write key where that is the same.
    dsystem = tl.zeros([C, C], tl.float32)
    da = tl.zeros([C, TK], tl.float32)
    v_du = tl.zeros([C], tl.float32)
    w_du = tl.zeros([C], tl.float32)
    for offset in range(0, V, BV):
        column = offset + tl.arange(0, BV)
        inside = column < V
        mask = keep[:, None] & inside[None, :]
        du = tl.load(du_ptr + at_value[:, None] + column[None, :], mask=mask, other=0.0)
        write = tl.load(write_ptr + at_value[:, None] + column[None, :], mask=mask, other=0.0)
        v = tl.load(v_ptr + rows[:, None] * stride_vt + column[None, :], mask=mask, other=0.0)
        in_state = in_keys[:, None] & inside[None, :]
        state = tl.load(state_ptr + cell + column[None, :], mask=in_state, other=0.0)
        dsystem = tl.dot(du, tl.trans(write), dsystem, input_precision=DOT)
        da = tl.dot(du, tl.trans(state), da, input_precision=DOT)
        wide = du.to(tl.float32)
        v_du += tl.sum(wide * v.to(tl.float32), 1)
        w_du += tl.sum(wide * write.to(tl.float32), 1)
        if tile == 0:
            dv = (wide * beta[:, None]).to(dv_ptr.dtype.element_ty)
            tl.store(dv_ptr + at_value[:, None] + column[None, :], dv, mask=mask)
    v_dv = v_du * beta
    dsystem = tl.where(below, dsystem * -k_length[None, :], 0.0)
    da = -da
    if DECAY == SCALAR:
        da = da * tl.exp2(read)[:, None]
        dsystem = dsystem * tl.exp2(tl.where(below, read[:, None] - total[None, :], 0.0))
    da = tl.dot(dsystem.to(dtype), k, da, input_precision=DOT)
    if ERASE:
        erase = load_rows(a_ptr, rows, stride_at, channel, keep, K, TK)
    else:
        erase = k
    erased = tl.sum(erase.to(tl.float32) * da, 1) * a_length
    part = (tile * tokens.to(tl.int64) + rows) * H + head
    if HAS_BETA:
        tl.store(dbeta_ptr + part, tl.where(tile == 0, v_du, 0.0) + erased, mask=keep)
    erased = erased * beta
    dk = da * beta[:, None]
    if ERASE:
        store_rows(da_ptr + head * K, dk, w_du - v_dv, erase, a_length, rows, H * K, channel, key_mask, NORMALIZE)
        dk = tl.zeros([C, TK], tl.float32)
        along = w_du
    else:
        along = 2.0 * w_du - v_dv

    # dk: gradient of the unit write key.
    dscores_t = tl.zeros([C, C], tl.float32)
    dsystem_t = tl.zeros([C, C], tl.float32)
    if DECAY == SCALAR:
        in_dk = 0.0 if ERASE else erased  # what of k . dk is not the write key's
    overlap = tl.zeros([TK], tl.float32)  # <S, dS'> by key
    for offset in range(0, V, BV):
        column = offset + tl.arange(0, BV)
        inside = column < V
        mask = keep[:, None] & inside[None, :]
        write = tl.load(write_ptr + at_value[:, None] + column[None, :], mask=mask, other=0.0)
        do = tl.load(do_ptr + rows[:, None] * stride_ot + column[None, :], mask=mask, other=0.0)
        du = tl.load(du_ptr + at_value[:, None] + column[None, :], mask=mask, other=0.0)
        in_state = in_keys[:, None] & inside[None, :]
        dstate = tl.load(dstate_ptr + cell + column[None, :], mask=in_state, other=0.0)
        dscores_t = tl.dot(write, tl.trans(do), dscores_t, input_precision=DOT)
        dsystem_t = tl.dot(write, tl.trans(du), dsystem_t, input_precision=DOT)
        if DECAY == SCALAR:
            state = tl.load(state_ptr + cell + column[None, :], mask=in_state, other=0.0)
            overlap += tl.sum(state.to(tl.float32) * dstate.to(tl.float32), 1)
            write = (write.to(tl.float32) * tl.exp2(whole - total)[:, None]).to(dtype)
        dk = tl.dot(write, tl.trans(dstate), dk, input_precision=DOT)
    dscores_t = tl.where(below, 0.0, dscores_t * q_length[None, :])
    dsystem_t = tl.where(above, dsystem_t * (-beta * a_length)[None, :], 0.0)
    if DECAY == SCALAR:
        dscores_t = dscores_t * tl.exp2(tl.where(below, 0.0, total[None, :] - total[:, None]))
        dsystem_t = dsystem_t * tl.exp2(tl.where(above, read[None, :] - total[:, None], 0.0))
        to_end = tl.sum(k.to(tl.float32) * dk, 1) * k_length - in_dk
        dwhole = tl.sum(overlap, 0) * tl.exp2(whole) + tl.sum(to_end, 0)
    q = load_rows(q_ptr, rows, stride_qt, channel, keep, K, TK)
    dk = tl.dot(dscores_t.to(dtype), q, dk, input_precision=DOT)
    dk = tl.dot(dsystem_t.to(dtype), erase, dk, input_precision=DOT)
    if DECAY == SCALAR:
        dtotal += erased + in_dk - tl.sum(k.to(tl.float32) * dk, 1) * k_length
        ddecay = tl.sum(dtotal, 0) + dwhole - tl.cumsum(dtotal, 0) + dtotal  # suffix sums
        if EXCLUSIVE:
            ddecay -= erased
        tl.store(ddecay_ptr + part, ddecay, mask=keep)
    store_rows(dk_ptr + head * K, dk, along, k, k_length, rows, H * K, channel, key_mask, NORMALIZE)
