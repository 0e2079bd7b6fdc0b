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
    BLOCK,
    K_LENGTH,
    LOG2E,
    Q_LENGTH,
    ROWS,
    invert,
    square_sum,
    state_tile,
    store_block,
    tile_of,
)


@triton.jit
def gate_rows(
    q_ptr,
    k_ptr,
    decay_ptr,  # [T, H, K] natural log
    chunk_ptr,
    total_ptr,  # [T, H, K] fp32, log2 decay since the chunk's start
    factor_ptr,  # [chunks, H, K] fp32, decay over the chunk
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
    SLICE: tl.constexpr,
    C: tl.constexpr,
    NORMALIZE: tl.constexpr,
    NORM_EPS: tl.constexpr,
):
    program = tl.program_id(0)
    chunk, head = program // H, program % H
    start = tl.load(chunk_ptr + 2 * chunk).to(tl.int64)
    length = tl.load(chunk_ptr + 2 * chunk + 1)
    dtype: tl.constexpr = k_ptr.dtype.element_ty
    row = tl.arange(0, C)
    keep = row < length
    q_ptr += start * stride_qt + (head // GROUP) * stride_qh
    k_ptr += start * stride_kt + (head // GROUP) * stride_kh
    at_key = (start * H + head) * K
    q_factor = tl.full([C], 1.0, tl.float32)
    k_factor = tl.full([C], 1.0, tl.float32)
    if NORMALIZE:
        q_square = tl.zeros([C], tl.float32)
        k_square = tl.zeros([C], tl.float32)
        for offset in range(0, K, SLICE):
            channel = offset + tl.arange(0, SLICE)
            in_keys = channel < K
            q_square += square_sum(tile_of(q_ptr, row, stride_qt, channel, keep, in_keys, K % SLICE == 0))
            k_square += square_sum(tile_of(k_ptr, row, stride_kt, channel, keep, in_keys, K % SLICE == 0))
        q_factor = tl.rsqrt(q_square + NORM_EPS)
        k_factor = tl.rsqrt(k_square + NORM_EPS)
    q_factor = q_factor * scale
    for offset in range(0, K, SLICE):
        channel = offset + tl.arange(0, SLICE)
        in_keys = channel < K
        cell = row[:, None] * (H * K) + channel[None, :]
        mask = keep[:, None] & in_keys[None, :]
        log = tile_of(decay_ptr + at_key, row, H * K, channel, keep, in_keys, K % SLICE == 0).to(tl.float32) * LOG2E
        total = tl.cumsum(log, 0)
        whole = tl.sum(log, 0)
        tl.store(total_ptr + at_key + cell, total, mask=mask)
        tl.store(factor_ptr + program.to(tl.int64) * K + channel, tl.exp2(whole), mask=in_keys)
        opened = tl.exp2(total)
        q = tile_of(q_ptr, row, stride_qt, channel, keep, in_keys, K % SLICE == 0) * q_factor[:, None]
        k = tile_of(k_ptr, row, stride_kt, channel, keep, in_keys, K % SLICE == 0) * k_factor[:, None]
        tl.store(seen_ptr + at_key + cell, (q * opened).to(dtype), mask=mask)
        tl.store(read_ptr + at_key + cell, (k * opened).to(dtype), mask=mask)
        closing = tl.exp2(tl.minimum(whole[None, :] - total, 0.0))
        tl.store(written_ptr + at_key + cell, (k * closing).to(dtype), mask=mask)


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
    chunk_ptr,
    vector_ptr,
    inverse_ptr,
    score_ptr,
    scale,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    K: tl.constexpr,
    SLICE: tl.constexpr,
    C: tl.constexpr,
    HAS_BETA: tl.constexpr,
    NORMALIZE: tl.constexpr,
    NORM_EPS: tl.constexpr,
    DOT: tl.constexpr,
    MERGE: tl.constexpr,
):
    """As triton_prepare.prepare. Blocks off the diagonal have their pivot at the end of the rows above, those on it are
    halved."""
    program = tl.program_id(0)
    chunk, head = program // H, program % H
    start = tl.load(chunk_ptr + 2 * chunk).to(tl.int64)
    length = tl.load(chunk_ptr + 2 * chunk + 1)
    dtype: tl.constexpr = k_ptr.dtype.element_ty
    index = tl.arange(0, BLOCK)
    q_ptr += start * stride_qt + (head // GROUP) * stride_qh
    k_ptr += start * stride_kt + (head // GROUP) * stride_kh
    total_ptr += (start * H + head) * K
    vector_ptr += program.to(tl.int64) * (ROWS * C)
    square = program.to(tl.int64) * (C * C)
    lengths = ()
    system = ()
    for i in tl.static_range(C // BLOCK):
        row = i * BLOCK + index
        keep = row < length
        q_square = tl.zeros([BLOCK], tl.float32)
        k_square = tl.zeros([BLOCK], tl.float32)
        diagonal = tl.zeros([BLOCK], tl.float32)
        products = ()
        for _ in tl.static_range(2 * i + 2):
            products = products + (tl.zeros([BLOCK, BLOCK], tl.float32),)
        for offset in range(0, K, SLICE):
            channel = offset + tl.arange(0, SLICE)
            in_keys = channel < K
            q = tile_of(q_ptr, row, stride_qt, channel, keep, in_keys, K % SLICE == 0).to(tl.float32)
            k = tile_of(k_ptr, row, stride_kt, channel, keep, in_keys, K % SLICE == 0).to(tl.float32)
            total = tile_of(total_ptr, row, H * K, channel, keep, in_keys, K % SLICE == 0)
            q_square += tl.sum(q * q, 1)
            k_square += tl.sum(k * k, 1)
            diagonal += tl.sum(q * k, 1)
            sums = ()
            if i > 0:
                above = i * BLOCK - 1
                pivot = tl.load(
                    total_ptr + above * H * K + channel, mask=in_keys & (length + channel * 0 > above), other=0.0
                )
                decay = tl.exp2(tl.minimum(total - pivot[None, :], 0.0))
                right_q = (q * decay).to(dtype)
                right_k = (k * decay).to(dtype)
            for j in tl.static_range(i):
                column = j * BLOCK + index
                inside = column < length
                left = tile_of(total_ptr, column, H * K, channel, inside, in_keys, K % SLICE == 0)
                left = tl.exp2(tl.minimum(pivot[None, :] - left, 0.0))
                left = left * tile_of(k_ptr, column, stride_kt, channel, inside, in_keys, K % SLICE == 0)
                left = tl.trans(left.to(dtype))
                sums = sums + (
                    tl.dot(right_q, left, products[2 * j], input_precision=DOT),
                    tl.dot(right_k, left, products[2 * j + 1], input_precision=DOT),
                )
            s = products[2 * i]
            m = products[2 * i + 1]
            for level in tl.static_range(4):
                half = BLOCK // 2 >> level
                decay = pivot_factor(total_ptr, total, row, length, H * K, channel, in_keys, half)
                left = (k * decay).to(dtype)
                chosen = pairs(index, half)
                m += tl.where(chosen, tl.dot(left, tl.trans(left), input_precision=DOT), 0.0)
                s += tl.where(chosen, tl.dot((q * decay).to(dtype), tl.trans(left), input_precision=DOT), 0.0)
            products = sums + (s, m)
        q_length = tl.full([BLOCK], 1.0, tl.float32)
        k_length = tl.full([BLOCK], 1.0, tl.float32)
        if NORMALIZE:
            q_length = tl.rsqrt(q_square + NORM_EPS)
            k_length = tl.rsqrt(k_square + NORM_EPS)
        q_length = q_length * scale
        vector = vector_ptr + row
        beta = tl.full([BLOCK], 1.0, tl.float32)
        if HAS_BETA:
            beta = tl.load(beta_ptr + (start + row) * H + head, mask=keep, other=0.0).to(tl.float32)
        tl.store(vector + BETA * C, beta)
        tl.store(vector + Q_LENGTH * C, q_length)
        tl.store(vector + K_LENGTH * C, k_length)
        lengths = lengths + (k_length,)
        for j in tl.static_range(i + 1):
            s = products[2 * j]
            if i == j:
                s += tl.where(index[:, None] == index[None, :], diagonal[:, None], 0.0)
            store_block(score_ptr + square, s * q_length[:, None] * lengths[j][None, :], i, j, C)
            system = system + (products[2 * j + 1] * (k_length * beta)[:, None] * lengths[j][None, :],)
    inverse = invert(system, MERGE)
    for i in tl.static_range(C // BLOCK):
        for j in tl.static_range(i + 1):
            store_block(inverse_ptr + square, inverse[i * (i + 1) // 2 + j], i, j, C)


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
