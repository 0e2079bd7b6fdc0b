"""Chunks whose decay is per key channel: decays gathered over the chunk, scores by halving, rows times their decay.

The score of rows i > j, sum_c x_ic y_jc exp(G_i - G_j)_c, has no factors that are safe for all decays at once. So the chunk
is halved again and again: at width h, a row in the right half of its block of 2 h rows carries exp(G - p), one in the left
half exp(p - G), with p the total at the left half's end. Both exponents are <= 0, and one product a width serves all blocks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flame.kernels.delta_rule.triton_gradients import store_rows
from flame.kernels.delta_rule.triton_prepare import (
    BETA,
    K_LENGTH,
    LOG2E,
    Q_LENGTH,
    ROWS,
    inverse_length,
    invert,
    load_rows,
)


@triton.jit
def cumulate(
    decay_ptr,  # [T, H, K] natural log
    chunk_ptr,
    total_ptr,  # [T, H, K] fp32, log2 decay since the chunk's start
    factor_ptr,  # [chunks, H, K] fp32, decay over the chunk
    H: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
    C: tl.constexpr,
):
    program = tl.program_id(0)
    chunk, head = program // H, program % H
    start = tl.load(chunk_ptr + 2 * chunk)
    length = tl.load(chunk_ptr + 2 * chunk + 1)
    row = tl.arange(0, C)
    keep = row < length
    rows = (start + row).to(tl.int64)
    channel = tl.arange(0, BK)
    log = load_rows(decay_ptr + head * K, rows, H * K, channel, keep, K, BK).to(tl.float32) * LOG2E
    mask = keep[:, None] & (channel < K)[None, :]
    tl.store(total_ptr + (rows * H + head)[:, None] * K + channel[None, :], tl.cumsum(log, 0), mask=mask)
    tl.store(factor_ptr + program.to(tl.int64) * K + channel, tl.exp2(tl.sum(log, 0)), mask=channel < K)


@triton.jit
def pivot_factor(total_ptr, total, start, length, stride, channel, half, row, K: tl.constexpr, BK: tl.constexpr):
    """exp2(-|G - p|) [C, BK] at half width `half`, p the total at the end of the left half of the row's block."""
    at = row // (2 * half) * (2 * half) + half - 1
    pivot = load_rows(total_ptr, (start + at).to(tl.int64), stride, channel, at < length, K, BK)
    return tl.exp2(-tl.abs(total - pivot))


