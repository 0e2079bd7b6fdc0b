"""What the tree's nodes hold: states forward, their gradients backward.

`node_states` walks runs of chunks and merges nodes up to the run's size; `merge_runs` merges runs. `node_gradients` sums over
a node's readers, the chunks of its right sibling. Both fill the same slots: see `triton_tree`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flame.kernels.linear_attention.triton_scalar import load_rows, load_state, state_offsets, store_state
from flame.kernels.log_linear_attention.triton_tree import exponent, place


@triton.jit(do_not_specialize=["tokens", "per_row"])
def node_states(
    k_ptr,  # [T, HK, K]
    v_ptr,  # [T, HV, V]
    sum_ptr,  # [chunks, H, BT]
    total_ptr,  # [2 chunks, H]
    state_ptr,  # [chunks, H, K, V]
    table_ptr,
    tokens,
    per_row,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    H: tl.constexpr,
    GROUP_K: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BT: tl.constexpr,
    RUN: tl.constexpr,
    LEVELS: tl.constexpr,  # log2 of RUN
    VARLEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head = tl.program_id(1)
    tiles: tl.constexpr = (V + BV - 1) // BV
    chunk = tl.program_id(0)
    if not VARLEN:
        runs = tl.cdiv(per_row, RUN)
        chunk = (chunk // runs) * per_row + (chunk % runs) * RUN
    start, left, position, count = place(table_ptr, chunk, tokens, per_row, BT, VARLEN)
    steps = tl.minimum(count - position, RUN)
    if VARLEN:
        steps = tl.where((position % RUN == 0) & (left > 0), steps, 0)
    DOT: tl.constexpr = k_ptr.dtype.element_ty
    k_index = (tl.program_id(2) // tiles) * BK + tl.arange(0, BK)
    v_index = (tl.program_id(2) % tiles) * BV + tl.arange(0, BV)
    cell = state_offsets(k_index, v_index, K, V, False)
    k_ptr += start * stride_kt + (head // GROUP_K) * stride_kh
    v_ptr += start * stride_vt + head * stride_vh
    slot = chunk.to(tl.int64) * H + head
    sum_ptr += slot * BT
    total_ptr += chunk.to(tl.int64) * 2 * H + head
    local = tl.arange(0, BT)
    for step in range(steps):
        rows = step * BT + local
        keep = rows < left
        rows = rows.to(tl.int64)
        k = load_rows(k_ptr, rows, stride_kt, k_index, keep, K, BK)
        v = load_rows(v_ptr, rows, stride_vt, v_index, keep, V, BV)
        decayed = tl.load(sum_ptr + step * (H * BT) + local)
        whole = tl.load(total_ptr + step * (2 * H))
        column = (v * tl.exp2(whole - decayed)[:, None]).to(DOT)
        state = tl.dot(tl.trans(k), column, input_precision=PRECISION)
        # Runs are aligned, so the run's own trailing ones are the position's, up to the run's size.
        for level in tl.static_range(LEVELS):
            if ((step + 1) & ((2 << level) - 1)) == 0:
                tl.debug_barrier()
                since = tl.load(total_ptr + (2 * step + 1 - (1 << level)) * H)
                at = state_ptr + (slot + (step - (1 << level)) * H) * (K * V)
                other = load_state(at, cell, k_index, v_index, K, V, BK, BV)
                state += other.to(tl.float32) * tl.exp2(since)
        at = state_ptr + (slot + step * H) * (K * V)
        store_state(at, cell, state, k_index, v_index, K, V, BK, BV)


@triton.jit(do_not_specialize=["per_row"])
def merge_runs(
    state_ptr,  # [chunks, H, K * V], whose nodes up to the size of a run are done
    total_ptr,  # [2 chunks, H]
    documents_ptr,
    per_row,
    H: tl.constexpr,
    CELLS: tl.constexpr,
    BLOCK: tl.constexpr,
    RUN: tl.constexpr,
    VARLEN: tl.constexpr,
):
    """A thread keeps its elements through all nodes, so that none waits for another."""
    document = tl.program_id(0) // H
    head = tl.program_id(0) % H
    if VARLEN:
        first = tl.load(documents_ptr + document * 2)
        count = tl.load(documents_ptr + document * 2 + 1)
    else:
        first = document * per_row
        count = per_row
    cell = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    keep = cell < CELLS
    first = first.to(tl.int64)
    state_ptr += (first * H + head) * CELLS + cell
    total_ptr += first * 2 * H + head
    for run in range(2, count // RUN + 1, 2):  # every second run ends a larger node
        end = run * RUN
        at = state_ptr + (first * 0 + end - 1) * (H * CELLS)
        state = tl.load(at, mask=keep, other=0.0).to(tl.float32)
        size = end * 0 + RUN
        while end & (2 * size - 1) == 0:
            since = tl.load(total_ptr + (first * 0 + 2 * end - size - 1) * H)
            other = tl.load(at - (first * 0 + size) * (H * CELLS), mask=keep, other=0.0).to(tl.float32)
            state += other * tl.exp2(since)
            size *= 2
        tl.store(at, state.to(state_ptr.dtype.element_ty), mask=keep)


@triton.jit
def by_falling_size(index, batch, per_row, depth):
    """Chunk number `index` when those that end large nodes come first, of `batch` rows of up to 2^depth - 1 chunks; surplus
    numbers give a row's last chunk, whose node nobody reads."""
    number = index // batch + 1
    group = exponent(number)  # 2^group nodes of one size
    last = (2 * (number - (1 << group)) + 1) * (1 << (depth - 1 - group)) - 1
    return (index % batch) * per_row + tl.minimum(last, per_row - 1)


