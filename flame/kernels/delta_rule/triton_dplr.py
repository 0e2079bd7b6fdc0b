# ruff: noqa: SIM102 (compile-time and run-time conditions nest; they do not join with `and`)
"""Diagonal plus low rank (RWKV-7): rows of a chunk times their decay, the scores between them, and the sweeps.

Per chunk, with G the log decay since its start, E that of the rows before, T = (I - A_ab)^-1 and S the state before:

    X = A_ak V + (a e^E) S,  Z = T X,  O = (q e^G) S + A_qk V + A_qb Z
    S' = e^Gc S + (k e^(Gc - G))^T V + (b e^(Gc - G))^T Z
    dZ = (b e^(Gc - G)) dS' + A_qb^T dO,  dX = T^T dZ,  dS = e^Gc dS' + (q e^G)^T dO + (a e^E)^T dX

So k v^T, which no later row of the chunk reads back through `a` but by A_ak, needs no rows of its own in the system.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flame.kernels.delta_rule.triton_key_forms import pairs, pivots
from flame.kernels.delta_rule.triton_prepare import BLOCK, LOG2E, tile_of
from flame.kernels.delta_rule.triton_sweep import FIRST, LAST, load_rows

# Matrices of `scores` [chunks, H, 3, C, C].
QK = tl.constexpr(0)
QB = tl.constexpr(1)
AK = tl.constexpr(2)
MATRICES = tl.constexpr(3)


@triton.jit
def store_scores(score_ptr, system_ptr, program, qk, qb, ak, ab, scale, C: tl.constexpr):
    """Store the lower triangles of a chunk's scores, and of -A_ab, whose identity is understood."""
    row = tl.arange(0, C)
    cell = row[:, None] * C + row[None, :]
    dtype: tl.constexpr = score_ptr.dtype.element_ty
    low = row[:, None] >= row[None, :]
    strict = row[:, None] > row[None, :]
    at = score_ptr + program.to(tl.int64) * (MATRICES * C * C) + cell
    tl.store(at + QK * C * C, tl.where(low, qk * scale, 0.0).to(dtype))
    tl.store(at + QB * C * C, tl.where(low, qb * scale, 0.0).to(dtype))
    tl.store(at + AK * C * C, tl.where(strict, ak, 0.0).to(dtype))
    at = system_ptr + program.to(tl.int64) * (C * C) + cell
    tl.store(at, tl.where(strict, -ab, 0.0), mask=row[:, None] // BLOCK >= row[None, :] // BLOCK)


@triton.jit
def form_dplr(
    q_ptr,  # [T, H, K]
    k_ptr,
    a_ptr,
    b_ptr,
    decay_ptr,  # [T, H, K] natural log
    chunk_ptr,
    total_ptr,  # [T, H, K] fp32, G in log2; where SCORES, of chunks that are not moderate alone
    factor_ptr,  # [chunks, H, K] fp32, e^Gc
    moderate_ptr,  # [chunks, H] int32, 1 where no half of the chunk decays by more than 2^-STEEPEST
    seen_ptr,  # [T, H, K] q e^G, scale included
    read_ptr,  # [T, H, K] a e^E
    key_ptr,  # [T, H, K] k e^(Gc - G)
    back_ptr,  # [T, H, K] b e^(Gc - G)
    score_ptr,
    system_ptr,  # [chunks, H, C, C] fp32, written at and left of the blocks of BLOCK rows on the diagonal
    scale,
    H: tl.constexpr,
    K: tl.constexpr,
    SLICE: tl.constexpr,  # channels of a key at a time
    C: tl.constexpr,
    STEEPEST: tl.constexpr,
    SCORES: tl.constexpr,  # form the scores too; of chunks that are not moderate they are worthless
    DOT: tl.constexpr,
):
    program = tl.program_id(0)
    chunk, head = program // H, program % H
    start = tl.load(chunk_ptr + 2 * chunk).to(tl.int64)
    length = tl.load(chunk_ptr + 2 * chunk + 1)
    dtype: tl.constexpr = k_ptr.dtype.element_ty
    WHOLE: tl.constexpr = K % SLICE == 0
    row = tl.arange(0, C)
    keep = row < length
    at_key = (start * H + head) * K
    qk = tl.zeros([C, C], tl.float32)
    qb = tl.zeros([C, C], tl.float32)
    ak = tl.zeros([C, C], tl.float32)
    ab = tl.zeros([C, C], tl.float32)
    steepest = 0.0
    for offset in range(0, K, SLICE):
        channel = offset + tl.arange(0, SLICE)
        in_keys = channel < K
        cell = at_key + row[:, None] * (H * K) + channel[None, :]
        mask = keep[:, None] & in_keys[None, :]
        # All rows are asked for before anything is used.
        log = tile_of(decay_ptr + at_key, row, H * K, channel, keep, in_keys, WHOLE).to(tl.float32) * LOG2E
        q = tile_of(q_ptr + at_key, row, H * K, channel, keep, in_keys, WHOLE)
        k = tile_of(k_ptr + at_key, row, H * K, channel, keep, in_keys, WHOLE)
        a = tile_of(a_ptr + at_key, row, H * K, channel, keep, in_keys, WHOLE)
        b = tile_of(b_ptr + at_key, row, H * K, channel, keep, in_keys, WHOLE)
        total = tl.cumsum(log, 0)
        before = tl.minimum(total - log, 0.0)
        whole = tl.sum(log, 0)
        # Rows beyond the end do not decay, so that this is the total at pivot_row of a shorter chunk too.
        pivot = tl.sum(tl.where((row < C // 2)[:, None], log, 0.0), 0)
        steepest = tl.minimum(steepest, tl.min(tl.minimum(pivot, whole - pivot), 0))
        if not SCORES:
            tl.store(total_ptr + cell, total, mask=mask)
        tl.store(factor_ptr + program.to(tl.int64) * K + channel, tl.exp2(whole), mask=in_keys)
        tl.store(seen_ptr + cell, (q * (tl.exp2(total) * scale)).to(dtype), mask=mask)
        tl.store(read_ptr + cell, (a * tl.exp2(before)).to(dtype), mask=mask)
        closing = tl.exp2(tl.minimum(whole[None, :] - total, 0.0))
        tl.store(key_ptr + cell, (k * closing).to(dtype), mask=mask)
        tl.store(back_ptr + cell, (b * closing).to(dtype), mask=mask)
        if SCORES:
            left = tl.exp2(pivot[None, :] - total)
            k = tl.trans((k * left).to(dtype))
            b = tl.trans((b * left).to(dtype))
            q = (q * tl.exp2(total - pivot[None, :])).to(dtype)
            a = (a * tl.exp2(before - pivot[None, :])).to(dtype)
            qk = tl.dot(q, k, qk, input_precision=DOT)
            qb = tl.dot(q, b, qb, input_precision=DOT)
            ak = tl.dot(a, k, ak, input_precision=DOT)
            ab = tl.dot(a, b, ab, input_precision=DOT)
    tl.store(moderate_ptr + program, (steepest > -STEEPEST).to(tl.int32))
    if SCORES:
        store_scores(score_ptr, system_ptr, program, qk, qb, ak, ab, scale, C)
        if steepest <= -STEEPEST:
            for offset in range(0, K, SLICE):
                channel = offset + tl.arange(0, SLICE)
                in_keys = channel < K
                log = tile_of(decay_ptr + at_key, row, H * K, channel, keep, in_keys, WHOLE).to(tl.float32) * LOG2E
                cell = at_key + row[:, None] * (H * K) + channel[None, :]
                tl.store(total_ptr + cell, tl.cumsum(log, 0), mask=keep[:, None] & in_keys[None, :])


@triton.jit
def form_dplr_by_halves(
    q_ptr,
    k_ptr,
    a_ptr,
    b_ptr,
    total_ptr,
    moderate_ptr,
    chunk_ptr,
    score_ptr,
    system_ptr,
    scale,
    H: tl.constexpr,
    K: tl.constexpr,
    SLICE: tl.constexpr,
    C: tl.constexpr,
    DOT: tl.constexpr,
):
    """The scores of chunks that decay by more than one pivot can serve."""
    program = tl.program_id(0)
    if tl.load(moderate_ptr + program) == 1:
        return
    chunk, head = program // H, program % H
    start = tl.load(chunk_ptr + 2 * chunk).to(tl.int64)
    length = tl.load(chunk_ptr + 2 * chunk + 1)
    dtype: tl.constexpr = k_ptr.dtype.element_ty
    WHOLE: tl.constexpr = K % SLICE == 0
    row = tl.arange(0, C)
    keep = row < length
    at_key = (start * H + head) * K
    total_ptr += at_key
    qk = tl.zeros([C, C], tl.float32)
    qb = tl.zeros([C, C], tl.float32)
    ak = tl.zeros([C, C], tl.float32)
    ab = tl.zeros([C, C], tl.float32)
    own = row[:, None] == row[None, :]
    for offset in range(0, K, SLICE):
        channel = offset + tl.arange(0, SLICE)
        in_keys = channel < K
        q = tile_of(q_ptr + at_key, row, H * K, channel, keep, in_keys, WHOLE).to(tl.float32)
        k = tile_of(k_ptr + at_key, row, H * K, channel, keep, in_keys, WHOLE).to(tl.float32)
        a = tile_of(a_ptr + at_key, row, H * K, channel, keep, in_keys, WHOLE).to(tl.float32)
        b = tile_of(b_ptr + at_key, row, H * K, channel, keep, in_keys, WHOLE).to(tl.float32)
        total = tile_of(total_ptr, row, H * K, channel, keep, in_keys, WHOLE)
        before = tile_of(total_ptr - H * K, row, H * K, channel, keep & (row > 0), in_keys, WHOLE)
        qk += tl.where(own, tl.sum(q * k, 1)[:, None], 0.0)
        qb += tl.where(own, tl.sum(q * b, 1)[:, None], 0.0)
        half = C // 2
        while half > 0:
            pivot = pivots(total_ptr, row, length, H * K, channel, in_keys, half)
            chosen = pairs(row, half)
            decay = tl.exp2(-tl.abs(total - pivot))
            key = tl.trans((k * decay).to(dtype))
            back = tl.trans((b * decay).to(dtype))
            query = (q * decay).to(dtype)
            read = (a * tl.exp2(tl.minimum(before - pivot, 0.0))).to(dtype)
            qk += tl.where(chosen, tl.dot(query, key, input_precision=DOT), 0.0)
            qb += tl.where(chosen, tl.dot(query, back, input_precision=DOT), 0.0)
            ak += tl.where(chosen, tl.dot(read, key, input_precision=DOT), 0.0)
            ab += tl.where(chosen, tl.dot(read, back, input_precision=DOT), 0.0)
            half = half // 2
    store_scores(score_ptr, system_ptr, program, qk, qb, ak, ab, scale, C)


@triton.jit
def forward_dplr(
    seen_ptr,
    read_ptr,
    key_ptr,
    back_ptr,
    v_ptr,  # [T, H, V]
    inverse_ptr,
    score_ptr,
    factor_ptr,
    item_ptr,  # [items, 5], see plan.Plan
    initial_ptr,  # [items, H, K, V] fp32
    final_ptr,  # [N, H, K, V] fp32; with MAP [items, H, K, V + K]
    o_ptr,  # [T, H, V]
    state_ptr,  # [chunks, H, K, V] states before the chunks
    write_ptr,  # [T, H, V] Z
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    OUTPUT: tl.constexpr,  # store O
    STATES: tl.constexpr,  # store the states before the chunks, and Z
    MAP: tl.constexpr,  # S' = M S + B over the item: B from zero in the first V columns, then M from I and v = 0
    HAS_INITIAL: tl.constexpr,
    HAS_FINAL: tl.constexpr,
    DOT: tl.constexpr,
):
    tile = tl.program_id(0)
    item, head = tl.program_id(1) // H, tl.program_id(1) % H
    start = tl.load(item_ptr + 5 * item)
    end = tl.load(item_ptr + 5 * item + 1)
    chunk = tl.load(item_ptr + 5 * item + 2).to(tl.int64)
    sequence = tl.load(item_ptr + 5 * item + 3)
    ends = tl.load(item_ptr + 5 * item + 4)
    if MAP:
        if ends == FIRST + LAST:
            return
    dtype: tl.constexpr = seen_ptr.dtype.element_ty
    row = tl.arange(0, C)
    channel = tl.arange(0, BK)
    column = tile * BV + tl.arange(0, BV)
    inside = column < V
    seen_ptr += head * K
    read_ptr += head * K
    key_ptr += head * K
    back_ptr += head * K
    cell = channel[:, None] * V + column[None, :]
    in_state = (channel < K)[:, None] & inside[None, :]
    slot = (item.to(tl.int64) * H + head) * K * V
    state = tl.zeros([BK, BV], tl.float32)
    if HAS_INITIAL:
        state = tl.load(initial_ptr + slot + cell, mask=in_state, other=0.0)
    if MAP:
        state = tl.where(channel[:, None] + V == column[None, :], 1.0, 0.0)
    square = row[:, None] * C + row[None, :]

    for first in range(start, end, C):
        keep = first + row < end
        rows = (first + row).to(tl.int64)
        block = chunk * H + head
        in_rows = keep[:, None] & inside[None, :]
        at_value = (rows[:, None] * H + head) * V + column[None, :]
        scores = score_ptr + block * (MATRICES * C * C) + square
        v = tl.load(v_ptr + at_value, mask=in_rows, other=0.0)
        low = state.to(dtype)
        if STATES:
            tl.store(state_ptr + block * (K * V) + cell, low, mask=in_state)
        x = tl.dot(tl.load(scores + AK * C * C), v, input_precision=DOT)
        x = tl.dot(load_rows(read_ptr, rows, H * K, channel, keep, K, BK), low, x, input_precision=DOT)
        inverse = tl.load(inverse_ptr + block * (C * C) + square)
        z = tl.dot(inverse, x.to(dtype), input_precision=DOT).to(dtype)
        if STATES:
            tl.store(write_ptr + at_value, z, mask=in_rows)
        if OUTPUT:
            o = tl.dot(load_rows(seen_ptr, rows, H * K, channel, keep, K, BK), low, input_precision=DOT)
            o = tl.dot(tl.load(scores + QK * C * C), v, o, input_precision=DOT)
            o = tl.dot(tl.load(scores + QB * C * C), z, o, input_precision=DOT)
            tl.store(o_ptr + at_value, o.to(o_ptr.dtype.element_ty), mask=in_rows)
        factor = tl.load(factor_ptr + block * K + channel, mask=channel < K, other=0.0)
        key = load_rows(key_ptr, rows, H * K, channel, keep, K, BK)
        back = load_rows(back_ptr, rows, H * K, channel, keep, K, BK)
        state = tl.dot(tl.trans(key), v, state * factor[:, None], input_precision=DOT)
        state = tl.dot(tl.trans(back), z, state, input_precision=DOT)
        chunk += 1

    if MAP:
        slot = (item.to(tl.int64) * H + head) * K * (V + K)
        cell = channel[:, None] * (V + K) + column[None, :]
        in_state = (channel < K)[:, None] & (column < V + K)[None, :]
        tl.store(final_ptr + slot + cell, state, mask=in_state)
    if HAS_FINAL:
        if ends >= LAST:
            slot = (sequence.to(tl.int64) * H + head) * K * V
            tl.store(final_ptr + slot + cell, state, mask=in_state)


@triton.jit
def reverse_dplr(
    seen_ptr,
    read_ptr,
    back_ptr,
    do_ptr,  # [T, H, V]
    inverse_ptr,
    score_ptr,
    factor_ptr,
    item_ptr,
    closing_ptr,  # [items, H, K, V] fp32, gradient of the state after the item
    opening_ptr,  # [N, H, K, V] fp32, that of the state before the sequence; with MAP [items, H, K, V] before the item
    dstate_ptr,  # [chunks, H, K, V] gradient of the states after the chunks
    dx_ptr,  # [T, H, V] dX
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    STORE: tl.constexpr,
    MAP: tl.constexpr,
    HAS_CLOSING: tl.constexpr,
    HAS_OPENING: tl.constexpr,
    DOT: tl.constexpr,
):
    tile = tl.program_id(0)
    item, head = tl.program_id(1) // H, tl.program_id(1) % H
    start = tl.load(item_ptr + 5 * item)
    end = tl.load(item_ptr + 5 * item + 1)
    chunks = tl.cdiv(end - start, C)
    chunk = tl.load(item_ptr + 5 * item + 2).to(tl.int64) + chunks
    sequence = tl.load(item_ptr + 5 * item + 3)
    ends = tl.load(item_ptr + 5 * item + 4)
    if MAP:
        if ends == FIRST + LAST:
            return
    dtype: tl.constexpr = seen_ptr.dtype.element_ty
    row = tl.arange(0, C)
    channel = tl.arange(0, BK)
    column = tile * BV + tl.arange(0, BV)
    inside = column < V
    seen_ptr += head * K
    read_ptr += head * K
    back_ptr += head * K
    cell = channel[:, None] * V + column[None, :]
    in_state = (channel < K)[:, None] & inside[None, :]
    slot = (item.to(tl.int64) * H + head) * K * V
    dstate = tl.zeros([BK, BV], tl.float32)
    if HAS_CLOSING:
        dstate = tl.load(closing_ptr + slot + cell, mask=in_state, other=0.0)
    square = row[:, None] * C + row[None, :]

    for step in range(chunks):
        first = start + (chunks - 1 - step) * C
        chunk -= 1
        keep = first + row < end
        rows = (first + row).to(tl.int64)
        block = chunk * H + head
        in_rows = keep[:, None] & inside[None, :]
        at_value = (rows[:, None] * H + head) * V + column[None, :]
        do = tl.load(do_ptr + at_value, mask=in_rows, other=0.0)
        qb = tl.load(score_ptr + block * (MATRICES * C * C) + QB * C * C + square)
        inverse = tl.load(inverse_ptr + block * (C * C) + square)
        back = load_rows(back_ptr, rows, H * K, channel, keep, K, BK)
        low = dstate.to(dtype)
        if STORE:
            tl.store(dstate_ptr + block * (K * V) + cell, low, mask=in_state)
        dz = tl.dot(tl.trans(qb), do, input_precision=DOT)
        dz = tl.dot(back, low, dz, input_precision=DOT)
        dx = tl.dot(tl.trans(inverse), dz.to(dtype), input_precision=DOT).to(dtype)
        if STORE:
            tl.store(dx_ptr + at_value, dx, mask=in_rows)
        factor = tl.load(factor_ptr + block * K + channel, mask=channel < K, other=0.0)
        seen = load_rows(seen_ptr, rows, H * K, channel, keep, K, BK)
        read = load_rows(read_ptr, rows, H * K, channel, keep, K, BK)
        dstate = tl.dot(tl.trans(seen), do, dstate * factor[:, None], input_precision=DOT)
        dstate = tl.dot(tl.trans(read), dx, dstate, input_precision=DOT)

    if MAP:
        tl.store(opening_ptr + slot + cell, dstate, mask=in_state)
    if HAS_OPENING:
        if (ends == FIRST) | (ends == FIRST + LAST):
            slot = (sequence.to(tl.int64) * H + head) * K * V
            tl.store(opening_ptr + slot + cell, dstate, mask=in_state)