@triton.jit
def pairs(row, half):
    """Mask [C, C] of i in a right half and j in the left half of the same block."""
    block = row // (2 * half)
    right = (row // half) % 2 == 1
    same = block[:, None] == block[None, :]
    return same & right[:, None] & (row // half % 2 == 0)[None, :]


@triton.jit
def prepare_keys(
    q_ptr,
    k_ptr,
    beta_ptr,  # [T, H]
    total_ptr,
    factor_ptr,
    chunk_ptr,
    vector_ptr,
    inverse_ptr,
    score_ptr,
    seen_ptr,  # [T, H, K] Q e^G, at unit length times scale
    read_ptr,  # [T, H, K] K e^G, at unit length
    written_ptr,  # [T, H, K] K e^(Gc - G), at unit length
    scale,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
    C: tl.constexpr,
    HAS_BETA: tl.constexpr,
    NORMALIZE: tl.constexpr,
    NORM_EPS: tl.constexpr,
    SCORES: tl.constexpr,  # else only the rows, again, for the backward
    DOT: tl.constexpr,
    EXACT: tl.constexpr,
):
    program = tl.program_id(0)
    chunk, head = program // H, program % H
    start = tl.load(chunk_ptr + 2 * chunk)
    length = tl.load(chunk_ptr + 2 * chunk + 1)
    dtype: tl.constexpr = k_ptr.dtype.element_ty
    row = tl.arange(0, C)
    keep = row < length
    rows = (start + row).to(tl.int64)
    channel = tl.arange(0, BK)
    total_ptr += head * K
    q = load_rows(q_ptr + (head // GROUP) * stride_qh, rows, stride_qt, channel, keep, K, BK)
    k = load_rows(k_ptr + (head // GROUP) * stride_kh, rows, stride_kt, channel, keep, K, BK)
    total = load_rows(total_ptr, rows, H * K, channel, keep, K, BK)
    q_length = tl.full([C], 1.0, tl.float32)
    k_length = tl.full([C], 1.0, tl.float32)
    if NORMALIZE:
        q_length = inverse_length(q, NORM_EPS)
        k_length = inverse_length(k, NORM_EPS)
    q_length = q_length * scale
    q = q.to(tl.float32)
    k = k.to(tl.float32)

    last = (start + tl.maximum(length - 1, 0)).to(tl.int64)  # a surplus chunk has no row
    in_keys = channel < K
    whole = tl.load(total_ptr + last * H * K + channel, mask=in_keys, other=0.0)
    at_key = (rows * H + head)[:, None] * K + channel[None, :]
    mask = keep[:, None] & in_keys[None, :]
    opened = tl.exp2(total)
    tl.store(seen_ptr + at_key, (q * opened * q_length[:, None]).to(dtype), mask=mask)
    tl.store(read_ptr + at_key, (k * opened * k_length[:, None]).to(dtype), mask=mask)
    closing = tl.exp2(tl.minimum(whole[None, :] - total, 0.0))
    tl.store(written_ptr + at_key, (k * closing * k_length[:, None]).to(dtype), mask=mask)

    if SCORES:
        vector = vector_ptr + program.to(tl.int64) * (ROWS * C) + row
        beta = tl.full([C], 1.0, tl.float32)
        if HAS_BETA:
            beta = tl.load(beta_ptr + rows * H + head, mask=keep, other=0.0).to(tl.float32)
        tl.store(vector + BETA * C, beta)
        tl.store(vector + Q_LENGTH * C, q_length)
        tl.store(vector + K_LENGTH * C, k_length)
        system = tl.zeros([C, C], tl.float32)
        scores = tl.where(row[:, None] == row[None, :], tl.sum(q * k, 1)[:, None], 0.0)
        half = C // 2
        while half > 0:
            decay = pivot_factor(total_ptr, total, start, length, H * K, channel, half, row, K, BK)
            left = (k * decay).to(dtype)
            chosen = pairs(row, half)
            system += tl.where(chosen, tl.dot(left, tl.trans(left), input_precision=DOT), 0.0)
            right = (q * decay).to(dtype)
            scores += tl.where(chosen, tl.dot(right, tl.trans(left), input_precision=DOT), 0.0)
            half = half // 2
        scores = scores * q_length[:, None] * k_length[None, :]
        system = system * (k_length * beta)[:, None] * k_length[None, :]
        cell = program.to(tl.int64) * (C * C) + row[:, None] * C + row[None, :]
        tl.store(score_ptr + cell, scores.to(dtype))
        PRECISION: tl.constexpr = "tf32x3" if EXACT else "tf32"
        tl.store(inverse_ptr + cell, invert(system, C, PRECISION).to(dtype))


@triton.jit
def key_gradients(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    do_ptr,
    total_ptr,
    vector_ptr,
    chunk_ptr,
    state_ptr,
    dstate_ptr,
    write_ptr,
    du_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    dbeta_ptr,  # [tiles, T, H] fp32, to be summed over the tiles of keys
    ddecay_ptr,  # [T, H, K]
    scale,
    tokens,  # rows of a tile's part
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
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
    HAS_BETA: tl.constexpr,
    NORMALIZE: tl.constexpr,
    DOT: tl.constexpr,
):
    """As triton_gradients.chunk_gradients, whose sums over value channels serve here too."""
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
    block = program.to(tl.int64)
    vector = vector_ptr + block * (ROWS * C) + row
    k_ptr += (head // GROUP) * stride_kh
    q_ptr += (head // GROUP) * stride_qh
    v_ptr += head * stride_vh
    do_ptr += head * stride_oh
    total_ptr += head * K
    beta = tl.load(vector + BETA * C)
    q_length = tl.load(vector + Q_LENGTH * C)  # scale included
    k_length = tl.load(vector + K_LENGTH * C)
    state_ptr += block * (K * V)
    dstate_ptr += block * (K * V)
    cell = channel[:, None] * V
    at_value = (rows * H + head) * V
    at_key = (rows * H + head)[:, None] * K + channel[None, :]
    key_mask = keep[:, None] & in_keys[None, :]
    k = load_rows(k_ptr, rows, stride_kt, channel, keep, K, TK).to(tl.float32)
    total = load_rows(total_ptr, rows, H * K, channel, keep, K, TK)

    # dq, with its share of the decays' gradient.
    dscores = tl.zeros([C, C], tl.float32)
    dq = tl.zeros([C, TK], tl.float32)
    o_do = tl.zeros([C], tl.float32)
    for offset in range(0, V, BV):
        column = offset + tl.arange(0, BV)
        inside = column < V
        mask = keep[:, None] & inside[None, :]
        do = tl.load(do_ptr + rows[:, None] * stride_ot + column[None, :], mask=mask, other=0.0)
        write = tl.load(write_ptr + at_value[:, None] + column[None, :], mask=mask, other=0.0)
        state = tl.load(state_ptr + cell + column[None, :], mask=in_keys[:, None] & inside[None, :], other=0.0)
        dscores = tl.dot(do, tl.trans(write), dscores, input_precision=DOT)
        dq = tl.dot(do, tl.trans(state), dq, input_precision=DOT)
        if NORMALIZE:
            o = tl.load(o_ptr + at_value[:, None] + column[None, :], mask=mask, other=0.0)
            o_do += tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    diagonal = tl.sum(tl.where(row[:, None] == row[None, :], dscores, 0.0), 1)
    dq = dq * tl.exp2(total) + (diagonal * k_length)[:, None] * k
    dscores = (dscores * k_length[None, :]).to(dtype)
    half = C // 2
    while half > 0:
        decay = pivot_factor(total_ptr, total, start, length, H * K, channel, half, row, K, TK)
        chosen = tl.where(pairs(row, half), dscores, 0.0)
        dq += decay * tl.dot(chosen, (k * decay).to(dtype), input_precision=DOT)
        half = half // 2
    dq = dq * scale
    q = load_rows(q_ptr, rows, stride_qt, channel, keep, K, TK).to(tl.float32)
    q_length_only = q_length / scale
    dtotal = q * dq * q_length_only[:, None]
    store_rows(dq_ptr + head * K, dq, o_do, q, q_length_only, rows, H * K, channel, key_mask, NORMALIZE)

    # da: of the erase read.
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
        state = tl.load(state_ptr + cell + column[None, :], mask=in_keys[:, None] & inside[None, :], other=0.0)
        dsystem = tl.dot(du, tl.trans(write), dsystem, input_precision=DOT)
        da = tl.dot(du, tl.trans(state), da, input_precision=DOT)
        wide = du.to(tl.float32)
        w_du += tl.sum(wide * write.to(tl.float32), 1)
        if NORMALIZE or HAS_BETA:
            v = tl.load(v_ptr + rows[:, None] * stride_vt + column[None, :], mask=mask, other=0.0)
            v_du += tl.sum(wide * v.to(tl.float32), 1)
        if tile == 0:
            dv = (wide * beta[:, None]).to(dv_ptr.dtype.element_ty)
            tl.store(dv_ptr + at_value[:, None] + column[None, :], dv, mask=mask)
    da = -da * tl.exp2(total)
    dsystem = (dsystem * -k_length[None, :]).to(dtype)
    half = C // 2
    while half > 0:
        decay = pivot_factor(total_ptr, total, start, length, H * K, channel, half, row, K, TK)
        chosen = tl.where(pairs(row, half), dsystem, 0.0)
        da += decay * tl.dot(chosen, (k * decay).to(dtype), input_precision=DOT)
        half = half // 2
    if HAS_BETA:
        part = (tile * tokens.to(tl.int64) + rows) * H + head
        erased = tl.sum(k * da, 1) * k_length
        tl.store(dbeta_ptr + part, tl.where(tile == 0, v_du, 0.0) + erased, mask=keep)
    da = da * beta[:, None]
    dtotal += k * da * k_length[:, None]

    # dk: of the write.
    dscores_t = tl.zeros([C, C], tl.float32)
    dsystem_t = tl.zeros([C, C], tl.float32)
    dk = tl.zeros([C, TK], tl.float32)
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
        state = tl.load(state_ptr + cell + column[None, :], mask=in_state, other=0.0)
        overlap += tl.sum(state.to(tl.float32) * dstate.to(tl.float32), 1)
        dscores_t = tl.dot(write, tl.trans(do), dscores_t, input_precision=DOT)
        dsystem_t = tl.dot(write, tl.trans(du), dsystem_t, input_precision=DOT)
        dk = tl.dot(write, tl.trans(dstate), dk, input_precision=DOT)
    last = (start + length - 1).to(tl.int64)
    whole = tl.load(total_ptr + last * H * K + channel, mask=in_keys, other=0.0)
    dk = dk * tl.exp2(tl.minimum(whole[None, :] - total, 0.0))
    dwhole = overlap * tl.exp2(whole) + tl.sum(k * dk * k_length[:, None], 0)
    dk += (diagonal * q_length)[:, None] * q
    dscores_t = (dscores_t * q_length[None, :]).to(dtype)
    dsystem_t = (dsystem_t * (-beta * k_length)[None, :]).to(dtype)
    half = C // 2
    while half > 0:
        decay = pivot_factor(total_ptr, total, start, length, H * K, channel, half, row, K, TK)
        block_of = row // (2 * half)
        chosen = (block_of[:, None] == block_of[None, :]) & (row // half % 2 == 0)[:, None]
        chosen = chosen & (row // half % 2 == 1)[None, :]
        change = tl.dot(tl.where(chosen, dscores_t, 0.0), (q * decay).to(dtype), input_precision=DOT)
        change = tl.dot(tl.where(chosen, dsystem_t, 0.0), (k * decay).to(dtype), change, input_precision=DOT)
        dk += decay * change
        half = half // 2
    dtotal -= k * dk * k_length[:, None]
    ddecay = (tl.sum(dtotal, 0) + dwhole)[None, :] - tl.cumsum(dtotal, 0) + dtotal  # suffix sums
    tl.store(ddecay_ptr + at_key, ddecay.to(ddecay_ptr.dtype.element_ty), mask=key_mask)
    along = 2.0 * w_du - v_du * beta
    store_rows(dk_ptr + head * K, dk + da, along, k, k_length, rows, H * K, channel, key_mask, NORMALIZE)
