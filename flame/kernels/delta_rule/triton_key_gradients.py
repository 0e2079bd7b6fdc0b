"""Gradients of the rows of chunks whose decay is per key channel; of pivots and halves see `triton_key_forms`."""

from __future__ import annotations

import triton
import triton.language as tl

from flame.kernels.delta_rule.triton_gradients import O_DO, OWN, SUMS, V_DU, W_DU, store_rows
from flame.kernels.delta_rule.triton_key_forms import pairs, pairs_transposed, pivots
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
def key_decay_row_gradients(
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
    dscore_ptr,
    dsystem_ptr,
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
    """As triton_gradients.row_gradients; dscores and dsystem come without their decays."""
    TILES: tl.constexpr = (K + TK - 1) // TK
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
    block = program.to(tl.int64)
    vector = vector_ptr + block * (ROWS * C) + row
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
    sums = sum_ptr + block * (SUMS * C) + row
    if not HALVES:  # all but the tiles of values is asked for before the first product
        beta = tl.load(vector + BETA * C)
        q_length = tl.load(vector + Q_LENGTH * C)  # scale included
        k_length = tl.load(vector + K_LENGTH * C)
        a_length = tl.load(vector + A_LENGTH * C) if ERASE else k_length
        own = tl.load(sums + OWN * C)
        o_do = tl.load(sums + O_DO * C)
        v_du = tl.load(sums + V_DU * C)
        w_du = tl.load(sums + W_DU * C)
        pivot = tl.load(pivot_at, mask=in_keys, other=0.0)
        whole = tl.load(total_ptr + (length - 1) * H * K + channel, mask=in_keys, other=0.0)
        dscores = tl.load(dscore_ptr + square + row[:, None] * C + row[None, :])
        dsystem = tl.load(dsystem_ptr + square + row[:, None] * C + row[None, :])
        total = tile_of(total_ptr, row, H * K, channel, keep, in_keys, K % TK == 0)
        k = tile_of(k_ptr, row, stride_kt, channel, keep, in_keys, K % TK == 0)
        q = tile_of(q_ptr, row, stride_qt, channel, keep, in_keys, K % TK == 0)
    # The decay's own gradient would need all of dq, da and dk at once; it is gathered as each of them is done.
    dq = tl.zeros([C, TK], tl.float32)
    da = tl.zeros([C, TK], tl.float32)
    dk = tl.zeros([C, TK], tl.float32)
    overlap = tl.zeros([TK], tl.float32)  # <S, dS'> by key
    for offset in range(0, V, BV):
        column = offset + tl.arange(0, BV)
        inside = column < V
        do = tile_of(do_ptr, row, stride_ot, column, keep, inside, V % BV == 0)
        du = tile_of(du_ptr + at_value, row, H * V, column, keep, inside, V % BV == 0)
        state = state_tile(state_ptr, channel, V, column, in_keys, inside, K % TK == 0 and V % BV == 0)
        dstate = state_tile(dstate_ptr, channel, V, column, in_keys, inside, K % TK == 0 and V % BV == 0)
        dq = tl.dot(do, tl.trans(state), dq, input_precision=DOT)
        da = tl.dot(du, tl.trans(state), da, input_precision=DOT)
        if not HALVES:
            write = tile_of(write_ptr + at_value, row, H * V, column, keep, inside, V % BV == 0)
            dk = tl.dot(write, tl.trans(dstate), dk, input_precision=DOT)
        overlap += tl.sum(state.to(tl.float32) * dstate.to(tl.float32), 1)
    if HALVES:
        beta = tl.load(vector + BETA * C)
        k_length = tl.load(vector + K_LENGTH * C)
        a_length = tl.load(vector + A_LENGTH * C) if ERASE else k_length
        own = tl.load(sums + OWN * C)
    mask = keep[:, None] & in_keys[None, :]

    # dq and da.
    if HALVES:
        total = tile_of(total_ptr, row, H * K, channel, keep, in_keys, K % TK == 0)
    read = total
    if EXCLUSIVE:
        read = tile_of(total_ptr - H * K, row, H * K, channel, keep & (row > 0), in_keys, K % TK == 0)
    if HALVES:
        k = tile_of(k_ptr, row, stride_kt, channel, keep, in_keys, K % TK == 0)
        q_length = tl.load(vector + Q_LENGTH * C)  # scale included
        dscores = tl.load(dscore_ptr + square + row[:, None] * C + row[None, :])
        dsystem = tl.load(dsystem_ptr + square + row[:, None] * C + row[None, :])
        dq = dq * (tl.exp2(total) * q_length[:, None])
        da = da * (tl.exp2(read) * -a_length[:, None])
        half = C // 2
        while half > 0:
            pivot = pivots(total_ptr, row, length, H * K, channel, in_keys, half)
            chosen = pairs(row, half)
            decay = tl.exp2(-tl.abs(total - pivot))
            key = (k * decay).to(dtype)
            dq += decay * tl.dot(tl.where(chosen, dscores, 0.0), key, input_precision=DOT)
            change = tl.dot(tl.where(chosen, dsystem, 0.0), key, input_precision=DOT)
            da += tl.exp2(tl.minimum(read - pivot, 0.0)) * change
            half = half // 2
    else:
        key = (k * tl.exp2(pivot[None, :] - total)).to(dtype)
        opened = tl.exp2(pivot)[None, :]
        # What the state gives is decayed from the chunk's start: by e^p more than what the keys give.
        dq = tl.dot(dscores, key, dq * (opened * q_length[:, None]), input_precision=DOT)
        da = tl.dot(dsystem, key, da * (opened * -a_length[:, None]), input_precision=DOT)
        dq = dq * tl.exp2(total - pivot[None, :])
        da = da * tl.exp2(read - pivot[None, :])
    if HALVES:
        q = tile_of(q_ptr, row, stride_qt, channel, keep, in_keys, K % TK == 0)
        o_do = tl.load(sums + O_DO * C)
    wide_q = q.to(tl.float32)
    dtotal = wide_q * dq
    dq += own[:, None] * k
    at = row[:, None] * (H * K) + channel[None, :]
    store_rows(dq_ptr + at_key, dq, wide_q, q_length / scale, o_do, row, H * K, channel, mask, NORMALIZE)
    a = k
    if ERASE:
        a = tile_of(a_ptr, row, stride_at, channel, keep, in_keys, K % TK == 0)
    erased = a * da
    if HALVES:
        v_du = tl.load(sums + V_DU * C)
    if HAS_BETA:
        part = (tile * tokens.to(tl.int64) + start) * H + head + row * H
        tl.store(dbeta_ptr + part, tl.where(tile == 0, v_du, 0.0) + tl.sum(erased, 1), mask=keep)
    da = da * beta[:, None]
    erased = erased * beta[:, None]
    dtotal += erased
    if HALVES:
        w_du = tl.load(sums + W_DU * C)
    along = w_du
    if EXCLUSIVE:
        # The erase read does not see its own row's decay.
        ddecay = tl.sum(dtotal, 0)[None, :] - tl.cumsum(dtotal, 0) + dtotal - erased
        tl.store(ddecay_ptr + at_key + at, ddecay.to(ddecay_ptr.dtype.element_ty), mask=mask)
        dtotal = tl.zeros([C, TK], tl.float32)
    if ERASE:
        along_a = w_du - v_du * beta
        store_rows(da_ptr + at_key, da, a, a_length, along_a, row, H * K, channel, mask, NORMALIZE)
        da = tl.zeros([C, TK], tl.float32)
    else:
        along = 2.0 * w_du - v_du * beta

    # dk, which `da` joins where the erase key is the key.
    if HALVES:
        for offset in range(0, V, BV):
            column = offset + tl.arange(0, BV)
            inside = column < V
            write = tile_of(write_ptr + at_value, row, H * V, column, keep, inside, V % BV == 0)
            dstate = state_tile(dstate_ptr, channel, V, column, in_keys, inside, K % TK == 0 and V % BV == 0)
            dk = tl.dot(write, tl.trans(dstate), dk, input_precision=DOT)
    if HALVES:
        total = tile_of(total_ptr, row, H * K, channel, keep, in_keys, K % TK == 0)
        whole = tl.load(total_ptr + (length - 1) * H * K + channel, mask=in_keys, other=0.0)
    dk = dk * (tl.exp2(tl.minimum(whole[None, :] - total, 0.0)) * k_length[:, None])
    if HALVES:
        k = tile_of(k_ptr, row, stride_kt, channel, keep, in_keys, K % TK == 0)
        q = tile_of(q_ptr, row, stride_qt, channel, keep, in_keys, K % TK == 0)
    wide_k = k.to(tl.float32)
    dwhole = overlap * tl.exp2(whole) + tl.sum(wide_k * dk, 0)
    read = total
    if EXCLUSIVE:
        read = tile_of(total_ptr - H * K, row, H * K, channel, keep & (row > 0), in_keys, K % TK == 0)
    erase = wide_k
    if ERASE:
        erase = tile_of(a_ptr, row, stride_at, channel, keep, in_keys, K % TK == 0).to(tl.float32)
    if HALVES:
        dscores_t = tl.load(dscore_ptr + square + row[:, None] + row[None, :] * C)
        dsystem_t = tl.load(dsystem_ptr + square + row[:, None] + row[None, :] * C)
        dsystem_t = (dsystem_t * beta[None, :]).to(dtype)
        half = C // 2
        while half > 0:
            pivot = pivots(total_ptr, row, length, H * K, channel, in_keys, half)
            chosen = pairs_transposed(row, half)
            decay = tl.exp2(-tl.abs(total - pivot))
            change = tl.dot(tl.where(chosen, dscores_t, 0.0), (q * decay).to(dtype), input_precision=DOT)
            right = (erase * tl.exp2(tl.minimum(read - pivot, 0.0))).to(dtype)
            change = tl.dot(tl.where(chosen, dsystem_t, 0.0), right, change, input_precision=DOT)
            dk += decay * change
            half = half // 2
    else:
        # Transposed as they were loaded: a product's own result must not be.
        seen = (q * tl.exp2(total - pivot[None, :])).to(dtype)
        right = erase * tl.exp2(read - pivot[None, :])
        change = tl.dot(tl.trans(dscores), seen, input_precision=DOT)
        change = tl.dot(tl.trans(dsystem), (right * beta[:, None]).to(dtype), change, input_precision=DOT)
        dk += tl.exp2(pivot[None, :] - total) * change
    dtotal -= wide_k * dk
    ddecay = (tl.sum(dtotal, 0) + dwhole)[None, :] - tl.cumsum(dtotal, 0) + dtotal  # suffix sums
    if EXCLUSIVE:
        tl.debug_barrier()  # other threads may have stored what this one loads
        ddecay += tl.load(ddecay_ptr + at_key + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(ddecay_ptr + at_key + at, ddecay.to(ddecay_ptr.dtype.element_ty), mask=mask)
    dk += own[:, None] * q + da
    store_rows(dk_ptr + at_key, dk, wide_k, k_length, along, row, H * K, channel, mask, NORMALIZE)
