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
    state_tile,
    tile_of,
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
    start = tl.load(chunk_ptr + 2 * chunk).to(tl.int64)
    length = tl.load(chunk_ptr + 2 * chunk + 1)
    row = tl.arange(0, C)
    keep = row < length
    channel = tl.arange(0, BK)
    in_keys = channel < K
    at_key = (start * H + head) * K
    log = tile_of(decay_ptr + at_key, row, H * K, channel, keep, in_keys, K == BK).to(tl.float32) * LOG2E
    mask = keep[:, None] & in_keys[None, :]
    tl.store(total_ptr + at_key + row[:, None] * (H * K) + channel[None, :], tl.cumsum(log, 0), mask=mask)
    tl.store(factor_ptr + program.to(tl.int64) * K + channel, tl.exp2(tl.sum(log, 0)), mask=in_keys)


@triton.jit
def pivot_factor(total_ptr, total, row, length, stride, channel, in_keys, half):
    """exp2(-|G - p|) [C, BK] at half width `half`, p the total at the end of the left half of the row's block.

    total_ptr stands at the chunk's first row."""
    at = row // (2 * half) * (2 * half) + half - 1
    pivot = tile_of(total_ptr, at, stride, channel, at < length, in_keys)
    return tl.exp2(-tl.abs(total - pivot))


