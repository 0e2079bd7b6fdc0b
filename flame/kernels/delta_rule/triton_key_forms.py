"""Decay per key channel: rows of a chunk times their decay with the scores between them, and the inverted systems apart.

One kernel for both, four warps a chunk, reads keys and decays once; one warp a chunk then inverts. Chunks that decay by more
than one pivot can serve are done anew by `prepare_keys` (see `triton_keys`).
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
    invert,
    square_sum,
    store_block,
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
def invert_systems(
    system_ptr,  # [chunks, H, C, C] fp32, strictly lower
    inverse_ptr,  # [chunks, H, C, C]
    C: tl.constexpr,
    MERGE: tl.constexpr,  # precision of fp32 products
):
    """(I + system)^-1 of every chunk."""
    cell = tl.program_id(0).to(tl.int64) * (C * C)
    index = tl.arange(0, BLOCK)
    at = system_ptr + cell + index[:, None] * C + index[None, :]
    system = ()
    for i in tl.static_range(C // BLOCK):
        for j in tl.static_range(i + 1):
            system = system + (tl.load(at + (i * C + j) * BLOCK),)
    inverse = invert(system, MERGE)
    for i in tl.static_range(C // BLOCK):
        for j in tl.static_range(i + 1):
            store_block(inverse_ptr + cell, inverse[i * (i + 1) // 2 + j], i, j, C)
