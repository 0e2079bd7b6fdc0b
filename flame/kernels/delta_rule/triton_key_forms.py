"""Chunks whose decay is per key channel: rows times their decay, and the scores and systems between them.

The score of rows i > j, sum_c x_ic y_jc exp(G_i - G_j)_c, has no factors that are safe for all decays. Where no half of a
chunk decays by more than 2^-96, as in nearly all chunks of a trained model, exp(G - p) and exp(p - G) are in range with
one pivot p a channel, and `form_keys` reads keys and decays once for all it makes. Other chunks are halved again and again
by `form_keys_by_halves`: at width h, a row in the right half of its block of 2 h rows carries exp(G - p), one in the left
half exp(p - G), with p the total at the left half's end. Both exponents are <= 0, and one product a width serves all
blocks. Each kind of chunk has its own launch, which leaves the other's alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flame.kernels.delta_rule.triton_prepare import (
    A_LENGTH,
    BETA,
    BLOCK,
    K_LENGTH,
    LOG2E,
    Q_LENGTH,
    ROWS,
    square_sum,
    tile_of,
)


@triton.jit
def form_keys(
    q_ptr,
    k_ptr,
    a_ptr,
    beta_ptr,  # [T, H]
    decay_ptr,  # [T, H, K] natural log
    chunk_ptr,
    total_ptr,  # [T, H, K] fp32, log2 decay since the chunk's start
    factor_ptr,  # [chunks, H, K] fp32, decay over the chunk
    moderate_ptr,  # [chunks, H] int32, 1 where no half of the chunk decays by more than 2^-STEEPEST
    seen_ptr,  # [T, H, K] Q e^G, at unit length times scale
    read_ptr,  # [T, H, K] A e^R, at unit length
    written_ptr,  # [T, H, K] K e^(Gc - G), at unit length
    vector_ptr,
    system_ptr,  # [chunks, H, C, C] fp32, written at and left of the blocks of BLOCK rows on the diagonal
    score_ptr,  # [chunks, H, C, C]
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
    SLICE: tl.constexpr,  # channels of a key at a time
    C: tl.constexpr,
    HAS_BETA: tl.constexpr,
    ERASE: tl.constexpr,
    EXCLUSIVE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    NORM_EPS: tl.constexpr,
    STEEPEST: tl.constexpr,
    SCORES: tl.constexpr,  # form scores, system and vectors too; of chunks that are not moderate they are worthless
    DOT: tl.constexpr,
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
    q_length = tl.full([C], 1.0, tl.float32)
    k_length = tl.full([C], 1.0, tl.float32)
    a_length = tl.full([C], 1.0, tl.float32)
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
        q_length = tl.rsqrt(q_square + NORM_EPS)
        k_length = tl.rsqrt(k_square + NORM_EPS)
        a_length = tl.rsqrt(a_square + NORM_EPS)
    q_length = q_length * scale
    if not ERASE:
        a_length = k_length
    scores = tl.zeros([C, C], tl.float32)
    system = tl.zeros([C, C], tl.float32)
    steepest = 0.0
    for offset in range(0, K, SLICE):
        channel = offset + tl.arange(0, SLICE)
        in_keys = channel < K
        cell = row[:, None] * (H * K) + channel[None, :]
        mask = keep[:, None] & in_keys[None, :]
        log = tile_of(decay_ptr + at_key, row, H * K, channel, keep, in_keys, K % SLICE == 0).to(tl.float32) * LOG2E
        total = tl.cumsum(log, 0)
        whole = tl.sum(log, 0)
        # Rows beyond the end do not decay, so that this is the total at pivot_row of a shorter chunk too.
        pivot = tl.sum(tl.where((row < C // 2)[:, None], log, 0.0), 0)
        steepest = tl.minimum(steepest, tl.min(tl.minimum(pivot, whole - pivot), 0))
        tl.store(total_ptr + at_key + cell, total, mask=mask)
        tl.store(factor_ptr + program.to(tl.int64) * K + channel, tl.exp2(whole), mask=in_keys)
        opened = tl.exp2(total)
        q = tile_of(q_ptr, row, stride_qt, channel, keep, in_keys, K % SLICE == 0)
        k = tile_of(k_ptr, row, stride_kt, channel, keep, in_keys, K % SLICE == 0)
        tl.store(seen_ptr + at_key + cell, (q * (opened * q_length[:, None])).to(dtype), mask=mask)
        closing = tl.exp2(tl.minimum(whole[None, :] - total, 0.0))
        tl.store(written_ptr + at_key + cell, (k * (closing * k_length[:, None])).to(dtype), mask=mask)
        before = total
        if EXCLUSIVE:
            before = tl.minimum(total - log, 0.0)
            opened = tl.exp2(before)
        a = k
        if ERASE:
            a = tile_of(a_ptr, row, stride_at, channel, keep, in_keys, K % SLICE == 0)
        tl.store(read_ptr + at_key + cell, (a * (opened * a_length[:, None])).to(dtype), mask=mask)
        if SCORES:
            left = tl.trans((k * tl.exp2(pivot[None, :] - total)).to(dtype))
            right = (q * tl.exp2(total - pivot[None, :])).to(dtype)
            scores = tl.dot(right, left, scores, input_precision=DOT)
            right = (a * tl.exp2(before - pivot[None, :])).to(dtype)
            system = tl.dot(right, left, system, input_precision=DOT)
    tl.store(moderate_ptr + program, (steepest > -STEEPEST).to(tl.int32))
    if SCORES:
        vector = vector_ptr + program.to(tl.int64) * (ROWS * C) + row
        beta = tl.full([C], 1.0, tl.float32)
        if HAS_BETA:
            beta = tl.load(beta_ptr + (start + row) * H + head, mask=keep, other=0.0).to(tl.float32)
        tl.store(vector + BETA * C, beta)
        tl.store(vector + Q_LENGTH * C, q_length)
        tl.store(vector + K_LENGTH * C, k_length)
        if ERASE:
            tl.store(vector + A_LENGTH * C, a_length)
        square = program.to(tl.int64) * (C * C) + row[:, None] * C + row[None, :]
        scores = scores * (q_length[:, None] * k_length[None, :])
        scores = tl.where(row[:, None] >= row[None, :], scores, 0.0)
        tl.store(score_ptr + square, scores.to(score_ptr.dtype.element_ty))
        system = system * ((a_length * beta)[:, None] * k_length[None, :])
        system = tl.where(row[:, None] > row[None, :], system, 0.0)
        tl.store(system_ptr + square, system, mask=row[:, None] // BLOCK >= row[None, :] // BLOCK)


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
def store_block(ptr, x, i: tl.constexpr, j: tl.constexpr, C: tl.constexpr):
    """Store block (i, j) of a chunk's matrix [C, C], and zeros in its mirror above the diagonal."""
    index = tl.arange(0, BLOCK)
    cell = index[:, None] * C + index[None, :]
    dtype: tl.constexpr = ptr.dtype.element_ty
    tl.store(ptr + (i * C + j) * BLOCK + cell, x.to(dtype))
    if i != j:
        tl.store(ptr + (j * C + i) * BLOCK + cell, tl.zeros([BLOCK, BLOCK], dtype))


@triton.jit
def form_keys_by_halves(
    q_ptr,
    k_ptr,
    a_ptr,
    beta_ptr,  # [T, H]
    total_ptr,
    moderate_ptr,
    chunk_ptr,
    vector_ptr,
    system_ptr,
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
):
    """Scores and systems of chunks that decay by more than one pivot can serve. Blocks off the diagonal have theirs at the
    end of the rows above, those on it are halved."""
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
            m = products[2 * j + 1] * (a_length * beta)[:, None] * lengths[j][None, :]
            store_block(system_ptr + square, m, i, j, C)
