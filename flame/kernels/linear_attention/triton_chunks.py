"""Gradients in parallel over chunks, from the states around every chunk.

Where a sweep would need more than its own operands (the gradient of a decay) or make too many results (queries and keys
that heads share), the states before every chunk and their gradients after it go to memory once, in the operands' dtype,
and everything else follows inside a chunk. With w the decay between two rows, S and dS the state before the chunk and the
gradient of the one after it, r and s a row's decay from the chunk's start and to its end,

    dq = (w * do v^T) k + r do S^T     dk = (w * do v^T)^T q + s v dS^T     dv = (w * q k^T)^T do + s k dS

and the gradient of the log decay at row t is a sum in which no rounding error cancels: of pairs before the chunk and after
it, <S, dS>; of rows from t on with S; of rows before t with dS; and of pairs in the chunk that t separates.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flame.kernels.linear_attention.triton_scalar import (
    LOG2E,
    item_bounds,
    load_rows,
    load_state,
    state_offsets,
    store_state,
)


@triton.jit
def chunk_states(
    b_ptr,  # [T, HB, K] k, or q in REVERSE
    c_ptr,  # [T, HC, V] v, or do in REVERSE
    decay_ptr,  # [HG], or [T, HG] from `chunk_sums`
    initial_ptr,  # [items, H, K, V] fp32
    final_ptr,  # [items, H, K, V] fp32
    state_ptr,  # [chunks, H, K, V] before each chunk, or after it in REVERSE, there without `scale`
    starts_ptr,
    ends_ptr,
    scale,
    tokens,
    segment,
    segments,
    stride_bt,
    stride_bh,
    stride_ct,
    stride_ch,
    H: tl.constexpr,
    GROUP_B: tl.constexpr,
    GROUP_C: tl.constexpr,
    GROUP_G: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BT: tl.constexpr,
    DECAY: tl.constexpr,
    REVERSE: tl.constexpr,
    VARLEN: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    STORE_FINAL: tl.constexpr,
):
    tile_k = tl.program_id(0) // tl.cdiv(V, BV)
    tile_v = tl.program_id(0) % tl.cdiv(V, BV)
    item = tl.program_id(1) // H
    head = tl.program_id(1) % H
    start, length = item_bounds(starts_ptr, ends_ptr, item, tokens, segment, segments, VARLEN)
    k_index = tile_k * BK + tl.arange(0, BK)
    v_index = tile_v * BV + tl.arange(0, BV)
    cell = state_offsets(k_index, v_index, K, V, False)
    edge = (item.to(tl.int64) * H + head) * K * V
    state = tl.zeros([BK, BV], tl.float32)
    if HAS_INITIAL:
        state = load_state(initial_ptr + edge, cell, k_index, v_index, K, V, BK, BV)
        if REVERSE:
            state = state / scale
    HG: tl.constexpr = H // GROUP_G
    b_ptr += start * stride_bt + (head // GROUP_B) * stride_bh
    c_ptr += start * stride_ct + (head // GROUP_C) * stride_ch
    state_ptr += ((start // BT + item) * H + head) * K * V
    if DECAY == "head":
        rate = tl.load(decay_ptr + head // GROUP_G).to(tl.float32) * LOG2E
    if DECAY == "scalar":
        decay_ptr += start * HG + head // GROUP_G

    local = tl.arange(0, BT)
    chunks = tl.cdiv(length, BT)
    for step in range(chunks):
        chunk = chunks - 1 - step if REVERSE else step
        rows = chunk * BT + local
        keep = rows < length
        rows = rows.to(tl.int64)
        b = load_rows(b_ptr, rows, stride_bt, k_index, keep, K, BK)
        c = load_rows(c_ptr, rows, stride_ct, v_index, keep, V, BV)
        if DECAY == "head":
            count = tl.minimum(length - chunk * BT, BT)
            decayed = rate * tl.minimum(local + 1, count).to(tl.float32)
            whole = rate * count.to(tl.float32)
        if DECAY == "scalar":
            decayed = tl.load(decay_ptr + rows * HG, mask=keep, other=0.0)
            last = tl.minimum(chunk * BT + BT, length) - 1
            whole = tl.load(decay_ptr + last.to(tl.int64) * HG)
        store_state(state_ptr + chunk.to(tl.int64) * (H * K * V), cell, state, k_index, v_index, K, V, BK, BV)
        if DECAY != "none":
            weight = tl.exp2(decayed) if REVERSE else tl.exp2(tl.where(keep, whole - decayed, 0.0))
            c = (c * weight[:, None]).to(b.dtype)
            state = state * tl.exp2(whole)
        state = tl.dot(tl.trans(b), c, state)
    if STORE_FINAL:
        if REVERSE:
            state = state * scale
        store_state(final_ptr + edge, cell, state, k_index, v_index, K, V, BK, BV)


@triton.jit
def chunk_decays(decay_ptr, rows, keep, last, rate, count, HG: tl.constexpr, BT: tl.constexpr, DECAY: tl.constexpr):
    """Sums of log2 decays from the chunk's start to each row [BT], and over the chunk. Rows beyond its end take the last."""
    if DECAY == "scalar":
        whole = tl.load(decay_ptr + last * HG)
        decayed = tl.load(decay_ptr + rows * HG, mask=keep, other=0.0)
        return tl.where(keep, decayed, whole), whole
    return rate * tl.minimum(tl.arange(0, BT) + 1, count).to(tl.float32), rate * count


