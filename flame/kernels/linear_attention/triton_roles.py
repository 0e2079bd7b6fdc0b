"""Gradients by three programs for a chunk, of queries, of keys and of values, which share its tensors through the cache.

The formulas are those of `triton_chunks`, whose states these kernels read too. Each program holds one sum, so that its
loads run ahead, several fit on a multiprocessor, and values may come in tiles; and it may walk several heads that share
their queries and keys, whose dq and dk it sums in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flame.kernels.linear_attention.triton_chunks import store_rows
from flame.kernels.linear_attention.triton_scalar import LOG2E, item_bounds, load_rows, load_state, state_offsets


@triton.jit
def head_decays(
    decay_ptr,
    head,
    local,
    keep,
    count,
    HG: tl.constexpr,
    GROUP_G: tl.constexpr,
    DECAY: tl.constexpr,
):
    """Sums of log2 decays from the chunk's start to each row [BT], and over the chunk. Rows beyond its end take the last."""
    if DECAY == "scalar":
        whole = tl.load(decay_ptr + (count - 1) * HG + head // GROUP_G)
        decayed = tl.load(decay_ptr + local * HG + head // GROUP_G, mask=keep, other=0.0)
        return tl.where(keep, decayed, whole), whole
    rate = 0.0
    if DECAY == "head":
        rate = tl.load(decay_ptr + head // GROUP_G).to(tl.float32) * LOG2E
    return rate * tl.minimum(local + 1, count).to(tl.float32), rate * count


@triton.jit
def trace(x, BLOCK: tl.constexpr):
    """The sum of the diagonal of x [BLOCK, BLOCK]."""
    at = tl.arange(0, BLOCK)
    return tl.sum(tl.sum(tl.where(at[:, None] == at[None, :], x, 0.0), 1), 0)


@triton.jit
def add_tile(total, x, step, TILES: tl.constexpr):
    """A head's sum so far over its tiles of values."""
    if TILES == 1:
        return x
    return tl.where(step % TILES == 0, 0.0, total) + x


@triton.jit
def role_gradients(
    q_ptr,  # [T, HQ, K]
    k_ptr,  # [T, HQ, K]
    v_ptr,  # [T, HV, V]
    do_ptr,  # [T, H, V]
    decay_ptr,  # [HG], or [T, HG] from `chunk_sums`
    state_ptr,  # [chunks, H, K, V] before each chunk
    dstate_ptr,  # [chunks, H, K, V] the gradient after each chunk, without `scale`
    dq_ptr,  # [T, H / BH, K]
    dk_ptr,  # [T, H / BH, K]
    dv_ptr,  # [T, H, V]
    delta_ptr,  # [2, T, H / BH] fp32 what rows add to the gradient of decays up to them
    carry_ptr,  # [2, chunks, H / BH] fp32 what all decays of a chunk have
    starts_ptr,
    ends_ptr,
    scale,
    tokens,
    segment,
    segments,
    rows_total,
    slots_total,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_dt,
    stride_dh,
    H: tl.constexpr,
    BH: tl.constexpr,
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
    """Three programs, of queries, keys and values, for one chunk of BH heads that share queries, keys and decay."""
    PARTS: tl.constexpr = H // BH
    HG: tl.constexpr = H // GROUP_G
    TILES: tl.constexpr = (V + BV - 1) // BV
    DOT: tl.constexpr = q_ptr.dtype.element_ty
    role = tl.program_id(0) % 3
    chunk = tl.program_id(0) // 3
    item = tl.program_id(1) // PARTS
    part = tl.program_id(1) % PARTS
    start, length = item_bounds(starts_ptr, ends_ptr, item, tokens, segment, segments, VARLEN)
    if chunk * BT >= length:
        return
    slot = start // BT + item + chunk
    state_ptr += slot * (H * K * V)
    dstate_ptr += slot * (H * K * V)
    carry_ptr += slot * PARTS + part
    local = tl.arange(0, BT)
    keep = chunk * BT + local < length
    count = tl.minimum(length - chunk * BT, BT)
    start += chunk * BT  # in 64 bits; offsets inside the chunk take 32
    first = part * BH
    k_index = tl.arange(0, BK)
    q_ptr += start * stride_qt + (first // GROUP_Q) * stride_qh
    k_ptr += start * stride_kt + (first // GROUP_K) * stride_kh
    v_ptr += start * stride_vt
    do_ptr += start * stride_dt
    dq_ptr += (start * PARTS + part) * K
    dk_ptr += (start * PARTS + part) * K
    dv_ptr += start * H * V
    delta_ptr += start * PARTS + part
    if DECAY == "scalar":
        decay_ptr += start * HG
    decayed, whole = head_decays(decay_ptr, first, local, keep, count, HG, GROUP_G, DECAY)
    if role == 0:
        y = tl.zeros([BT, BK], tl.float32)
        scores = tl.zeros([BT, BT], tl.float32)
        meeting = tl.zeros([BV, BV], tl.float32)
        for step in range(BH * TILES):
            head = first + step // TILES
            v_index = step % TILES * BV + tl.arange(0, BV)
            cell = state_offsets(k_index, v_index, K, V, False)
            v = load_rows(v_ptr + (head // GROUP_V) * stride_vh, local, stride_vt, v_index, keep, V, BV)
            do = load_rows(do_ptr + head * stride_dh, local, stride_dt, v_index, keep, V, BV)
            state = load_state(state_ptr + head * (K * V), cell, k_index, v_index, K, V, BK, BV)
            scores = tl.dot(do, tl.trans(v), scores)
            y = tl.dot(do, tl.trans(state), y)
            if DECAY_GRADIENT:
                # <S, dS> is the trace of a product, whose operands are loaded ahead as a sum's would not be.
                dstate = load_state(dstate_ptr + head * (K * V), cell, k_index, v_index, K, V, BK, BV)
                meeting = tl.dot(tl.trans(state), dstate, meeting)
        k = load_rows(k_ptr, local, stride_kt, k_index, keep, K, BK)
        y = y * (tl.exp2(decayed) * scale)[:, None]
        if DECAY_GRADIENT:
            q = load_rows(q_ptr, local, stride_qt, k_index, keep, K, BK)
            tl.store(delta_ptr + local * PARTS, tl.sum(q.to(tl.float32) * y, 1), mask=keep)
            tl.store(carry_ptr, trace(meeting, BV) * tl.exp2(whole) * scale)
        pairs = local[:, None] >= local[None, :]
        scores *= tl.exp2(tl.where(pairs, decayed[:, None] - decayed[None, :], float("-inf"))) * scale
        y = tl.dot(scores.to(DOT), k, y)
        store_rows(dq_ptr, local, PARTS * K, k_index, keep, y, K, BK)
    elif role == 1:
        y = tl.zeros([BT, BK], tl.float32)
        scores = tl.zeros([BT, BT], tl.float32)
        for step in range(BH * TILES):
            head = first + step // TILES
            v_index = step % TILES * BV + tl.arange(0, BV)
            cell = state_offsets(k_index, v_index, K, V, False)
            v = load_rows(v_ptr + (head // GROUP_V) * stride_vh, local, stride_vt, v_index, keep, V, BV)
            do = load_rows(do_ptr + head * stride_dh, local, stride_dt, v_index, keep, V, BV)
            state = load_state(dstate_ptr + head * (K * V), cell, k_index, v_index, K, V, BK, BV)
            scores = tl.dot(v, tl.trans(do), scores)
            y = tl.dot(v, tl.trans(state), y)
        q = load_rows(q_ptr, local, stride_qt, k_index, keep, K, BK)
        y = y * (tl.exp2(whole - decayed) * scale)[:, None]
        pairs = local[:, None] <= local[None, :]
        scores *= tl.exp2(tl.where(pairs, decayed[None, :] - decayed[:, None], float("-inf"))) * scale
        if DECAY_GRADIENT:
            k = load_rows(k_ptr, local, stride_kt, k_index, keep, K, BK)
            written = tl.sum(k.to(tl.float32) * y, 1)
            # No decay touches a row's pair with itself.
            products = tl.where(local[:, None] < local[None, :], tl.dot(k, tl.trans(q)) * scores, 0.0)
            delta = tl.sum(products, 0) - (tl.sum(products, 1) + written)
            tl.store(delta_ptr + rows_total * PARTS + local * PARTS, delta, mask=keep)
            tl.store(carry_ptr + slots_total * PARTS, tl.sum(written, 0))
        y = tl.dot(scores.to(DOT), q, y)
        store_rows(dk_ptr, local, PARTS * K, k_index, keep, y, K, BK)
    else:
        k = load_rows(k_ptr, local, stride_kt, k_index, keep, K, BK)
        q = load_rows(q_ptr, local, stride_qt, k_index, keep, K, BK)
        pairs = local[:, None] <= local[None, :]
        weight = tl.exp2(tl.where(pairs, decayed[None, :] - decayed[:, None], float("-inf"))) * scale
        weighted = (tl.dot(k, tl.trans(q)) * weight).to(DOT)
        write = tl.exp2(whole - decayed) * scale
        for step in range(BH * TILES):
            head = first + step // TILES
            v_index = step % TILES * BV + tl.arange(0, BV)
            cell = state_offsets(k_index, v_index, K, V, False)
            do = load_rows(do_ptr + head * stride_dh, local, stride_dt, v_index, keep, V, BV)
            state = load_state(dstate_ptr + head * (K * V), cell, k_index, v_index, K, V, BK, BV)
            dv = tl.dot(k, state) * write[:, None]
            dv = tl.dot(weighted, do, dv)
            store_rows(dv_ptr + head * V, local, H * V, v_index, keep, dv, V, BV)


@triton.jit
def group_gradients(
    q_ptr,  # [T, HQ, K]
    k_ptr,  # [T, HQ, K]
    v_ptr,  # [T, HV, V]
    do_ptr,  # [T, H, V]
    decay_ptr,  # [HG], or [T, HG] from `chunk_sums`
    state_ptr,  # [chunks, H, K, V] before each chunk
    dstate_ptr,  # [chunks, H, K, V] the gradient after each chunk, without `scale`
    dq_ptr,  # [T, H / BH, K]
    dk_ptr,  # [T, H / BH, K]
    dv_ptr,  # [T, H, V]
    delta_ptr,  # [2, T, H] fp32, see `triton_chunks`
    carry_ptr,  # [2, chunks, H] fp32
    starts_ptr,
    ends_ptr,
    scale,
    tokens,
    segment,
    segments,
    rows_total,
    slots_total,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_dt,
    stride_dh,
    H: tl.constexpr,
    BH: tl.constexpr,
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
    """The same for heads that share queries and keys and have decays of their own, as Mamba-2's: scores of queries and keys are
    formed once for all heads, and what they add to dq and dk is summed before it is multiplied with k and q."""
    PARTS: tl.constexpr = H // BH
    HG: tl.constexpr = H // GROUP_G
    DOT: tl.constexpr = q_ptr.dtype.element_ty
    role = tl.program_id(0) % 3
    chunk = tl.program_id(0) // 3
    item = tl.program_id(1) // PARTS
    part = tl.program_id(1) % PARTS
    start, length = item_bounds(starts_ptr, ends_ptr, item, tokens, segment, segments, VARLEN)
    if chunk * BT >= length:
        return
    slot = (start // BT + item + chunk) * H
    state_ptr += slot * K * V
    dstate_ptr += slot * K * V
    local = tl.arange(0, BT)
    keep = chunk * BT + local < length
    count = tl.minimum(length - chunk * BT, BT)
    start += chunk * BT  # in 64 bits; offsets inside the chunk take 32
    if DECAY == "scalar":
        decay_ptr += start * HG
    k_index = tl.arange(0, BK)
    TILES: tl.constexpr = (V + BV - 1) // BV
    first = part * BH
    q_ptr += start * stride_qt + (first // GROUP_Q) * stride_qh
    k_ptr += start * stride_kt + (first // GROUP_K) * stride_kh
    v_ptr += start * stride_vt
    do_ptr += start * stride_dt
    dq_ptr += (start * PARTS + part) * K
    dk_ptr += (start * PARTS + part) * K
    dv_ptr += start * H * V
    delta_ptr += start * H
    delta = tl.zeros([BT], tl.float32)
    carry = 0.0
    if role == 0:
        q = load_rows(q_ptr, local, stride_qt, k_index, keep, K, BK)
        before = local[:, None] >= local[None, :]
        dq = tl.zeros([BT, BK], tl.float32)
        dscores = tl.zeros([BT, BT], tl.float32)
        for step in range(BH * TILES):
            head = first + step // TILES
            v_index = step % TILES * BV + tl.arange(0, BV)
            cell = state_offsets(k_index, v_index, K, V, False)
            v = load_rows(v_ptr + (head // GROUP_V) * stride_vh, local, stride_vt, v_index, keep, V, BV)
            do = load_rows(do_ptr + head * stride_dh, local, stride_dt, v_index, keep, V, BV)
            state = load_state(state_ptr + head * (K * V), cell, k_index, v_index, K, V, BK, BV)
            if DECAY == "none":
                dscores += tl.where(before, tl.dot(do, tl.trans(v)), 0.0)
                dq = tl.dot(do, tl.trans(state), dq)
            else:
                decayed, whole = head_decays(decay_ptr, head, local, keep, count, HG, GROUP_G, DECAY)
                weight = tl.exp2(tl.where(before, decayed[:, None] - decayed[None, :], float("-inf")))
                dscores += tl.dot(do, tl.trans(v)) * weight
                read = tl.exp2(decayed)
                dq = tl.dot((do * read[:, None]).to(DOT), tl.trans(state), dq)
                if DECAY_GRADIENT:
                    o = tl.dot(q, state)
                    delta = add_tile(delta, tl.sum(do.to(tl.float32) * o, 1) * (read * scale), step, TILES)
                    tl.store(delta_ptr + local * H + head, delta, mask=keep & (step % TILES == TILES - 1))
        k = load_rows(k_ptr, local, stride_kt, k_index, keep, K, BK)
        dq = tl.dot(dscores.to(DOT), k, dq) * scale
        store_rows(dq_ptr, local, PARTS * K, k_index, keep, dq, K, BK)
    elif role == 1:
        after = local[:, None] <= local[None, :]
        dk = tl.zeros([BT, BK], tl.float32)
        dscores = tl.zeros([BT, BT], tl.float32)
        for step in range(BH * TILES):
            head = first + step // TILES
            v_index = step % TILES * BV + tl.arange(0, BV)
            cell = state_offsets(k_index, v_index, K, V, False)
            v = load_rows(v_ptr + (head // GROUP_V) * stride_vh, local, stride_vt, v_index, keep, V, BV)
            do = load_rows(do_ptr + head * stride_dh, local, stride_dt, v_index, keep, V, BV)
            dstate = load_state(dstate_ptr + head * (K * V), cell, k_index, v_index, K, V, BK, BV)
            if DECAY == "none":
                dscores += tl.where(after, tl.dot(v, tl.trans(do)), 0.0)
                dk = tl.dot(v, tl.trans(dstate), dk)
            else:
                decayed, whole = head_decays(decay_ptr, head, local, keep, count, HG, GROUP_G, DECAY)
                weight = tl.exp2(tl.where(after, decayed[None, :] - decayed[:, None], float("-inf")))
                dscores += tl.dot(v, tl.trans(do)) * weight
                dk = tl.dot((v * tl.exp2(whole - decayed)[:, None]).to(DOT), tl.trans(dstate), dk)
                if DECAY_GRADIENT:
                    state = load_state(state_ptr + head * (K * V), cell, k_index, v_index, K, V, BK, BV)
                    product = trace(tl.dot(tl.trans(state), dstate), BV)
                    carry = add_tile(carry, product * tl.exp2(whole) * scale, step, TILES)
                    tl.store(carry_ptr + slot + head, carry, mask=step % TILES == TILES - 1)
        q = load_rows(q_ptr, local, stride_qt, k_index, keep, K, BK)
        dk = tl.dot(dscores.to(DOT), q, dk) * scale
        store_rows(dk_ptr, local, PARTS * K, k_index, keep, dk, K, BK)
    else:
        k = load_rows(k_ptr, local, stride_kt, k_index, keep, K, BK)
        q = load_rows(q_ptr, local, stride_qt, k_index, keep, K, BK)
        after = local[:, None] <= local[None, :]
        scores = tl.where(after, tl.dot(k, tl.trans(q)), 0.0) * scale
        for step in range(BH * TILES):
            head = first + step // TILES
            v_index = step % TILES * BV + tl.arange(0, BV)
            cell = state_offsets(k_index, v_index, K, V, False)
            do = load_rows(do_ptr + head * stride_dh, local, stride_dt, v_index, keep, V, BV)
            dstate = load_state(dstate_ptr + head * (K * V), cell, k_index, v_index, K, V, BK, BV)
            if DECAY == "none":
                dv = tl.dot(k, dstate) * scale + tl.dot(scores.to(DOT), do)
            else:
                decayed, whole = head_decays(decay_ptr, head, local, keep, count, HG, GROUP_G, DECAY)
                between = tl.where(after, decayed[None, :] - decayed[:, None], float("-inf"))
                weighted = scores * tl.exp2(between)
                dv = tl.dot(k, dstate) * (tl.exp2(whole - decayed) * scale)[:, None]
                if DECAY_GRADIENT:
                    v = load_rows(v_ptr + (head // GROUP_V) * stride_vh, local, stride_vt, v_index, keep, V, BV)
                    # No decay touches a row's pair with itself.
                    pairs = tl.where(local[:, None] < local[None, :], tl.dot(v, tl.trans(do)) * weighted, 0.0)
                    written = tl.sum(v.to(tl.float32) * dv, 1)
                    delta = add_tile(delta, tl.sum(pairs, 0) - (tl.sum(pairs, 1) + written), step, TILES)
                    carry = add_tile(carry, tl.sum(written, 0), step, TILES)
                    done = step % TILES == TILES - 1
                    tl.store(delta_ptr + rows_total * H + local * H + head, delta, mask=keep & done)
                    tl.store(carry_ptr + slots_total * H + slot + head, carry, mask=done)
                dv += tl.dot(weighted.to(DOT), do)
            store_rows(dv_ptr + head * V, local, H * V, v_index, keep, dv, V, BV)
