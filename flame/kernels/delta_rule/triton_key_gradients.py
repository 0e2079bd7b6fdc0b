"""Gradients of a chunk's inputs where the decay is per key channel: dk, then dq, then the erase key's, in one kernel.

As in `triton_gradients`, whose `score_gradients` forms what is C x C. One gradient is made after the other, so that no more
than three tiles of sums are held at once; that of the decay is gathered on the way. Where one pivot serves the chunk, rows
carry their decay since the pivot; other chunks are halved again and again (see `triton_keys`).

The decay's gradient is a suffix sum in which a pair of rows cancels unless the sum's start is between them. It is taken from
the rounded rows that enter the products, of which both rows of a pair see the same.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flame.kernels.delta_rule.triton_gradients import O_DO, OWN, SUMS, V_DU, W_DU, store_rows
from flame.kernels.delta_rule.triton_keys import pairs, pairs_transposed, pivots
from flame.kernels.delta_rule.triton_prepare import (
    A_LENGTH,
    BETA,
    K_LENGTH,
    Q_LENGTH,
    ROWS,
    pivot_row,
    state_tile,
    tile_of,
)


@triton.jit
def times_state(
    x_ptr,  # [C, V] at the chunk's first row
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
    """Rows x times the transpose of a state's rows `channel`, [C, TK] fp32."""
    product = tl.zeros([row.shape[0], channel.shape[0]], tl.float32)
    for offset in range(0, V, BV):
        column = offset + tl.arange(0, BV)
        inside = column < V
        x = tile_of(x_ptr, row, stride, column, keep, inside, V % BV == 0)
        state = state_tile(state_ptr, channel, V, column, in_keys, inside, WHOLE and V % BV == 0)
        product = tl.dot(x, tl.trans(state), product, input_precision=DOT)
    return product