@triton.jit
def store_rows(base, rows, stride, columns, keep, y, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    at = base + rows[:, None] * stride + columns[None, :]
    if WIDTH % BLOCK == 0:
        tl.store(at, y.to(base.dtype.element_ty), mask=keep[:, None])
    else:
        tl.store(at, y.to(base.dtype.element_ty), mask=keep[:, None] & (columns < WIDTH)[None, :])


@triton.jit
def chunk_gradients(
    q_ptr,  # [T, HQ, K]
    k_ptr,  # [T, HK, K]
    v_ptr,  # [T, HV, V]
    do_ptr,  # [T, H, V]
    decay_ptr,  # [HG], or [T, HG] from `chunk_sums`
    state_ptr,  # [chunks, H, K, V] before each chunk
    dstate_ptr,  # [chunks, H, K, V] the gradient after each chunk, without `scale`
    dq_ptr,  # [T, H, K]
    dk_ptr,  # [T, H, K]
    dv_ptr,  # [T, H, V]
    delta_ptr,  # [T, H] fp32 what rows add to the gradient of decays up to them
    carry_ptr,  # [chunks, H] fp32 what all decays of a chunk have
    starts_ptr,
    ends_ptr,
    scale,
    tokens,
    segment,
    segments,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_dt,
    stride_dh,
    H: tl.constexpr,
    GROUP_Q: tl.constexpr,
    GROUP_K: tl.constexpr,
    GROUP_V: tl.constexpr,
    GROUP_G: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BT: tl.constexpr,
    DECAY: tl.constexpr,
    VARLEN: tl.constexpr,
    DECAY_GRADIENT: tl.constexpr,
):
    """One program: one chunk of one head, all of K and V."""
    chunk = tl.program_id(0)
    item = tl.program_id(1) // H
    head = tl.program_id(1) % H
    start, length = item_bounds(starts_ptr, ends_ptr, item, tokens, segment, segments, VARLEN)
    if chunk * BT >= length:
        return
    slot = (start // BT + item + chunk) * H + head
    local = tl.arange(0, BT)
    keep = chunk * BT + local < length
    rows = start + chunk * BT + local
    k_index = tl.arange(0, BK)
    v_index = tl.arange(0, BV)
    cell = state_offsets(k_index, v_index, K, V, False)
    DOT: tl.constexpr = q_ptr.dtype.element_ty
    HG: tl.constexpr = H // GROUP_G
    count = tl.minimum(length - chunk * BT, BT)
    last = start + chunk * BT + count - 1
    rate = 0.0
    if DECAY == "head":
        rate = tl.load(decay_ptr + head // GROUP_G).to(tl.float32) * LOG2E
    decayed, whole = chunk_decays(decay_ptr + head // GROUP_G, rows, keep, last, rate, count, HG, BT, DECAY)
    read = tl.exp2(decayed) * scale
    write = tl.exp2(whole - decayed) * scale

    do = load_rows(do_ptr + head * stride_dh, rows, stride_dt, v_index, keep, V, BV)
    v = load_rows(v_ptr + (head // GROUP_V) * stride_vh, rows, stride_vt, v_index, keep, V, BV)
    before = local[:, None] >= local[None, :]
    weight = tl.exp2(tl.where(before, decayed[:, None] - decayed[None, :], float("-inf"))) * scale
    scores = (tl.dot(do, tl.trans(v)) * weight).to(DOT)
    state = load_state(state_ptr + slot * K * V, cell, k_index, v_index, K, V, BK, BV)
    y = tl.dot(do, tl.trans(state)) * read[:, None]
    k = load_rows(k_ptr + (head // GROUP_K) * stride_kh, rows, stride_kt, k_index, keep, K, BK)
    q = load_rows(q_ptr + (head // GROUP_Q) * stride_qh, rows, stride_qt, k_index, keep, K, BK)
    if DECAY_GRADIENT:
        delta = tl.sum(q.to(tl.float32) * y, 1)
    y = tl.dot(scores, k, y)
    store_rows(dq_ptr + head * K, rows, H * K, k_index, keep, y, K, BK)

    dstate = load_state(dstate_ptr + slot * K * V, cell, k_index, v_index, K, V, BK, BV)
    after = local[:, None] <= local[None, :]
    weight = tl.exp2(tl.where(after, decayed[None, :] - decayed[:, None], float("-inf"))) * scale
    dscores = tl.dot(v, tl.trans(do)) * weight
    y = tl.dot(v, tl.trans(dstate)) * write[:, None]
    if DECAY_GRADIENT:
        written = tl.sum(k.to(tl.float32) * y, 1)
    y = tl.dot(dscores.to(DOT), q, y)
    store_rows(dk_ptr + head * K, rows, H * K, k_index, keep, y, K, BK)

    scores_t = tl.dot(k, tl.trans(q))
    if DECAY_GRADIENT:
        # No decay touches a row's pair with itself.
        pairs = tl.where(local[:, None] < local[None, :], scores_t * dscores, 0.0)
        delta += tl.sum(pairs, 0) - (tl.sum(pairs, 1) + written)
        tl.store(delta_ptr + rows * H + head, delta, mask=keep)
    y = tl.dot(k, dstate) * write[:, None]
    y = tl.dot((scores_t * weight).to(DOT), do, y)
    store_rows(dv_ptr + head * V, rows, H * V, v_index, keep, y, V, BV)

    if DECAY_GRADIENT:
        # Read again, from the cache, in parts: kept from above, they would take the place of another program.
        PART: tl.constexpr = 16
        product = tl.zeros([PART, BV], tl.float32)
        for part in tl.static_range((K + PART - 1) // PART):
            k_part = part * PART + tl.arange(0, PART)
            cell = state_offsets(k_part, v_index, K, V, False)
            s = load_state(state_ptr + slot * K * V, cell, k_part, v_index, K, V, PART, BV)
            ds = load_state(dstate_ptr + slot * K * V, cell, k_part, v_index, K, V, PART, BV)
            product += s.to(tl.float32) * ds.to(tl.float32)
        carry = tl.sum(tl.sum(product, 1), 0) * tl.exp2(whole) * scale + tl.sum(written, 0)
        tl.store(carry_ptr + slot, carry)


@triton.jit
def decay_gradients(
    delta_ptr,  # [T, H] fp32
    carry_ptr,  # [chunks, H] fp32
    ddecay_ptr,  # [T, H]
    starts_ptr,
    ends_ptr,
    tokens,
    segment,
    segments,
    H: tl.constexpr,
    BH: tl.constexpr,
    BT: tl.constexpr,
    VARLEN: tl.constexpr,
):
    """Suffix sums within each chunk, for BH heads a program."""
    item = tl.program_id(1)
    start, length = item_bounds(starts_ptr, ends_ptr, item, tokens, segment, segments, VARLEN)
    heads = tl.program_id(2) * BH + tl.arange(0, BH)
    inside = heads < H
    for chunk in range(tl.program_id(0), tl.cdiv(length, BT), tl.num_programs(0)):
        rows = chunk * BT + tl.arange(0, BT)
        keep = (rows < length)[:, None] & inside[None, :]
        at = (start + rows)[:, None] * H + heads[None, :]
        delta = tl.load(delta_ptr + at, mask=keep, other=0.0)
        carry = tl.load(carry_ptr + (start // BT + item + chunk) * H + heads, mask=inside, other=0.0)
        carry += tl.sum(delta, 0)
        gradient = carry[None, :] - tl.cumsum(delta, 0) + delta
        tl.store(ddecay_ptr + at, gradient.to(ddecay_ptr.dtype.element_ty), mask=keep)
