# ruff: noqa: SIM102 (compile-time and run-time conditions nest; they do not join with `and`)
"""Decay per key channel. All that is nonlinear in the decay happens in two kernels parallel over chunks, so that the sweeps
over time are plain products:

    prepare      q, k, decay         -> qs = q exp(X), ks = k exp(L_C - L), scores A, F = exp(L_C) of each chunk
    key_sweep    o = A v + qs S      S  <- diag(F) S + ks^T v      (reverse: dv = A^T do + ks dS)
    inter_sweep  dqs = do S^T        the same S, transposed        (reverse: dks = v dS^T)
    finish       dqs, dks, do, v     -> dq, dk, ddecay, with the terms inside a chunk

L is the cumulative log decay since the chunk's start after a row, X the same before it when there is a bonus, else L.

Inside a chunk ``exp(X_i - L_j)`` takes one of two ways, both exact. Where no channel decays by more than 2^-LIMIT over the
chunk, it is a factor of row i times one of row j. Otherwise (`strong_scores`, and `finish` with STRONG) the second factor
could overflow, and the chunk is halved again and again: rows of a right half meet rows of the left half through the pivot
between them, where both exponents are <= 0, so six masked products cover 64 rows. The two ways are two kernels because the
second needs twice the registers; the one that a chunk does not need ends at once.

A decay per value channel is the same problem with the operands exchanged (see `triton_vector_passes`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from flame.kernels.linear_attention.triton_scalar import LOG2E, item_bounds, load_rows

LIMIT = tl.constexpr(64.0)


@triton.jit
def level_factor(log, half: tl.constexpr, BT: tl.constexpr, WIDTH: tl.constexpr, EXCLUSIVE: tl.constexpr):
    """Decay of every row to the pivot between its block's halves of `half` rows; all exponents are <= 0."""
    blocks = tl.reshape(log, [BT // half, half, WIDTH])
    inclusive = tl.reshape(tl.cumsum(blocks, 1), [BT, WIDTH])
    whole = tl.sum(blocks, 1, keep_dims=True)
    whole = tl.reshape(tl.broadcast_to(whole, [BT // half, half, WIDTH]), [BT, WIDTH])
    right = (tl.arange(0, BT) // half) % 2 == 1
    if EXCLUSIVE:
        return tl.exp2(tl.where(right[:, None], inclusive - log, whole - inclusive))
    return tl.exp2(tl.where(right[:, None], inclusive, whole - inclusive))


@triton.jit
def level_mask(half: tl.constexpr, BT: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Pairs (row i, column j) with i in the right half and j in the left half of one block, or (j, i)."""
    local = tl.arange(0, BT)
    right = (local // half) % 2 == 1
    block = local // (2 * half)
    same = block[:, None] == block[None, :]
    if TRANSPOSED:
        return same & (right[:, None] == 0) & right[None, :]
    return same & right[:, None] & (right[None, :] == 0)


@triton.jit
def running_sum(triangle, x, TERMS: tl.constexpr):
    """Sums of the rows of x [BT, WIDTH] that `triangle` [BT, BT] bf16 selects, as products: a scan's barriers cost more.

    x goes in as TERMS numbers of 8 bits, so a bf16 x takes one and an fp32 x three to lose nothing.
    """
    part = x.to(tl.bfloat16)
    total = tl.dot(triangle, part)
    for _ in tl.static_range(TERMS - 1):
        x = x.to(tl.float32) - part.to(tl.float32)
        part = x.to(tl.bfloat16)
        total = tl.dot(triangle, part, total)
    return total


@triton.jit
def prepare(
    q_ptr,  # [T, HQ, K]
    k_ptr,  # [T, HK, K]
    decay_ptr,  # [T, HG, K] natural log
    bonus_ptr,  # [H, K]
    qs_ptr,  # [T, H, K]
    ks_ptr,  # [T, H, K]
    scores_ptr,  # [T, H, BT]
    factor_ptr,  # [chunks, H, K] fp32
    starts_ptr,
    ends_ptr,
    tokens,
    segment,
    segments,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    H: tl.constexpr,
    GROUP_Q: tl.constexpr,
    GROUP_K: tl.constexpr,
    GROUP_G: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
    BT: tl.constexpr,
    BONUS: tl.constexpr,
    READERS: tl.constexpr,
    VARLEN: tl.constexpr,
    PRECISION: tl.constexpr,
    DOTS: tl.constexpr,
):
    TERMS: tl.constexpr = 1 if decay_ptr.dtype.element_ty == tl.bfloat16 else 3
    item = tl.program_id(1) // H
    head = tl.program_id(1) % H
    start, length = item_bounds(starts_ptr, ends_ptr, item, tokens, segment, segments, VARLEN)
    HG: tl.constexpr = H // GROUP_G
    DOT: tl.constexpr = ks_ptr.dtype.element_ty
    k_ptr += start * stride_kt + (head // GROUP_K) * stride_kh
    q_ptr += start * stride_qt + (head // GROUP_Q) * stride_qh
    decay_ptr += (start * HG + head // GROUP_G) * K
    out = (start * H + head) * K
    local = tl.arange(0, BT)
    diagonal = local[:, None] == local[None, :]
    if BONUS:
        keep_pair = local[:, None] > local[None, :]
    else:
        keep_pair = local[:, None] >= local[None, :]
    for chunk in range(tl.program_id(0), tl.cdiv(length, BT), tl.num_programs(0)):
        keep = chunk * BT + local < length
        # The chunk's rows are found by scalars of 64 bits and offsets of 32, which take half the registers.
        row = tl.full((), 0, tl.int64) + chunk * BT
        slot = ((start // BT + chunk + item) * H + head) * K
        scores = tl.zeros([BT, BT], tl.float32)
        weak = length > 0
        for tile in range(tl.cdiv(K, BK)):
            columns = tile * BK + tl.arange(0, BK)
            inside = keep[:, None] & (columns < K)[None, :]
            raw = load_rows(decay_ptr + row * (HG * K), local, HG * K, columns, keep, K, BK)
            k = load_rows(k_ptr + row * stride_kt, local, stride_kt, columns, keep, K, BK)
            log = raw.to(tl.float32) * LOG2E
            if DOTS:
                triangle = (local[:, None] >= local[None, :]).to(tl.bfloat16)
                decayed = running_sum(triangle, raw, TERMS) * LOG2E
            else:
                decayed = tl.cumsum(log, 0)
            whole = tl.sum(log, 0)
            ks = (k * tl.exp2(whole[None, :] - decayed)).to(DOT)
            at = local[:, None] * (H * K) + columns[None, :]
            tl.store(ks_ptr + (out + row * (H * K)) + at, ks, mask=inside)
            tl.store(factor_ptr + slot + columns, tl.exp2(whole), mask=columns < K)
            if READERS:
                q = load_rows(q_ptr + row * stride_qt, local, stride_qt, columns, keep, K, BK)
                if BONUS:
                    qs = q * tl.exp2(decayed - log)
                else:
                    qs = q * tl.exp2(decayed)
                tl.store(qs_ptr + (out + row * (H * K)) + at, qs.to(DOT), mask=inside)
                weak &= tl.min(whole, 0) > -LIMIT
                near = (qs * tl.exp2(-tl.maximum(whole, -LIMIT))[None, :]).to(DOT)
                part = tl.dot(near, tl.trans(ks), input_precision=PRECISION)
                scores += tl.where(keep_pair, part, 0.0)
                if BONUS:
                    bonus = tl.load(bonus_ptr + head * K + columns, mask=columns < K, other=0.0).to(tl.float32)
                    own = tl.sum(q.to(tl.float32) * k.to(tl.float32) * bonus[None, :], 1)
                    scores += tl.where(diagonal, own[:, None], 0.0)
        if READERS:
            at_scores = scores_ptr + ((start + row) * H + head) * BT + local[:, None] * (H * BT) + local[None, :]
            if weak:
                tl.store(at_scores, scores.to(DOT), mask=keep[:, None])


@triton.jit
def strong_scores(
    q_ptr,  # [T, HQ, K]
    k_ptr,  # [T, HK, K]
    decay_ptr,  # [T, HG, K] natural log
    bonus_ptr,  # [H, K]
    scores_ptr,  # [T, H, BT]
    factor_ptr,  # [chunks, H, K] fp32
    starts_ptr,
    ends_ptr,
    tokens,
    segment,
    segments,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    H: tl.constexpr,
    GROUP_Q: tl.constexpr,
    GROUP_K: tl.constexpr,
    GROUP_G: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
    BT: tl.constexpr,
    LEVELS: tl.constexpr,
    GROUP: tl.constexpr,
    BONUS: tl.constexpr,
    VARLEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scores of the chunks that `prepare` left out; chunks without a strong decay end at once."""
    item = tl.program_id(1) // H
    head = tl.program_id(1) % H
    start, length = item_bounds(starts_ptr, ends_ptr, item, tokens, segment, segments, VARLEN)
    HG: tl.constexpr = H // GROUP_G
    DOT: tl.constexpr = scores_ptr.dtype.element_ty
    k_ptr += start * stride_kt + (head // GROUP_K) * stride_kh
    q_ptr += start * stride_qt + (head // GROUP_Q) * stride_qh
    decay_ptr += (start * HG + head // GROUP_G) * K
    local = tl.arange(0, BT)
    diagonal = local[:, None] == local[None, :]
    every = tl.arange(0, triton.next_power_of_2(K))
    chunks = tl.cdiv(length, BT)
    group = tl.program_id(0) * GROUP + tl.arange(0, GROUP)
    at_factor = factor_ptr + ((start // BT + group + item)[:, None] * H + head) * K + every[None, :]
    factors = tl.load(at_factor, mask=(group < chunks)[:, None] & (every < K)[None, :], other=1.0)
    smallest = tl.min(factors, 1)
    last = tl.minimum((tl.program_id(0) + 1) * GROUP, chunks)
    last = tl.where(tl.min(smallest, 0) <= tl.exp2(-LIMIT), last, 0)
    for chunk in range(tl.program_id(0) * GROUP, last):
        if tl.min(tl.where(group == chunk, smallest, 1.0), 0) <= tl.exp2(-LIMIT):
            rows = chunk * BT + local
            keep = rows < length
            rows = rows.to(tl.int64)
            scores = tl.zeros([BT, BT], tl.float32)
            for tile in range(tl.cdiv(K, BK)):
                columns = tile * BK + tl.arange(0, BK)
                log = load_rows(decay_ptr, rows, HG * K, columns, keep, K, BK).to(tl.float32) * LOG2E
                k = load_rows(k_ptr, rows, stride_kt, columns, keep, K, BK).to(tl.float32)
                q = load_rows(q_ptr, rows, stride_qt, columns, keep, K, BK).to(tl.float32)
                if BONUS:
                    bonus = tl.load(bonus_ptr + head * K + columns, mask=columns < K, other=0.0).to(tl.float32)
                    own = tl.sum(q * k * bonus[None, :], 1)
                else:
                    own = tl.sum(q * k, 1)
                scores += tl.where(diagonal, own[:, None], 0.0)
                for level in tl.static_range(LEVELS):
                    factor = level_factor(log, 1 << level, BT, BK, BONUS)
                    part = tl.dot((q * factor).to(DOT), tl.trans((k * factor).to(DOT)), input_precision=PRECISION)
                    scores += tl.where(level_mask(1 << level, BT, False), part, 0.0)
            at_scores = scores_ptr + (start + rows)[:, None] * (H * BT) + head * BT + local[None, :]
            tl.store(at_scores, scores.to(DOT), mask=keep[:, None])


@triton.jit
def key_sweep(
    a_ptr,  # [T, H, K] qs, or ks in REVERSE
    b_ptr,  # [T, H, K] ks, or qs in REVERSE
    c_ptr,  # [T, HC, V] v, or do in REVERSE
    scores_ptr,  # [T, H, BT]
    factor_ptr,  # [chunks, H, K]
    y_ptr,  # [T, H, V] o, or dv
    initial_ptr,  # [items, H, K, V]
    final_ptr,  # [items, H, K, V]
    starts_ptr,
    ends_ptr,
    scale,
    tokens,
    segment,
    segments,
    stride_ct,
    stride_ch,
    H: tl.constexpr,
    GROUP_C: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BT: tl.constexpr,
    REVERSE: tl.constexpr,
    VARLEN: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    STORE_FINAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    item = tl.program_id(1) // H
    head = tl.program_id(1) % H
    start, length = item_bounds(starts_ptr, ends_ptr, item, tokens, segment, segments, VARLEN)
    DOT: tl.constexpr = a_ptr.dtype.element_ty
    k_index = tl.arange(0, BK)
    v_index = tl.program_id(0) * BV + tl.arange(0, BV)
    in_v = v_index < V
    in_state = (k_index < K)[:, None] & in_v[None, :]
    cell = (item.to(tl.int64) * H + head) * K * V + k_index[:, None] * V + v_index[None, :]
    state = tl.zeros([BK, BV], tl.float32)
    if HAS_INITIAL:
        state = tl.load(initial_ptr + cell, mask=in_state, other=0.0)
        if REVERSE:
            state = state / scale
    a_ptr += (start * H + head) * K
    b_ptr += (start * H + head) * K
    c_ptr += start * stride_ct + (head // GROUP_C) * stride_ch
    y_ptr += (start * H + head) * V
    scores_ptr += (start * H + head) * BT
    factor_ptr += ((start // BT + item) * H + head) * K
    local = tl.arange(0, BT)
    chunks = tl.cdiv(length, BT)
    for step in range(chunks):
        chunk = chunks - 1 - step if REVERSE else step
        rows = chunk * BT + local
        keep = rows < length
        rows = rows.to(tl.int64)
        a = load_rows(a_ptr, rows, H * K, k_index, keep, K, BK)
        b = load_rows(b_ptr, rows, H * K, k_index, keep, K, BK)
        c = load_rows(c_ptr, rows, stride_ct, v_index, keep, V, BV).to(DOT)
        scores = tl.load(scores_ptr + rows[:, None] * (H * BT) + local[None, :], mask=keep[:, None], other=0.0)
        factor = tl.load(factor_ptr + chunk.to(tl.int64) * (H * K) + k_index, mask=k_index < K, other=0.0)
        y = tl.dot(a, state.to(DOT), input_precision=PRECISION)
        if REVERSE:
            y = tl.dot(tl.trans(scores), c, y, input_precision=PRECISION)
        else:
            y = tl.dot(scores, c, y, input_precision=PRECISION)
        at_y = y_ptr + rows[:, None] * (H * V) + v_index[None, :]
        tl.store(at_y, (y * scale).to(y_ptr.dtype.element_ty), mask=keep[:, None] & in_v[None, :])
        state = tl.dot(tl.trans(b), c, state * factor[:, None], input_precision=PRECISION)
    if STORE_FINAL:
        if REVERSE:
            state = state * scale
        tl.store(final_ptr + cell, state, mask=in_state)


@triton.jit
def inter_sweep(
    a_ptr,  # [T, HA, V] do, or v in REVERSE
    b_ptr,  # [T, HB, V] v, or do in REVERSE
    c_ptr,  # [T, H, K] ks, or qs in REVERSE
    factor_ptr,  # [chunks, H, K]
    y_ptr,  # [T, H, K] fp32 gradient of qs from earlier chunks, or of ks from later ones
    initial_ptr,  # [items, H, K, V]
    final_ptr,  # [items, H, K, V]
    anchor_ptr,  # [anchors, H, V, K] fp32 states every ANCHOR rows: written forward, read in reverse
    edge_ptr,  # [anchors, H, K] fp32 <S, dS> at those rows, reverse
    dscores_ptr,  # [T, H, BT] a b^T, forward
    starts_ptr,
    ends_ptr,
    scale,
    tokens,
    segment,
    segments,
    stride_at,
    stride_ah,
    stride_bt,
    stride_bh,
    H: tl.constexpr,
    GROUP_A: tl.constexpr,
    GROUP_B: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BT: tl.constexpr,
    ANCHOR: tl.constexpr,
    REVERSE: tl.constexpr,
    VARLEN: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    STORE_FINAL: tl.constexpr,
    DECAY_GRADIENT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    item = tl.program_id(1) // H
    head = tl.program_id(1) % H
    start, length = item_bounds(starts_ptr, ends_ptr, item, tokens, segment, segments, VARLEN)
    DOT: tl.constexpr = c_ptr.dtype.element_ty
    v_index = tl.arange(0, BV)
    k_index = tl.program_id(0) * BK + tl.arange(0, BK)
    in_k = k_index < K
    in_state = (v_index < V)[:, None] & in_k[None, :]
    cell = (item.to(tl.int64) * H + head) * K * V + k_index[None, :] * V + v_index[:, None]
    state = tl.zeros([BV, BK], tl.float32)
    if HAS_INITIAL:
        state = tl.load(initial_ptr + cell, mask=in_state, other=0.0)
        if REVERSE:
            state = state / scale
    a_ptr += start * stride_at + (head // GROUP_A) * stride_ah
    b_ptr += start * stride_bt + (head // GROUP_B) * stride_bh
    c_ptr += (start * H + head) * K
    y_ptr += (start * H + head) * K
    factor_ptr += ((start // BT + item) * H + head) * K
    first_anchor = start // ANCHOR + item
    local = tl.arange(0, BT)
    chunks = tl.cdiv(length, BT)
    for step in range(chunks):
        chunk = chunks - 1 - step if REVERSE else step
        rows = chunk * BT + local
        keep = rows < length
        rows = rows.to(tl.int64)
        a = load_rows(a_ptr, rows, stride_at, v_index, keep, V, BV).to(DOT)
        b = load_rows(b_ptr, rows, stride_bt, v_index, keep, V, BV).to(DOT)
        c = load_rows(c_ptr, rows, H * K, k_index, keep, K, BK)
        factor = tl.load(factor_ptr + chunk.to(tl.int64) * (H * K) + k_index, mask=in_k, other=0.0)
        if DECAY_GRADIENT:
            at_edge = ((chunk + 1) * BT % ANCHOR == 0) | (chunk == chunks - 1)
            anchor = (first_anchor + chunk * BT // ANCHOR) * H + head
            at_anchor = anchor_ptr + anchor * (K * V) + v_index[:, None] * K + k_index[None, :]
            if REVERSE:
                if at_edge:
                    anchored = tl.load(at_anchor, mask=in_state, other=0.0) * state
                    tl.store(edge_ptr + anchor * K + k_index, tl.sum(anchored, 0) * scale, mask=in_k)
        rounded = state.to(DOT)
        y = tl.dot(a, rounded, input_precision=PRECISION)
        if DECAY_GRADIENT:
            # The state in two terms: what a pair in two chunks adds to q dq and to k dk must cancel in the suffix sum.
            y = tl.dot(a, (state - rounded.to(tl.float32)).to(DOT), y, input_precision=PRECISION)
        if not REVERSE:
            dscores = tl.dot(a, tl.trans(b), input_precision=PRECISION) * scale
            # Zeros above the diagonal, so that `finish` may feed them to its dots as they are.
            dscores = tl.where(local[:, None] >= local[None, :], dscores, 0.0)
            at_scores = dscores_ptr + ((start + rows)[:, None] * H + head) * BT + local[None, :]
            # Every tile has them; each writes its share of the rows.
            mine = keep & (local % tl.num_programs(0) == tl.program_id(0))
            tl.store(at_scores, dscores.to(DOT), mask=mine[:, None])
        at_y = y_ptr + rows[:, None] * (H * K) + k_index[None, :]
        tl.store(at_y, (y * scale).to(y_ptr.dtype.element_ty), mask=keep[:, None] & in_k[None, :])
        state = tl.dot(tl.trans(b), c, state * factor[None, :], input_precision=PRECISION)
        if DECAY_GRADIENT:
            if not REVERSE:
                if at_edge:
                    tl.store(at_anchor, state, mask=in_state)
    if STORE_FINAL:
        if REVERSE:
            state = state * scale
        tl.store(final_ptr + cell, state, mask=in_state)