@triton.jit
def key_gradients(
    q_ptr,
    k_ptr,
    a_ptr,
    do_ptr,
    total_ptr,
    moderate_ptr,
    vector_ptr,
    chunk_ptr,
    state_ptr,  # [chunks, H, K, V]
    dstate_ptr,  # [chunks, H, K, V]
    write_ptr,  # [T, H, V]
    du_ptr,  # [T, H, V]
    dscore_ptr,  # [chunks, H, C, C], without decays
    dsystem_ptr,  # [chunks, H, C, C], without decays
    sum_ptr,
    dq_ptr,  # [T, H, K]
    dk_ptr,
    da_ptr,
    dbeta_ptr,  # [tiles, T, H] fp32, to be summed over the tiles of keys
    ddecay_ptr,  # [T, H, K]
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
    HAS_BETA: tl.constexpr,
    ERASE: tl.constexpr,
    EXCLUSIVE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    HALVES: tl.constexpr,  # serve the chunks that are not moderate, by halving; else the others
    DOT: tl.constexpr,
):
    TILES: tl.constexpr = (K + TK - 1) // TK
    WHOLE: tl.constexpr = K % TK == 0
    tile = tl.program_id(0) % TILES
    program = tl.program_id(0) // TILES
    chunk, head = program // H, program % H
    start = tl.load(chunk_ptr + 2 * chunk).to(tl.int64)
    length = tl.load(chunk_ptr + 2 * chunk + 1)
    if length == 0:
        return
    if tl.load(moderate_ptr + program) == HALVES:
        return
    dtype: tl.constexpr = k_ptr.dtype.element_ty
    row = tl.arange(0, C)
    keep = row < length
    channel = tile * TK + tl.arange(0, TK)
    in_keys = channel < K
    mask = keep[:, None] & in_keys[None, :]
    block = program.to(tl.int64)
    vector = vector_ptr + block * (ROWS * C) + row
    sums = sum_ptr + block * (SUMS * C) + row
    state_ptr += block * (K * V)
    dstate_ptr += block * (K * V)
    do_ptr += start * stride_ot + head * stride_oh
    at_value = (start * H + head) * V
    at_key = (start * H + head) * K
    total_ptr += at_key
    q_ptr += start * stride_qt + (head // GROUP) * stride_qh
    k_ptr += start * stride_kt + (head // GROUP) * stride_kh
    if ERASE:
        a_ptr += start * stride_at + (head // GROUP) * stride_ah
    square = block * (C * C)
    pivot_at = total_ptr + pivot_row(length, C) * H * K + channel

    # dk, and what the decay gets from it.
    dk = times_state(write_ptr + at_value, dstate_ptr, row, H * V, keep, channel, in_keys, V, BV, WHOLE, DOT)
    overlap = tl.zeros([TK], tl.float32)  # <S, dS'> by key
    for offset in range(0, V, BV):
        column = offset + tl.arange(0, BV)
        inside = column < V
        state = state_tile(state_ptr, channel, V, column, in_keys, inside, WHOLE and V % BV == 0)
        dstate = state_tile(dstate_ptr, channel, V, column, in_keys, inside, WHOLE and V % BV == 0)
        overlap += tl.sum(state.to(tl.float32) * dstate.to(tl.float32), 1)
    total = tile_of(total_ptr, row, H * K, channel, keep, in_keys, WHOLE)
    read = total
    if EXCLUSIVE:
        read = tile_of(total_ptr - H * K, row, H * K, channel, keep & (row > 0), in_keys, WHOLE)
    whole = tl.load(total_ptr + (length - 1) * H * K + channel, mask=in_keys, other=0.0)
    beta = tl.load(vector + BETA * C)
    k_length = tl.load(vector + K_LENGTH * C)
    a_length = tl.load(vector + A_LENGTH * C) if ERASE else k_length
    q_length = tl.load(vector + Q_LENGTH * C)  # scale included
    own = tl.load(sums + OWN * C)
    k = tile_of(k_ptr, row, stride_kt, channel, keep, in_keys, WHOLE)
    q = tile_of(q_ptr, row, stride_qt, channel, keep, in_keys, WHOLE)
    erase = k
    if ERASE:
        erase = tile_of(a_ptr, row, stride_at, channel, keep, in_keys, WHOLE)
    dk = dk * (tl.exp2(tl.minimum(whole[None, :] - total, 0.0)) * k_length[:, None])
    dtotal = -(k * dk)
    dwhole = overlap * tl.exp2(whole) - tl.sum(dtotal, 0)
    dscores_t = tl.load(dscore_ptr + square + row[:, None] + row[None, :] * C)
    dsystem_t = tl.load(dsystem_ptr + square + row[:, None] + row[None, :] * C)
    if HALVES:
        half = C // 2
        while half > 0:
            pivot = pivots(total_ptr, row, length, H * K, channel, in_keys, half)
            chosen = pairs_transposed(row, half)
            decay = tl.exp2(-tl.abs(total - pivot))
            change = tl.dot(tl.where(chosen, dscores_t, 0.0), (q * decay).to(dtype), input_precision=DOT)
            right = (erase * (tl.exp2(tl.minimum(read - pivot, 0.0)) * beta[:, None])).to(dtype)
            change = tl.dot(tl.where(chosen, dsystem_t, 0.0), right, change, input_precision=DOT)
            dk += decay * change
            dtotal -= (k * decay).to(dtype) * change
            half = half // 2
    else:
        pivot = tl.load(pivot_at, mask=in_keys, other=0.0)
        change = tl.dot(dscores_t, (q * tl.exp2(total - pivot[None, :])).to(dtype), input_precision=DOT)
        right = (erase * (tl.exp2(read - pivot[None, :]) * beta[:, None])).to(dtype)
        change = tl.dot(dsystem_t, right, change, input_precision=DOT)
        decay = tl.exp2(pivot[None, :] - total)
        dk += decay * change
        dtotal -= (k * decay).to(dtype) * change
    dk += own[:, None] * q
    v_du = tl.load(sums + V_DU * C)
    w_du = tl.load(sums + W_DU * C)
    along_a = w_du - v_du * beta
    if ERASE:
        wide = k.to(tl.float32)
        store_rows(dk_ptr + at_key, dk, wide, k_length, w_du, row, H * K, channel, mask, NORMALIZE)

    # dq.
    dq = times_state(do_ptr, state_ptr, row, stride_ot, keep, channel, in_keys, V, BV, WHOLE, DOT)
    total = tile_of(total_ptr, row, H * K, channel, keep, in_keys, WHOLE)
    k = tile_of(k_ptr, row, stride_kt, channel, keep, in_keys, WHOLE)
    q = tile_of(q_ptr, row, stride_qt, channel, keep, in_keys, WHOLE)
    dscores = tl.load(dscore_ptr + square + row[:, None] * C + row[None, :])
    if HALVES:
        dq = dq * (tl.exp2(total) * q_length[:, None])
        dtotal += q * dq
        half = C // 2
        while half > 0:
            pivot = pivots(total_ptr, row, length, H * K, channel, in_keys, half)
            decay = tl.exp2(-tl.abs(total - pivot))
            change = tl.dot(tl.where(pairs(row, half), dscores, 0.0), (k * decay).to(dtype), input_precision=DOT)
            dq += decay * change
            dtotal += (q * decay).to(dtype) * change
            half = half // 2
    else:
        pivot = tl.load(pivot_at, mask=in_keys, other=0.0)
        # What the state gives is decayed from the chunk's start: by e^p more than what the keys give.
        dq = dq * (tl.exp2(pivot)[None, :] * q_length[:, None])
        dq = tl.dot(dscores, (k * tl.exp2(pivot[None, :] - total)).to(dtype), dq, input_precision=DOT)
        decay = tl.exp2(total - pivot[None, :])
        dtotal += (q * decay).to(dtype) * dq
        dq = dq * decay
    q = q.to(tl.float32)
    dq += own[:, None] * k
    o_do = tl.load(sums + O_DO * C)
    store_rows(dq_ptr + at_key, dq, q, q_length / scale, o_do, row, H * K, channel, mask, NORMALIZE)

    # The erase key's, which joins dk where the erase key is the key.
    da = times_state(du_ptr + at_value, state_ptr, row, H * V, keep, channel, in_keys, V, BV, WHOLE, DOT)
    total = tile_of(total_ptr, row, H * K, channel, keep, in_keys, WHOLE)
    read = total
    if EXCLUSIVE:
        read = tile_of(total_ptr - H * K, row, H * K, channel, keep & (row > 0), in_keys, WHOLE)
    k = tile_of(k_ptr, row, stride_kt, channel, keep, in_keys, WHOLE)
    a = k
    if ERASE:
        a = tile_of(a_ptr, row, stride_at, channel, keep, in_keys, WHOLE)
    dsystem = tl.load(dsystem_ptr + square + row[:, None] * C + row[None, :])
    if HALVES:
        da = da * (tl.exp2(read) * -a_length[:, None])
        erased = a * (beta[:, None] * da)
        half = C // 2
        while half > 0:
            pivot = pivots(total_ptr, row, length, H * K, channel, in_keys, half)
            key = (k * tl.exp2(-tl.abs(total - pivot))).to(dtype)
            change = tl.dot(tl.where(pairs(row, half), dsystem, 0.0), key, input_precision=DOT)
            decay = tl.exp2(tl.minimum(read - pivot, 0.0))
            da += decay * change
            erased += (a * (decay * beta[:, None])).to(dtype) * change
            half = half // 2
    else:
        pivot = tl.load(pivot_at, mask=in_keys, other=0.0)
        da = da * (tl.exp2(pivot)[None, :] * -a_length[:, None])
        da = tl.dot(dsystem, (k * tl.exp2(pivot[None, :] - total)).to(dtype), da, input_precision=DOT)
        decay = tl.exp2(read - pivot[None, :])
        erased = (a * (decay * beta[:, None])).to(dtype) * da
        da = da * decay
    a = a.to(tl.float32)
    if HAS_BETA:
        part = (tile * tokens.to(tl.int64) + start) * H + head + row * H
        tl.store(dbeta_ptr + part, tl.where(tile == 0, v_du, 0.0) + tl.sum(a * da, 1), mask=keep)
    da = da * beta[:, None]
    dtotal += erased
    ddecay = (tl.sum(dtotal, 0) + dwhole)[None, :] - tl.cumsum(dtotal, 0) + dtotal  # suffix sums
    if EXCLUSIVE:
        ddecay -= erased  # the erase read does not see its own row's decay
    at = row[:, None] * (H * K) + channel[None, :]
    tl.store(ddecay_ptr + at_key + at, ddecay.to(ddecay_ptr.dtype.element_ty), mask=mask)
    if ERASE:
        store_rows(da_ptr + at_key, da, a, a_length, along_a, row, H * K, channel, mask, NORMALIZE)
    else:
        store_rows(dk_ptr + at_key, dk + da, a, k_length, w_du + along_a, row, H * K, channel, mask, NORMALIZE)