@triton.jit
def pairs(row, half):
    """Mask [C, C] of i in a right half and j in the left half of the same block."""
    block = row // (2 * half)
    right = (row // half) % 2 == 1
    same = block[:, None] == block[None, :]
    return same & right[:, None] & (row // half % 2 == 0)[None, :]


@triton.jit
def pairs_transposed(row, half):
    """Mask [C, C] of j in a left half and i in the right half of the same block."""
    block = row // (2 * half)
    left = (row // half) % 2 == 0
    same = block[:, None] == block[None, :]
    return same & left[:, None] & (row // half % 2 == 1)[None, :]


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
    start = tl.load(chunk_ptr + 2 * chunk).to(tl.int64)
    length = tl.load(chunk_ptr + 2 * chunk + 1)
    dtype: tl.constexpr = k_ptr.dtype.element_ty
    row = tl.arange(0, C)
    keep = row < length
    channel = tl.arange(0, BK)
    in_keys = channel < K
    at_key = (start * H + head) * K
    total_ptr += at_key
    q = tile_of(
        q_ptr + start * stride_qt + (head // GROUP) * stride_qh, row, stride_qt, channel, keep, in_keys, K == BK
    )
    k = tile_of(
        k_ptr + start * stride_kt + (head // GROUP) * stride_kh, row, stride_kt, channel, keep, in_keys, K == BK
    )
    total = tile_of(total_ptr, row, H * K, channel, keep, in_keys, K == BK)
    q_length = tl.full([C], 1.0, tl.float32)
    k_length = tl.full([C], 1.0, tl.float32)
    if NORMALIZE:
        q_length = inverse_length(q, NORM_EPS)
        k_length = inverse_length(k, NORM_EPS)
    q_length = q_length * scale

    # The last row's total; a surplus chunk has no row.
    whole = tl.load(total_ptr + tl.maximum(length - 1, 0) * H * K + channel, mask=in_keys, other=0.0)
    cell = row[:, None] * (H * K) + channel[None, :]
    mask = keep[:, None] & in_keys[None, :]
    opened = tl.exp2(total)
    tl.store(seen_ptr + at_key + cell, (q * (opened * q_length[:, None])).to(dtype), mask=mask)
    tl.store(read_ptr + at_key + cell, (k * (opened * k_length[:, None])).to(dtype), mask=mask)
    closing = tl.exp2(tl.minimum(whole[None, :] - total, 0.0)) * k_length[:, None]
    tl.store(written_ptr + at_key + cell, (k * closing).to(dtype), mask=mask)

    if SCORES:
        vector = vector_ptr + program.to(tl.int64) * (ROWS * C) + row
        beta = tl.full([C], 1.0, tl.float32)
        if HAS_BETA:
            beta = tl.load(beta_ptr + (start + row) * H + head, mask=keep, other=0.0).to(tl.float32)
        tl.store(vector + BETA * C, beta)
        tl.store(vector + Q_LENGTH * C, q_length)
        tl.store(vector + K_LENGTH * C, k_length)
        system = tl.zeros([C, C], tl.float32)
        diagonal = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1)
        scores = tl.where(row[:, None] == row[None, :], diagonal[:, None], 0.0)
        half = C // 2
        while half > 0:
            decay = pivot_factor(total_ptr, total, row, length, H * K, channel, in_keys, half)
            left = (k * decay).to(dtype)
            chosen = pairs(row, half)
            system += tl.where(chosen, tl.dot(left, tl.trans(left), input_precision=DOT), 0.0)
            right = (q * decay).to(dtype)
            scores += tl.where(chosen, tl.dot(right, tl.trans(left), input_precision=DOT), 0.0)
            half = half // 2
        scores = scores * q_length[:, None] * k_length[None, :]
        system = system * (k_length * beta)[:, None] * k_length[None, :]
        square = program.to(tl.int64) * (C * C) + row[:, None] * C + row[None, :]
        tl.store(score_ptr + square, scores.to(dtype))
        PRECISION: tl.constexpr = "tf32x3" if EXACT else "tf32"
        tl.store(inverse_ptr + square, invert(system, C, PRECISION).to(dtype))


@triton.jit
def key_decay_query_gradients(
    q_ptr,
    k_ptr,
    o_ptr,
    do_ptr,
    total_ptr,
    vector_ptr,
    chunk_ptr,
    state_ptr,
    write_ptr,
    dq_ptr,
    ddecay_ptr,  # [T, H, K] fp32
    scale,
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
    TK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    NORMALIZE: tl.constexpr,
    DOT: tl.constexpr,
):
    """As triton_gradients.query_gradients, with its share of the decays' gradient."""
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
    at_key = (start * H + head) * K
    total_ptr += at_key
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
    k_length = tl.load(vector + K_LENGTH * C)
    k = tile_of(
        k_ptr + start * stride_kt + (head // GROUP) * stride_kh, row, stride_kt, channel, keep, in_keys, K % TK == 0
    )
    total = tile_of(total_ptr, row, H * K, channel, keep, in_keys, K % TK == 0)
    dscores = dscores * k_length[None, :]
    diagonal = tl.sum(tl.where(row[:, None] == row[None, :], dscores, 0.0), 1)
    dscores = dscores.to(dtype)
    dq = dq * tl.exp2(total) + k * diagonal[:, None]
    half = C // 2
    while half > 0:
        decay = pivot_factor(total_ptr, total, row, length, H * K, channel, in_keys, half)
        chosen = tl.where(pairs(row, half), dscores, 0.0)
        dq += decay * tl.dot(chosen, (k * decay).to(dtype), input_precision=DOT)
        half = half // 2
    dq = dq * scale
    q = tile_of(
        q_ptr + start * stride_qt + (head // GROUP) * stride_qh, row, stride_qt, channel, keep, in_keys, K % TK == 0
    )
    q_length = tl.load(vector + Q_LENGTH * C) / scale
    dtotal = q * dq * q_length[:, None]
    ddecay = tl.sum(dtotal, 0)[None, :] - tl.cumsum(dtotal, 0) + dtotal  # suffix sums
    mask = keep[:, None] & in_keys[None, :]
    tl.store(ddecay_ptr + at_key + row[:, None] * (H * K) + channel[None, :], ddecay, mask=mask)
    store_rows(dq_ptr + at_key, dq, o_do, q, q_length, row, H * K, channel, mask, NORMALIZE)


@triton.jit
def key_decay_key_gradients(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    total_ptr,
    vector_ptr,
    chunk_ptr,
    state_ptr,
    dstate_ptr,
    write_ptr,
    du_ptr,
    dk_ptr,
    dv_ptr,
    dbeta_ptr,  # [tiles, T, H] fp32, to be summed over the tiles of keys
    ddecay_ptr,  # [T, H, K] fp32, added to
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
    """As triton_gradients.key_value_gradients, whose sums over value channels serve here too."""
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
    mask = keep[:, None] & in_keys[None, :]
    block = program.to(tl.int64)
    vector = vector_ptr + block * (ROWS * C) + row
    state_ptr += block * (K * V)
    dstate_ptr += block * (K * V)
    do_ptr += start * stride_ot + head * stride_oh
    v_ptr += start * stride_vt + head * stride_vh
    at_value = (start * H + head) * V
    at_key = (start * H + head) * K
    total_ptr += at_key
    beta = tl.load(vector + BETA * C)
    k_length = tl.load(vector + K_LENGTH * C)
    k = tile_of(
        k_ptr + start * stride_kt + (head // GROUP) * stride_kh, row, stride_kt, channel, keep, in_keys, K % TK == 0
    )
    total = tile_of(total_ptr, row, H * K, channel, keep, in_keys, K % TK == 0)

    # da: of the erase read.
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
    da = -da * tl.exp2(total)
    dsystem = (dsystem * -k_length[None, :]).to(dtype)
    half = C // 2
    while half > 0:
        decay = pivot_factor(total_ptr, total, row, length, H * K, channel, in_keys, half)
        chosen = tl.where(pairs(row, half), dsystem, 0.0)
        da += decay * tl.dot(chosen, (k * decay).to(dtype), input_precision=DOT)
        half = half // 2
    if HAS_BETA:
        part = (tile * tokens.to(tl.int64) + start) * H + head
        erased = tl.sum(k * da, 1) * k_length
        tl.store(dbeta_ptr + part + row * H, tl.where(tile == 0, v_du, 0.0) + erased, mask=keep)
    da = da * beta[:, None]

    # dk: of the write.
    dscores_t = tl.zeros([C, C], tl.float32)
    dsystem_t = tl.zeros([C, C], tl.float32)
    dk = tl.zeros([C, TK], tl.float32)
    overlap = tl.zeros([TK], tl.float32)  # <S, dS'> by key
    for offset in range(0, V, BV):
        column = offset + tl.arange(0, BV)
        inside = column < V
        write = tile_of(write_ptr + at_value, row, H * V, column, keep, inside, V % BV == 0)
        do = tile_of(do_ptr, row, stride_ot, column, keep, inside, V % BV == 0)
        du = tile_of(du_ptr + at_value, row, H * V, column, keep, inside, V % BV == 0)
        dstate = state_tile(dstate_ptr, channel, V, column, in_keys, inside, K % TK == 0 and V % BV == 0)
        state = state_tile(state_ptr, channel, V, column, in_keys, inside, K % TK == 0 and V % BV == 0)
        overlap += tl.sum(state.to(tl.float32) * dstate.to(tl.float32), 1)
        dscores_t = tl.dot(write, tl.trans(do), dscores_t, input_precision=DOT)
        dsystem_t = tl.dot(write, tl.trans(du), dsystem_t, input_precision=DOT)
        dk = tl.dot(write, tl.trans(dstate), dk, input_precision=DOT)
    whole = tl.load(total_ptr + (length - 1) * H * K + channel, mask=in_keys, other=0.0)
    dk = dk * tl.exp2(tl.minimum(whole[None, :] - total, 0.0))
    dwhole = overlap * tl.exp2(whole) + tl.sum(k * dk * k_length[:, None], 0)
    q = tile_of(
        q_ptr + start * stride_qt + (head // GROUP) * stride_qh, row, stride_qt, channel, keep, in_keys, K % TK == 0
    )
    q_length = tl.load(vector + Q_LENGTH * C)  # scale included
    dscores_t = dscores_t * q_length[None, :]
    diagonal = tl.sum(tl.where(row[:, None] == row[None, :], dscores_t, 0.0), 1)
    dk += q * diagonal[:, None]
    dscores_t = dscores_t.to(dtype)
    dsystem_t = (dsystem_t * (-beta * k_length)[None, :]).to(dtype)
    half = C // 2
    while half > 0:
        decay = pivot_factor(total_ptr, total, row, length, H * K, channel, in_keys, half)
        chosen = pairs_transposed(row, half)
        change = tl.dot(tl.where(chosen, dscores_t, 0.0), (q * decay).to(dtype), input_precision=DOT)
        change = tl.dot(tl.where(chosen, dsystem_t, 0.0), (k * decay).to(dtype), change, input_precision=DOT)
        dk += decay * change
        half = half // 2
    dtotal = k * (da - dk) * k_length[:, None]
    ddecay = (tl.sum(dtotal, 0) + dwhole)[None, :] - tl.cumsum(dtotal, 0) + dtotal  # suffix sums
    at = ddecay_ptr + at_key + row[:, None] * (H * K) + channel[None, :]
    tl.store(at, tl.load(at, mask=mask, other=0.0) + ddecay, mask=mask)
    along = 2.0 * w_du - v_du * beta
    store_rows(dk_ptr + at_key, dk + da, along, k, k_length, row, H * K, channel, mask, NORMALIZE)