@triton.jit(do_not_specialize=["tokens", "per_row", "batch", "depth"])
def node_gradients(
    q_ptr,  # [T, HQ, K]
    do_ptr,  # [T, H, V]
    weight_ptr,  # [T, H, L]
    sum_ptr,  # [chunks, H, BT]
    total_ptr,  # [2 chunks, H]
    gradient_ptr,  # [chunks, H, K, V], written where a node has readers
    table_ptr,
    order_ptr,  # [chunks] packed rows only: chunks by falling size of the node they end
    scale,
    tokens,
    per_row,
    batch,
    depth,
    stride_qt,
    stride_qh,
    stride_ot,
    stride_oh,
    H: tl.constexpr,
    L: tl.constexpr,
    GROUP_Q: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BT: tl.constexpr,
    INSIDE: tl.constexpr,  # levels inside a chunk
    VARLEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tiles: tl.constexpr = (V + BV - 1) // BV
    tile = tl.program_id(0) % (tiles * ((K + BK - 1) // BK))
    index = tl.program_id(0) // (tiles * ((K + BK - 1) // BK))
    head = index % H
    # Large nodes take long, so they come first.
    if VARLEN:
        chunk = tl.load(order_ptr + index // H)
    else:
        chunk = by_falling_size(index // H, batch, per_row, depth)
    start, left, position, count = place(table_ptr, chunk, tokens, per_row, BT, VARLEN)
    end = position + 1
    size = end & -end
    readers = tl.minimum(size, count - end)
    if VARLEN:
        readers = tl.where(left > 0, readers, 0)
    level = tl.minimum(INSIDE + exponent(size), L - 1)
    DOT: tl.constexpr = q_ptr.dtype.element_ty
    k_index = (tile // tiles) * BK + tl.arange(0, BK)
    v_index = (tile % tiles) * BV + tl.arange(0, BV)
    start += BT  # of the first reader, and what follows of it too
    left -= BT
    slot = chunk.to(tl.int64) * H + head
    q_ptr += start * stride_qt + (head // GROUP_Q) * stride_qh
    do_ptr += start * stride_ot + head * stride_oh
    weight_ptr += (start * H + head) * L + level
    sum_ptr += (slot + H) * BT
    total_ptr += (chunk.to(tl.int64) + 1) * 2 * H + head
    local = tl.arange(0, BT)
    gradient = tl.zeros([BK, BV], tl.float32)
    since = tl.zeros([], tl.float32)
    for step in range(readers):
        rows = step * BT + local
        keep = rows < left
        rows = rows.to(tl.int64)
        q = load_rows(q_ptr, rows, stride_qt, k_index, keep, K, BK)
        do = load_rows(do_ptr, rows, stride_ot, v_index, keep, V, BV)
        decayed = tl.load(sum_ptr + step * (H * BT) + local)
        weight = tl.load(weight_ptr + rows * (H * L), mask=keep, other=0.0).to(tl.float32)
        weight = weight * tl.exp2(decayed + since) * scale
        column = (do * weight[:, None]).to(DOT)
        gradient = tl.dot(tl.trans(q), column, gradient, input_precision=PRECISION)
        since += tl.load(total_ptr + step * (2 * H))
    if readers > 0:
        cell = state_offsets(k_index, v_index, K, V, False)
        store_state(gradient_ptr + slot * (K * V), cell, gradient, k_index, v_index, K, V, BK, BV)
