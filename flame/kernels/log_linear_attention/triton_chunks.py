"""Kernels parallel over chunks: what a chunk reads of itself and of the tree, and the gradients of both.

Every product is formed the way round in which it is needed. Nothing transposes an accumulator into another dot: on Hopper,
Triton 3.4 to 3.7 miscompiles that.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flame.kernels.linear_attention.triton_scalar import load_rows, load_state, state_offsets
from flame.kernels.log_linear_attention.triton_tree import exponent, place, reader_levels, row_level, set_bits


@triton.jit
def level_weight(weight_ptr, rows, keep, level, stride):
    """[BT] fp32 weights of one level."""
    return tl.load(weight_ptr + rows * stride + level, mask=keep, other=0.0).to(tl.float32)


@triton.jit
def pair_weights(
    weight_ptr, rows, keep, level, L: tl.constexpr, stride, TRANSPOSED: tl.constexpr, INSIDE: tl.constexpr
):
    """[BT, BT] weight of the level at which a row sees another; readers lie along the second axis when TRANSPOSED."""
    if TRANSPOSED:
        weights = tl.zeros_like(level).to(tl.float32) + level_weight(weight_ptr, rows, keep, 0, stride)[None, :]
    else:
        weights = tl.zeros_like(level).to(tl.float32) + level_weight(weight_ptr, rows, keep, 0, stride)[:, None]
    for index in tl.static_range(1, INSIDE):
        if index < L:
            weight = level_weight(weight_ptr, rows, keep, index, stride)
            if TRANSPOSED:
                weights = tl.where(level == index, weight[None, :], weights)
            else:
                weights = tl.where(level == index, weight[:, None], weights)
    return weights


@triton.jit(do_not_specialize=["tokens", "per_row"])
def outputs(
    q_ptr,  # [T, HQ, K]
    k_ptr,  # [T, HK, K]
    v_ptr,  # [T, H, V]
    weight_ptr,  # [T, H, L]
    sum_ptr,  # [chunks, H, BT]
    total_ptr,  # [2 chunks, H]
    state_ptr,  # [chunks, H, K, V]
    o_ptr,  # [T, H, V]
    table_ptr,
    scale,
    tokens,
    per_row,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    H: tl.constexpr,
    L: tl.constexpr,
    GROUP_Q: tl.constexpr,
    GROUP_K: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BT: tl.constexpr,
    INSIDE: tl.constexpr,
    VARLEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    chunk = tl.program_id(0)
    head = tl.program_id(1)
    start, left, position, count = place(table_ptr, chunk, tokens, per_row, BT, VARLEN)
    k_index = tl.arange(0, BK)
    v_index = tl.program_id(2) * BV + tl.arange(0, BV)
    local = tl.arange(0, BT)
    keep = local < left
    rows = local.to(tl.int64)
    q = load_rows(q_ptr + start * stride_qt + (head // GROUP_Q) * stride_qh, rows, stride_qt, k_index, keep, K, BK)
    k = load_rows(k_ptr + start * stride_kt + (head // GROUP_K) * stride_kh, rows, stride_kt, k_index, keep, K, BK)
    v = load_rows(v_ptr + start * stride_vt + head * stride_vh, rows, stride_vt, v_index, keep, V, BV)
    decayed = tl.load(sum_ptr + (chunk.to(tl.int64) * H + head) * BT + local)
    weight_ptr += (start * H + head) * L
    level = row_level(local[:, None], local[None, :], L, BT)
    between = tl.where(local[:, None] >= local[None, :], decayed[:, None] - decayed[None, :], float("-inf"))
    factor = tl.exp2(between) * pair_weights(weight_ptr, rows, keep, level, L, H * L, False, INSIDE)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    o = tl.dot((scores * factor).to(v.dtype), v, input_precision=PRECISION)

    base = (chunk - position).to(tl.int64)
    state_ptr += (base * H + head) * (K * V)
    total_ptr += base * (2 * H) + head
    cell = state_offsets(k_index, v_index, K, V, False)
    end = position  # of the node to be read, in chunks
    since = tl.zeros([], tl.float32)
    for _ in range(set_bits(position)):
        size = end & -end
        state = load_state(state_ptr + (end - 1).to(tl.int64) * (H * K * V), cell, k_index, v_index, K, V, BK, BV)
        index = tl.minimum(INSIDE + exponent(size), L - 1)
        weight = level_weight(weight_ptr, rows, keep, index, H * L) * tl.exp2(decayed + since)
        read = tl.dot(q, state, input_precision=PRECISION)
        o += read * weight[:, None]
        since += tl.load(total_ptr + (2 * end - size - 1).to(tl.int64) * H)
        end -= size
    at = o_ptr + ((start + rows)[:, None] * H + head) * V + v_index[None, :]
    tl.store(at, (o * scale).to(o_ptr.dtype.element_ty), mask=keep[:, None] & (v_index < V)[None, :])


@triton.jit(do_not_specialize=["tokens", "per_row", "chunks"])
def query_gradients(
    q_ptr,  # [T, HQ, K]
    k_ptr,  # [T, HK, K]
    v_ptr,  # [T, H, V]
    do_ptr,  # [T, H, V]
    weight_ptr,  # [T, H, L]
    sum_ptr,  # [chunks, H, BT]
    total_ptr,  # [2 chunks, H]
    state_ptr,  # [chunks, H, K, V]
    dq_ptr,  # [T, H, K]
    dweight_ptr,  # [T, H, L] fp32, zero
    across_ptr,  # [chunks, H, BT] fp32, the chunk's readers in its decays' gradient
    flux_ptr,  # [levels of the tree, H, chunks] fp32, of levels at which the chunk reads
    table_ptr,
    scale,
    tokens,
    per_row,
    chunks,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_ot,
    stride_oh,
    H: tl.constexpr,
    L: tl.constexpr,
    GROUP_Q: tl.constexpr,
    GROUP_K: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BT: tl.constexpr,
    INSIDE: tl.constexpr,
    VARLEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq and the weights' gradient. A token's decay lies between writers before it and readers from it on; `across` has, of
    the pairs inside the chunk, what lies across each row, and the sum of what rows from it on read in the tree."""
    chunk = tl.program_id(0)
    head = tl.program_id(1)
    start, left, position, count = place(table_ptr, chunk, tokens, per_row, BT, VARLEN)
    k_index = tl.arange(0, BK)
    v_index = tl.arange(0, BV)
    local = tl.arange(0, BT)
    keep = local < left
    rows = local.to(tl.int64)
    q = load_rows(q_ptr + start * stride_qt + (head // GROUP_Q) * stride_qh, rows, stride_qt, k_index, keep, K, BK)
    k = load_rows(k_ptr + start * stride_kt + (head // GROUP_K) * stride_kh, rows, stride_kt, k_index, keep, K, BK)
    v = load_rows(v_ptr + start * stride_vt + head * stride_vh, rows, stride_vt, v_index, keep, V, BV)
    do = load_rows(do_ptr + start * stride_ot + head * stride_oh, rows, stride_ot, v_index, keep, V, BV)
    slot = (chunk.to(tl.int64) * H + head) * BT
    decayed = tl.load(sum_ptr + slot + local)
    weight_ptr += (start * H + head) * L
    dweight_ptr += (start * H + head) * L + rows * (H * L)
    level = row_level(local[:, None], local[None, :], L, BT)
    between = tl.where(local[:, None] >= local[None, :], decayed[:, None] - decayed[None, :], float("-inf"))
    dscores = tl.dot(do, tl.trans(v), input_precision=PRECISION) * (tl.exp2(between) * scale)
    pairs = tl.dot(q, tl.trans(k), input_precision=PRECISION) * dscores
    last = tl.zeros([BT], tl.float32)  # the last level's gradient, which several may share
    for inner in tl.static_range(INSIDE):
        if inner < L:
            dweight = tl.sum(tl.where(level == inner, pairs, 0.0), 1)
            if inner == L - 1:
                last += dweight
            else:
                tl.store(dweight_ptr + inner, dweight, mask=keep)
    weights = pair_weights(weight_ptr, rows, keep, level, L, H * L, False, INSIDE)
    pairs = tl.where(local[:, None] > local[None, :], pairs * weights, 0.0)
    across = tl.sum(pairs, 1) - tl.sum(pairs, 0)
    dq = tl.dot((dscores * weights).to(k.dtype), k, input_precision=PRECISION)

    base = (chunk - position).to(tl.int64)
    state_ptr += (base * H + head) * (K * V)
    total_ptr += base * (2 * H) + head
    flux_ptr += head * chunks + chunk
    cell = state_offsets(k_index, v_index, K, V, False)
    end = position
    since = tl.zeros([], tl.float32)
    for _ in range(set_bits(position)):
        size = end & -end
        state = load_state(state_ptr + (end - 1).to(tl.int64) * (H * K * V), cell, k_index, v_index, K, V, BK, BV)
        index = tl.minimum(INSIDE + exponent(size), L - 1)
        weight = level_weight(weight_ptr, rows, keep, index, H * L)
        factor = tl.exp2(decayed + since) * scale
        read = tl.dot(do, tl.trans(state), input_precision=PRECISION)
        dweight = tl.sum(read * q.to(tl.float32), 1) * factor
        last += tl.where(index == L - 1, dweight, 0.0)
        tl.store(dweight_ptr + index, dweight, mask=local < tl.where(index < L - 1, left, 0))
        across += dweight * weight
        tl.store(flux_ptr + exponent(size).to(tl.int64) * (H * chunks), tl.sum(dweight * weight, 0))
        dq += read * (factor * weight)[:, None]
        since += tl.load(total_ptr + (2 * end - size - 1).to(tl.int64) * H)
        end -= size
    tl.store(dweight_ptr + L - 1, last, mask=keep)
    tl.store(across_ptr + slot + local, tl.sum(across, 0) - tl.cumsum(across, 0) + across)
    at = dq_ptr + ((start + rows)[:, None] * H + head) * K + k_index[None, :]
    tl.store(at, dq.to(dq_ptr.dtype.element_ty), mask=keep[:, None] & (k_index < K)[None, :])


@triton.jit(do_not_specialize=["tokens", "per_row", "chunks"])
def key_gradients(
    q_ptr,  # [T, HQ, K]
    k_ptr,  # [T, HK, K]
    v_ptr,  # [T, H, V]
    do_ptr,  # [T, H, V]
    weight_ptr,  # [T, H, L]
    sum_ptr,  # [chunks, H, BT]
    total_ptr,  # [2 chunks, H]
    gradient_ptr,  # [chunks, H, K, V] of the nodes' states
    dk_ptr,  # [T, H, K]
    dv_ptr,  # [T, H, V]
    across_ptr,  # [chunks, H, BT] fp32, in place
    flux_ptr,  # [levels of the tree, H, chunks] fp32, of levels at which the chunk is read
    table_ptr,
    scale,
    tokens,
    per_row,
    chunks,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_ot,
    stride_oh,
    H: tl.constexpr,
    L: tl.constexpr,
    GROUP_Q: tl.constexpr,
    GROUP_K: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BT: tl.constexpr,
    INSIDE: tl.constexpr,
    VARLEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk and dv; adds to `across` what earlier rows of the chunk have written that later chunks read."""
    chunk = tl.program_id(0)
    head = tl.program_id(1)
    start, left, position, count = place(table_ptr, chunk, tokens, per_row, BT, VARLEN)
    k_index = tl.arange(0, BK)
    v_index = tl.arange(0, BV)
    local = tl.arange(0, BT)
    keep = local < left
    rows = local.to(tl.int64)
    q = load_rows(q_ptr + start * stride_qt + (head // GROUP_Q) * stride_qh, rows, stride_qt, k_index, keep, K, BK)
    k = load_rows(k_ptr + start * stride_kt + (head // GROUP_K) * stride_kh, rows, stride_kt, k_index, keep, K, BK)
    v = load_rows(v_ptr + start * stride_vt + head * stride_vh, rows, stride_vt, v_index, keep, V, BV)
    do = load_rows(do_ptr + start * stride_ot + head * stride_oh, rows, stride_ot, v_index, keep, V, BV)
    slot = (chunk.to(tl.int64) * H + head) * BT
    decayed = tl.load(sum_ptr + slot + local)
    weight_ptr += (start * H + head) * L
    level = row_level(local[:, None], local[None, :], L, BT)
    # Readers lie along the second axis here.
    between = tl.where(local[None, :] >= local[:, None], decayed[None, :] - decayed[:, None], float("-inf"))
    weights = pair_weights(weight_ptr, rows, keep, level, L, H * L, True, INSIDE)
    factor = tl.exp2(between) * weights * scale
    scores = (tl.dot(k, tl.trans(q), input_precision=PRECISION) * factor).to(do.dtype)
    dscores = (tl.dot(v, tl.trans(do), input_precision=PRECISION) * factor).to(q.dtype)
    dv = tl.dot(scores, do, input_precision=PRECISION)
    dk = tl.dot(dscores, q, input_precision=PRECISION)

    base = (chunk - position).to(tl.int64)
    whole = tl.load(total_ptr + chunk.to(tl.int64) * (2 * H) + head)
    gradient_ptr += (base * H + head) * (K * V)
    total_ptr += base * (2 * H) + head
    flux_ptr += head * chunks + chunk
    cell = state_offsets(k_index, v_index, K, V, False)
    written = tl.zeros([BT], tl.float32)
    until = tl.zeros([], tl.float32)
    pending = reader_levels(position, count)
    if VARLEN:
        pending = tl.where(left > 0, pending, 0)
    for _ in range(set_bits(pending)):
        size = pending & -pending
        end = (position | (size - 1)) + 1  # of the node that holds this chunk, where its readers begin
        at_node = gradient_ptr + (end - 1).to(tl.int64) * (H * K * V)
        gradient = load_state(at_node, cell, k_index, v_index, K, V, BK, BV)
        write = tl.exp2(whole - decayed + until)
        part = tl.dot(v, tl.trans(gradient), input_precision=PRECISION)
        part = part * write[:, None]
        product = tl.sum(part * k.to(tl.float32), 1)
        written += product
        tl.store(flux_ptr + exponent(size).to(tl.int64) * (H * chunks), tl.sum(product, 0))
        dk += part
        dv += tl.dot(k, gradient, input_precision=PRECISION) * write[:, None]
        pending -= size
        # The right sibling lies between this node's end and the next one's; it is whole where there is a next one.
        until += tl.load(total_ptr + (2 * end + size - 1).to(tl.int64) * H, mask=pending > 0, other=0.0)
    across = tl.load(across_ptr + slot + local)
    tl.store(across_ptr + slot + local, across + tl.cumsum(written, 0) - written)
    at = ((start + rows)[:, None] * H + head).to(tl.int64)
    at_k = dk_ptr + at * K + k_index[None, :]
    tl.store(at_k, dk.to(dk_ptr.dtype.element_ty), mask=keep[:, None] & (k_index < K)[None, :])
    at_v = dv_ptr + at * V + v_index[None, :]
    tl.store(at_v, dv.to(dv_ptr.dtype.element_ty), mask=keep[:, None] & (v_index < V)[None, :])


@triton.jit(do_not_specialize=["tokens", "per_row", "depth", "chunks"])
def decay_gradients(
    across_ptr,  # [chunks, H, BT] fp32
    flux_ptr,  # [levels of the tree, H, chunks] fp32
    ddecay_ptr,  # [T, H]
    table_ptr,
    tokens,
    per_row,
    depth,  # levels of the tree
    chunks,
    H: tl.constexpr,
    BT: tl.constexpr,
    BLOCK: tl.constexpr,
    VARLEN: tl.constexpr,
):
    """The gradient of a token's log decay is what flows across it: from writers before it to readers from it on. Of a pair of
    siblings on a level, that is what the readers behind it take if the token lies among the readers, and what the writers
    before it give if it lies among the writers. Each is a sum over part of one node, so that rounding does not pile up."""
    chunk = tl.program_id(0)
    head = tl.program_id(1)
    start, left, position, count = place(table_ptr, chunk, tokens, per_row, BT, VARLEN)
    head_wide = head.to(tl.int64)
    flux_ptr += chunk - position
    read_by = reader_levels(position, count)
    if VARLEN:
        read_by = tl.where(left > 0, read_by, 0)
    offset = tl.arange(0, BLOCK)
    flow = tl.zeros([BLOCK], tl.float32)
    for level in range(depth):
        size = 1 << level
        first = position & ~(size - 1)
        reads = (position & size) != 0
        low = tl.where(reads, position + 1, first)
        high = tl.where(reads, tl.minimum(first + size, count), tl.where((read_by & size) != 0, position, first))
        at = flux_ptr + (head_wide + level * H) * chunks
        for block in range(low, high, BLOCK):
            flow += tl.load(at + block + offset, mask=block + offset < high, other=0.0)
    local = tl.arange(0, BT)
    across = tl.load(across_ptr + (chunk.to(tl.int64) * H + head) * BT + local) + tl.sum(flow, 0)
    at = ddecay_ptr + (start + local) * H + head
    tl.store(at, across.to(ddecay_ptr.dtype.element_ty), mask=local < left)
