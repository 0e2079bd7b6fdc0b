"""Chunks whose decay is per key channel: decays gathered over the chunk, rows times their decay, scores, gradients.

The score of rows i > j, sum_c x_ic y_jc exp(G_i - G_j)_c, has no factors that are safe for all decays. Where no half of a
chunk decays by more than 2^-96, as in nearly all chunks of a trained model, exp(G - p) and exp(p - G) are in range with
one pivot p a channel. Other chunks are halved again and again: at width h, a row in the right half of its block of 2 h rows
carries exp(G - p), one in the left half exp(p - G), with p the total at the left half's end. Both exponents are <= 0, and
one product a width serves all blocks. Each kind of chunk has its own launch, which leaves the other's alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flame.kernels.delta_rule.triton_gradients import O_DO, OWN, SUMS, V_DU, W_DU, store_rows
from flame.kernels.delta_rule.triton_prepare import (
    A_LENGTH,
    BETA,
    BLOCK,
    K_LENGTH,
    LOG2E,
    Q_LENGTH,
    ROWS,
    invert,
    pivot_row,
    square_sum,
    state_tile,
    store_block,
    tile_of,
)


@triton.jit
def gate_rows(
    q_ptr,
    k_ptr,
    a_ptr,
    decay_ptr,  # [T, H, K] natural log
    chunk_ptr,
    total_ptr,  # [T, H, K] fp32, log2 decay since the chunk's start
    factor_ptr,  # [chunks, H, K] fp32, decay over the chunk
    moderate_ptr,  # [chunks, H] int32, 1 where no half of the chunk decays by more than 2^-STEEPEST
    seen_ptr,  # [T, H, K] Q e^G, at unit length times scale
    read_ptr,  # [T, H, K] A e^R, at unit length
    written_ptr,  # [T, H, K] K e^(Gc - G), at unit length
    scale,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_at,
    stride_ah,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    K: tl.constexpr,
    SLICE: tl.constexpr,
    C: tl.constexpr,
    ERASE: tl.constexpr,
    EXCLUSIVE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    NORM_EPS: tl.constexpr,
    STEEPEST: tl.constexpr,
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
    if ERASE:
        a_ptr += start * stride_at + (head // GROUP) * stride_ah
    q_factor = tl.full([C], 1.0, tl.float32)
    k_factor = tl.full([C], 1.0, tl.float32)
    a_factor = tl.full([C], 1.0, tl.float32)
    if NORMALIZE:
        q_square = tl.zeros([C], tl.float32)
        k_square = tl.zeros([C], tl.float32)
        a_square = tl.zeros([C], tl.float32)
        for offset in range(0, K, SLICE):
            channel = offset + tl.arange(0, SLICE)
            in_keys = channel < K
            q_square += square_sum(tile_of(q_ptr, row, stride_qt, channel, keep, in_keys, K % SLICE == 0))
            k_square += square_sum(tile_of(k_ptr, row, stride_kt, channel, keep, in_keys, K % SLICE == 0))
            if ERASE:
                a_square += square_sum(tile_of(a_ptr, row, stride_at, channel, keep, in_keys, K % SLICE == 0))
        q_factor = tl.rsqrt(q_square + NORM_EPS)
        k_factor = tl.rsqrt(k_square + NORM_EPS)
        a_factor = tl.rsqrt(a_square + NORM_EPS)
    q_factor = q_factor * scale
    steepest = 0.0
    for offset in range(0, K, SLICE):
        channel = offset + tl.arange(0, SLICE)
        in_keys = channel < K
        cell = row[:, None] * (H * K) + channel[None, :]
        mask = keep[:, None] & in_keys[None, :]
        log = tile_of(decay_ptr + at_key, row, H * K, channel, keep, in_keys, K % SLICE == 0).to(tl.float32) * LOG2E
        total = tl.cumsum(log, 0)
        whole = tl.sum(log, 0)
        pivot = tl.sum(tl.where((row == C // 2 - 1)[:, None], total, 0.0), 0)
        steepest = tl.minimum(steepest, tl.min(tl.minimum(pivot, whole - pivot), 0))
        tl.store(total_ptr + at_key + cell, total, mask=mask)
        tl.store(factor_ptr + program.to(tl.int64) * K + channel, tl.exp2(whole), mask=in_keys)
        opened = tl.exp2(total)
        q = tile_of(q_ptr, row, stride_qt, channel, keep, in_keys, K % SLICE == 0) * q_factor[:, None]
        k = tile_of(k_ptr, row, stride_kt, channel, keep, in_keys, K % SLICE == 0) * k_factor[:, None]
        tl.store(seen_ptr + at_key + cell, (q * opened).to(dtype), mask=mask)
        closing = tl.exp2(tl.minimum(whole[None, :] - total, 0.0))
        tl.store(written_ptr + at_key + cell, (k * closing).to(dtype), mask=mask)
        if EXCLUSIVE:
            opened = tl.exp2(tl.minimum(total - log, 0.0))
        a = k
        if ERASE:
            a = tile_of(a_ptr, row, stride_at, channel, keep, in_keys, K % SLICE == 0) * a_factor[:, None]
        tl.store(read_ptr + at_key + cell, (a * opened).to(dtype), mask=mask)
    tl.store(moderate_ptr + program, (steepest > -STEEPEST).to(tl.int32))


@triton.jit
def pivots(total_ptr, row, length, stride, channel, in_keys, half):
    """For every row, the total at the end of the left half of its block of 2 `half` rows; total_ptr at the chunk's start."""
    at = row // (2 * half) * (2 * half) + half - 1
    return tile_of(total_ptr, at, stride, channel, at < length, in_keys)


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
    a_ptr,
    beta_ptr,  # [T, H]
    total_ptr,
    moderate_ptr,
    chunk_ptr,
    vector_ptr,
    inverse_ptr,
    score_ptr,
    scale,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_at,
    stride_ah,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    K: tl.constexpr,
    SLICE: tl.constexpr,
    C: tl.constexpr,
    HAS_BETA: tl.constexpr,
    ERASE: tl.constexpr,
    EXCLUSIVE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    NORM_EPS: tl.constexpr,
    DOT: tl.constexpr,
    MERGE: tl.constexpr,
):
    """As triton_prepare.prepare, for chunks that decay by more than one pivot can serve. Blocks off the diagonal have
    theirs at the end of the rows above, those on it are halved."""
    program = tl.program_id(0)
    if tl.load(moderate_ptr + program) == 1:
        return
    chunk, head = program // H, program % H
    start = tl.load(chunk_ptr + 2 * chunk).to(tl.int64)
    length = tl.load(chunk_ptr + 2 * chunk + 1)
    dtype: tl.constexpr = k_ptr.dtype.element_ty
    index = tl.arange(0, BLOCK)
    q_ptr += start * stride_qt + (head // GROUP) * stride_qh
    k_ptr += start * stride_kt + (head // GROUP) * stride_kh
    if ERASE:
        a_ptr += start * stride_at + (head // GROUP) * stride_ah
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
        a_square = tl.zeros([BLOCK], tl.float32)
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
            a = k
            if ERASE:
                a = tile_of(a_ptr, row, stride_at, channel, keep, in_keys, K % SLICE == 0).to(tl.float32)
            read = total
            if EXCLUSIVE:
                read = tile_of(total_ptr - H * K, row, H * K, channel, keep & (row > 0), in_keys, K % SLICE == 0)
            a_square += tl.sum(a * a, 1)
            q_square += tl.sum(q * q, 1)
            k_square += tl.sum(k * k, 1)
            diagonal += tl.sum(q * k, 1)
            sums = ()
            if i > 0:
                above = i * BLOCK - 1
                pivot = tl.load(
                    total_ptr + above * H * K + channel, mask=in_keys & (length + channel * 0 > above), other=0.0
                )
                right_q = (q * tl.exp2(tl.minimum(total - pivot[None, :], 0.0))).to(dtype)
                right_a = (a * tl.exp2(tl.minimum(read - pivot[None, :], 0.0))).to(dtype)
            for j in tl.static_range(i):
                column = j * BLOCK + index
                inside = column < length
                left = tile_of(total_ptr, column, H * K, channel, inside, in_keys, K % SLICE == 0)
                left = tl.exp2(tl.minimum(pivot[None, :] - left, 0.0))
                left = left * tile_of(k_ptr, column, stride_kt, channel, inside, in_keys, K % SLICE == 0)
                left = tl.trans(left.to(dtype))
                sums = sums + (
                    tl.dot(right_q, left, products[2 * j], input_precision=DOT),
                    tl.dot(right_a, left, products[2 * j + 1], input_precision=DOT),
                )
            s = products[2 * i]
            m = products[2 * i + 1]
            for level in tl.static_range(4):
                half = BLOCK // 2 >> level
                shared = pivots(total_ptr, row, length, H * K, channel, in_keys, half)
                decay = tl.exp2(-tl.abs(total - shared))
                left = tl.trans((k * decay).to(dtype))
                chosen = pairs(index, half)
                right_a = (a * tl.exp2(tl.minimum(read - shared, 0.0))).to(dtype)
                m += tl.where(chosen, tl.dot(right_a, left, input_precision=DOT), 0.0)
                s += tl.where(chosen, tl.dot((q * decay).to(dtype), left, input_precision=DOT), 0.0)
            products = sums + (s, m)
        q_length = tl.full([BLOCK], 1.0, tl.float32)
        k_length = tl.full([BLOCK], 1.0, tl.float32)
        a_length = k_length
        if NORMALIZE:
            q_length = tl.rsqrt(q_square + NORM_EPS)
            k_length = tl.rsqrt(k_square + NORM_EPS)
            a_length = tl.rsqrt(a_square + NORM_EPS)
        q_length = q_length * scale
        vector = vector_ptr + row
        beta = tl.full([BLOCK], 1.0, tl.float32)
        if HAS_BETA:
            beta = tl.load(beta_ptr + (start + row) * H + head, mask=keep, other=0.0).to(tl.float32)
        tl.store(vector + BETA * C, beta)
        tl.store(vector + Q_LENGTH * C, q_length)
        tl.store(vector + K_LENGTH * C, k_length)
        if ERASE:
            tl.store(vector + A_LENGTH * C, a_length)
        lengths = lengths + (k_length,)
        for j in tl.static_range(i + 1):
            s = products[2 * j]
            if i == j:
                s += tl.where(index[:, None] == index[None, :], diagonal[:, None], 0.0)
            store_block(score_ptr + square, s * q_length[:, None] * lengths[j][None, :], i, j, C)
            system = system + (products[2 * j + 1] * (a_length * beta)[:, None] * lengths[j][None, :],)
    inverse = invert(system, MERGE)
    for i in tl.static_range(C // BLOCK):
        for j in tl.static_range(i + 1):
            store_block(inverse_ptr + square, inverse[i * (i + 1) // 2 + j], i, j, C)


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
    # The decay's own gradient would need all of dq, da and dk at once; it is gathered as each of them is done.
    dq = tl.zeros([C, TK], tl.float32)
    da = tl.zeros([C, TK], tl.float32)
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
        overlap += tl.sum(state.to(tl.float32) * dstate.to(tl.float32), 1)
    q_ptr += start * stride_qt + (head // GROUP) * stride_qh
    k_ptr += start * stride_kt + (head // GROUP) * stride_kh
    if ERASE:
        a_ptr += start * stride_at + (head // GROUP) * stride_ah
    square = block * (C * C)
    beta = tl.load(vector + BETA * C)
    k_length = tl.load(vector + K_LENGTH * C)
    a_length = tl.load(vector + A_LENGTH * C) if ERASE else k_length
    pivot_at = total_ptr + pivot_row(length, C) * H * K + channel
    sums = sum_ptr + block * (SUMS * C) + row
    own = tl.load(sums + OWN * C)
    mask = keep[:, None] & in_keys[None, :]

    # dq and da.
    total = tile_of(total_ptr, row, H * K, channel, keep, in_keys, K % TK == 0)
    read = total
    if EXCLUSIVE:
        read = tile_of(total_ptr - H * K, row, H * K, channel, keep & (row > 0), in_keys, K % TK == 0)
    k = tile_of(k_ptr, row, stride_kt, channel, keep, in_keys, K % TK == 0)
    q_length = tl.load(vector + Q_LENGTH * C)  # scale included
    dscores = tl.load(dscore_ptr + square + row[:, None] * C + row[None, :])
    dsystem = tl.load(dsystem_ptr + square + row[:, None] * C + row[None, :])
    if HALVES:
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
        pivot = tl.load(pivot_at, mask=in_keys, other=0.0)
        key = (k * tl.exp2(pivot[None, :] - total)).to(dtype)
        opened = tl.exp2(pivot)[None, :]
        # What the state gives is decayed from the chunk's start: by e^p more than what the keys give.
        dq = tl.dot(dscores, key, dq * (opened * q_length[:, None]), input_precision=DOT)
        da = tl.dot(dsystem, key, da * (opened * -a_length[:, None]), input_precision=DOT)
        dq = dq * tl.exp2(total - pivot[None, :])
        da = da * tl.exp2(read - pivot[None, :])
    q = tile_of(q_ptr, row, stride_qt, channel, keep, in_keys, K % TK == 0).to(tl.float32)
    dtotal = q * dq
    dq += own[:, None] * k
    at = row[:, None] * (H * K) + channel[None, :]
    o_do = tl.load(sums + O_DO * C)
    store_rows(dq_ptr + at_key, dq, q, q_length / scale, o_do, row, H * K, channel, mask, NORMALIZE)
    a = k
    if ERASE:
        a = tile_of(a_ptr, row, stride_at, channel, keep, in_keys, K % TK == 0)
    erased = a * da
    v_du = tl.load(sums + V_DU * C)
    if HAS_BETA:
        part = (tile * tokens.to(tl.int64) + start) * H + head + row * H
        tl.store(dbeta_ptr + part, tl.where(tile == 0, v_du, 0.0) + tl.sum(erased, 1), mask=keep)
    da = da * beta[:, None]
    erased = erased * beta[:, None]
    dtotal += erased
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
    dk = tl.zeros([C, TK], tl.float32)
    for offset in range(0, V, BV):
        column = offset + tl.arange(0, BV)
        inside = column < V
        write = tile_of(write_ptr + at_value, row, H * V, column, keep, inside, V % BV == 0)
        dstate = state_tile(dstate_ptr, channel, V, column, in_keys, inside, K % TK == 0 and V % BV == 0)
        dk = tl.dot(write, tl.trans(dstate), dk, input_precision=DOT)
    total = tile_of(total_ptr, row, H * K, channel, keep, in_keys, K % TK == 0)
    whole = tl.load(total_ptr + (length - 1) * H * K + channel, mask=in_keys, other=0.0)
    dk = dk * (tl.exp2(tl.minimum(whole[None, :] - total, 0.0)) * k_length[:, None])
    k = tile_of(k_ptr, row, stride_kt, channel, keep, in_keys, K % TK == 0).to(tl.float32)
    dwhole = overlap * tl.exp2(whole) + tl.sum(k * dk, 0)
    q = tile_of(q_ptr, row, stride_qt, channel, keep, in_keys, K % TK == 0)
    read = total
    if EXCLUSIVE:
        read = tile_of(total_ptr - H * K, row, H * K, channel, keep & (row > 0), in_keys, K % TK == 0)
    erase = k
    if ERASE:
        erase = tile_of(a_ptr, row, stride_at, channel, keep, in_keys, K % TK == 0).to(tl.float32)
    dscores_t = tl.load(dscore_ptr + square + row[:, None] + row[None, :] * C)
    dsystem_t = tl.load(dsystem_ptr + square + row[:, None] + row[None, :] * C)
    dsystem_t = (dsystem_t * beta[None, :]).to(dtype)
    if HALVES:
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
        pivot = tl.load(pivot_at, mask=in_keys, other=0.0)
        change = tl.dot(dscores_t, (q * tl.exp2(total - pivot[None, :])).to(dtype), input_precision=DOT)
        right = (erase * tl.exp2(read - pivot[None, :])).to(dtype)
        change = tl.dot(dsystem_t, right, change, input_precision=DOT)
        dk += tl.exp2(pivot[None, :] - total) * change
    dtotal -= k * dk
    ddecay = (tl.sum(dtotal, 0) + dwhole)[None, :] - tl.cumsum(dtotal, 0) + dtotal  # suffix sums
    if EXCLUSIVE:
        tl.debug_barrier()  # other threads may have stored what this one loads
        ddecay += tl.load(ddecay_ptr + at_key + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(ddecay_ptr + at_key + at, ddecay.to(ddecay_ptr.dtype.element_ty), mask=mask)
    dk += own[:, None] * q + da
    store_rows(dk_ptr + at_key, dk, k, k_length, along, row, H * K, channel, mask, NORMALIZE)
