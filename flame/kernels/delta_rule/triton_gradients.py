"""Gradients of a chunk's inputs from its boundary states and their gradients; all chunks at once.

With W the chunk's writes, U = beta X, and dU, dO given (see triton_sweep), every gradient is a sum over value tiles:
scores' dP = dO W^T, the system's dL = -dU W^T (the adjoint of a triangular solve), dQ from dO S^T, the write's dK from
W dS'^T, the erase read's dA from dU S^T. Both score gradients are formed twice, once transposed, by a product of their
own: a transposed accumulator fed to another product is miscompiled on Hopper by Triton 3.4 to 3.7.
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
    TOTAL,
    load_rows,
)


@triton.jit
def store_direction(ptr, d, x, length, rows, stride, channel, keep, K: tl.constexpr, NORMALIZE: tl.constexpr):
    """Store the gradient of raw rows from `d`, that of their scaled form; x raw, length = 1 / |x| (times nothing)."""
    if NORMALIZE:
        unit = x.to(tl.float32) * length[:, None]
        d = (d - unit * tl.sum(unit * d, 1)[:, None]) * length[:, None]
    mask = keep[:, None] & (channel < K)[None, :]
    tl.store(ptr + rows[:, None] * stride + channel[None, :], d.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def chunk_gradients(
    q_ptr,
    k_ptr,
    v_ptr,
    a_ptr,
    do_ptr,
    decay_ptr,
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
    dbeta_ptr,  # [T, H] fp32
    ddecay_ptr,  # [T, H] fp32
    scale,
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
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    DECAY: tl.constexpr,
    HAS_BETA: tl.constexpr,
    ERASE: tl.constexpr,
    EXCLUSIVE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    FUSED: tl.constexpr,  # one pass over the value tiles with all accumulators; else one pass each, for wide keys
    DOT: tl.constexpr,
):
    program = tl.program_id(0)
    chunk, head = program // H, program % H
    start = tl.load(chunk_ptr + 2 * chunk)
    length = tl.load(chunk_ptr + 2 * chunk + 1)
    if length == 0:
        return
    dtype: tl.constexpr = k_ptr.dtype.element_ty
    row = tl.arange(0, C)
    keep = row < length
    rows = (start + row).to(tl.int64)
    channel = tl.arange(0, BK)
    in_keys = channel < K
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
    if DECAY:
        total = tl.load(vector + TOTAL * C)
        whole = tl.load(vector_ptr + block * (ROWS * C) + TOTAL * C + C - 1)
        read = tl.load(vector + READ * C) if EXCLUSIVE else total
        opened = tl.exp2(total)
        closing = tl.exp2(whole - total)
        reading = tl.exp2(read)

    dscores = tl.zeros([C, C], tl.float32)  # [i, j]
    dscores_t = tl.zeros([C, C], tl.float32)  # [j, i]
    dsystem = tl.zeros([C, C], tl.float32)
    dsystem_t = tl.zeros([C, C], tl.float32)
    dbeta = tl.zeros([C], tl.float32)
    overlap = tl.zeros([BK], tl.float32)  # <S, dS'> by key
    if FUSED:
        dq = tl.zeros([C, BK], tl.float32)
        da = tl.zeros([C, BK], tl.float32)
        dk = tl.zeros([C, BK], tl.float32)
    for offset in range(0, V, BV):
        column = offset + tl.arange(0, BV)
        inside = column < V
        mask = keep[:, None] & inside[None, :]
        at_value = (rows[:, None] * H + head) * V + column[None, :]
        do = tl.load(do_ptr + rows[:, None] * stride_ot + column[None, :], mask=mask, other=0.0)
        du = tl.load(du_ptr + at_value, mask=mask, other=0.0)
        write = tl.load(write_ptr + at_value, mask=mask, other=0.0)
        v = tl.load(v_ptr + rows[:, None] * stride_vt + column[None, :], mask=mask, other=0.0)
        dscores = tl.dot(do, tl.trans(write), dscores, input_precision=DOT)
        dscores_t = tl.dot(write, tl.trans(do), dscores_t, input_precision=DOT)
        dsystem = tl.dot(du, tl.trans(write), dsystem, input_precision=DOT)
        dsystem_t = tl.dot(write, tl.trans(du), dsystem_t, input_precision=DOT)
        wide = du.to(tl.float32)
        dbeta += tl.sum(wide * v.to(tl.float32), 1)
        tl.store(dv_ptr + at_value, (wide * beta[:, None]).to(dv_ptr.dtype.element_ty), mask=mask)
        if FUSED or DECAY:
            cell = channel[:, None] * V + column[None, :]
            in_state = in_keys[:, None] & inside[None, :]
            state = tl.load(state_ptr + block * (K * V) + cell, mask=in_state, other=0.0)
            dstate = tl.load(dstate_ptr + block * (K * V) + cell, mask=in_state, other=0.0)
            if DECAY:
                overlap += tl.sum(state.to(tl.float32) * dstate.to(tl.float32), 1)
            if FUSED:
                dq = tl.dot(do, tl.trans(state), dq, input_precision=DOT)
                da = tl.dot(du, tl.trans(state), da, input_precision=DOT)
                dk = tl.dot(write, tl.trans(dstate), dk, input_precision=DOT)

    lower = row[:, None] >= row[None, :]
    below = row[:, None] > row[None, :]
    if DECAY:
        score_gate = tl.where(lower, tl.exp2(tl.where(lower, total[:, None] - total[None, :], 0.0)), 0.0)
        score_gate_t = tl.where(lower, 0.0, tl.exp2(tl.where(lower, 0.0, total[None, :] - total[:, None])))
        score_gate_t = tl.where(row[:, None] == row[None, :], 1.0, score_gate_t)
        system_gate = tl.where(below, tl.exp2(tl.where(below, read[:, None] - total[None, :], 0.0)), 0.0)
        above = row[:, None] < row[None, :]
        system_gate_t = tl.where(above, tl.exp2(tl.where(above, read[None, :] - total[:, None], 0.0)), 0.0)
    else:
        score_gate = tl.where(lower, 1.0, 0.0)
        score_gate_t = tl.where(row[:, None] <= row[None, :], 1.0, 0.0)
        system_gate = tl.where(below, 1.0, 0.0)
        system_gate_t = tl.where(row[:, None] < row[None, :], 1.0, 0.0)
    dscores = (dscores * score_gate * k_length[None, :]).to(dtype)
    dscores_t = (dscores_t * score_gate_t * q_length[None, :]).to(dtype)
    dsystem = (dsystem * system_gate * -k_length[None, :]).to(dtype)
    dsystem_t = (dsystem_t * system_gate_t * (-beta * a_length)[None, :]).to(dtype)

    q = load_rows(q_ptr, rows, stride_qt, channel, keep, K, BK)
    k = load_rows(k_ptr, rows, stride_kt, channel, keep, K, BK)
    # dq: gradient of the scaled unit query times scale.
    if not FUSED:
        dq = tl.zeros([C, BK], tl.float32)
        for offset in range(0, V, BV):
            column = offset + tl.arange(0, BV)
            inside = column < V
            mask = keep[:, None] & inside[None, :]
            do = tl.load(do_ptr + rows[:, None] * stride_ot + column[None, :], mask=mask, other=0.0)
            cell = channel[:, None] * V + column[None, :]
            in_state = in_keys[:, None] & inside[None, :]
            state = tl.load(state_ptr + block * (K * V) + cell, mask=in_state, other=0.0)
            dq = tl.dot(do, tl.trans(state), dq, input_precision=DOT)
    if DECAY:
        dq = dq * opened[:, None]
    dq = tl.dot(dscores, k, dq, input_precision=DOT) * scale
    unit_length = q_length / scale
    if DECAY:
        dtotal = tl.sum(q.to(tl.float32) * dq, 1) * unit_length
    store_direction(dq_ptr + head * K, dq, q, unit_length, rows, H * K, channel, keep, K, NORMALIZE)

    # da: gradient of the unit erase key over beta.
    if not FUSED:
        da = tl.zeros([C, BK], tl.float32)
        for offset in range(0, V, BV):
            column = offset + tl.arange(0, BV)
            inside = column < V
            mask = keep[:, None] & inside[None, :]
            at_value = (rows[:, None] * H + head) * V + column[None, :]
            du = tl.load(du_ptr + at_value, mask=mask, other=0.0)
            cell = channel[:, None] * V + column[None, :]
            in_state = in_keys[:, None] & inside[None, :]
            state = tl.load(state_ptr + block * (K * V) + cell, mask=in_state, other=0.0)
            da = tl.dot(du, tl.trans(state), da, input_precision=DOT)
    da = -da
    if DECAY:
        da = da * reading[:, None]
    da = tl.dot(dsystem, k, da, input_precision=DOT)
    if ERASE:
        erase = load_rows(a_ptr, rows, stride_at, channel, keep, K, BK)
    else:
        erase = k
    along = tl.sum(erase.to(tl.float32) * da, 1) * a_length
    if HAS_BETA:
        tl.store(dbeta_ptr + rows * H + head, dbeta + along, mask=keep)
    da = da * beta[:, None]
    along = along * beta
    if ERASE:
        store_direction(da_ptr + head * K, da, erase, a_length, rows, H * K, channel, keep, K, NORMALIZE)

    # dk: gradient of the unit write key, then of the erase read where that is the same key.
    if not FUSED:
        dk = tl.zeros([C, BK], tl.float32)
        for offset in range(0, V, BV):
            column = offset + tl.arange(0, BV)
            inside = column < V
            mask = keep[:, None] & inside[None, :]
            at_value = (rows[:, None] * H + head) * V + column[None, :]
            write = tl.load(write_ptr + at_value, mask=mask, other=0.0)
            cell = channel[:, None] * V + column[None, :]
            in_state = in_keys[:, None] & inside[None, :]
            dstate = tl.load(dstate_ptr + block * (K * V) + cell, mask=in_state, other=0.0)
            dk = tl.dot(write, tl.trans(dstate), dk, input_precision=DOT)
    unit_k = k.to(tl.float32) * k_length[:, None]
    if DECAY:
        dk = dk * closing[:, None]
        dwhole = tl.sum(overlap, 0) * tl.exp2(whole) + tl.sum(tl.sum(unit_k * dk, 1), 0)
    dk = tl.dot(dscores_t, q, dk, input_precision=DOT)
    dk = tl.dot(dsystem_t, erase, dk, input_precision=DOT)
    if DECAY:
        dtotal += along - tl.sum(unit_k * dk, 1)
        dtotal += tl.where(row == C - 1, dwhole, 0.0)
        ddecay = tl.sum(dtotal, 0) - tl.cumsum(dtotal, 0) + dtotal  # suffix sums
        if EXCLUSIVE:
            ddecay -= along
        tl.store(ddecay_ptr + rows * H + head, ddecay, mask=keep)
    if not ERASE:
        dk += da
    store_direction(dk_ptr + head * K, dk, k, k_length, rows, H * K, channel, keep, K, NORMALIZE)
