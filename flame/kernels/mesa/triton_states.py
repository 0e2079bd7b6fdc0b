"""The key states before all chunks of a sequence: what each chunk adds, then the sums over chunks, in place."""

from __future__ import annotations

import triton
import triton.language as tl

from flame.kernels.linear_attention.triton_scalar import item_bounds, load_rows


@triton.jit
def chunk_updates(
    k_ptr,  # [T, H, K] contiguous
    beta_ptr,  # [T, H]
    sum_ptr,  # [T, H] fp32 log2 decays summed within chunks
    state_ptr,  # [chunks, H, K, K] fp32, sum over rows of b e^{G_C - G} k k^T
    total_ptr,  # [chunks, H] fp32, e^{G_C}
    starts_ptr,
    ends_ptr,
    tokens,
    segment,
    segments,
    H: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,  # columns and rows of a tile
    BT: tl.constexpr,
    VARLEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    item = tl.program_id(1) // H
    head = tl.program_id(1) % H
    start, length = item_bounds(starts_ptr, ends_ptr, item, tokens, segment, segments, VARLEN)
    slot = item.to(tl.int64) * H + head
    across = tl.cdiv(K, BK)
    left = (tl.program_id(0) // across) * BK + tl.arange(0, BK)
    right = (tl.program_id(0) % across) * BK + tl.arange(0, BK)
    local = tl.arange(0, BT)
    keep = local < length
    rows = local.to(tl.int64)
    at = (start + rows) * H + head
    last = tl.maximum(length, 1) - 1
    whole = tl.load(sum_ptr + (start + last) * H + head, mask=length > 0, other=0.0)
    decayed = tl.load(sum_ptr + at, mask=keep, other=0.0)
    beta = tl.load(beta_ptr + at, mask=keep, other=0.0).to(tl.float32)
    weight = tl.where(keep, tl.exp2(tl.where(keep, whole - decayed, 0.0)) * beta, 0.0)
    k_ptr += (start * H + head) * K
    b = load_rows(k_ptr, rows, H * K, left, keep, K, BK)
    c = load_rows(k_ptr, rows, H * K, right, keep, K, BK)
    c = (c * weight[:, None]).to(b.dtype)
    state = tl.dot(tl.trans(b), c, input_precision=PRECISION)
    cell = state_ptr + slot * K * K + left[:, None] * K + right[None, :]
    tl.store(cell, state, mask=(left < K)[:, None] & (right < K)[None, :])
    if tl.program_id(0) == 0:
        tl.store(total_ptr + slot, tl.exp2(whole))


@triton.jit
def sum_chunks(
    state_ptr,  # [chunks, H, CELLS] fp32: updates, replaced by the states before them
    total_ptr,  # [chunks, H] fp32
    initial_ptr,  # [N, H, CELLS] fp32
    final_ptr,  # [N, H, CELLS] fp32
    first_ptr,  # [N + 1] first chunk of each sequence, packed rows only
    segments,
    H: tl.constexpr,
    CELLS: tl.constexpr,
    BLOCK: tl.constexpr,
    VARLEN: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    STORE_FINAL: tl.constexpr,
):
    """Four chunks a turn, the next four being loaded meanwhile: one alone would wait for memory at every chunk."""
    sequence = tl.program_id(1) // H
    head = tl.program_id(1) % H
    cell = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = cell < CELLS
    at_sequence = (sequence.to(tl.int64) * H + head) * CELLS + cell
    carry = tl.zeros([BLOCK], tl.float32)
    if HAS_INITIAL:
        carry = tl.load(initial_ptr + at_sequence, mask=keep, other=0.0)
    if VARLEN:
        first = tl.load(first_ptr + sequence)
        count = tl.load(first_ptr + sequence + 1) - first
    else:
        first = sequence * segments
        count = tl.full([], 0, tl.int32) + segments
    STEP: tl.constexpr = H * CELLS
    state_ptr += (first.to(tl.int64) * H + head) * CELLS + cell
    total_ptr += first.to(tl.int64) * H + head
    a = tl.load(state_ptr, mask=cell < tl.where(count > 0, CELLS, 0), other=0.0)
    b = tl.load(state_ptr + STEP, mask=cell < tl.where(count > 1, CELLS, 0), other=0.0)
    c = tl.load(state_ptr + 2 * STEP, mask=cell < tl.where(count > 2, CELLS, 0), other=0.0)
    d = tl.load(state_ptr + 3 * STEP, mask=cell < tl.where(count > 3, CELLS, 0), other=0.0)
    left = count
    for _ in range(0, count, 4):
        factor_a = tl.load(total_ptr)
        factor_b = tl.where(left > 1, tl.load(total_ptr + tl.minimum(1, left - 1) * H), 1.0)
        factor_c = tl.where(left > 2, tl.load(total_ptr + tl.minimum(2, left - 1) * H), 1.0)
        factor_d = tl.where(left > 3, tl.load(total_ptr + tl.minimum(3, left - 1) * H), 1.0)
        next_a = tl.load(state_ptr + 4 * STEP, mask=cell < tl.where(left > 4, CELLS, 0), other=0.0)
        next_b = tl.load(state_ptr + 5 * STEP, mask=cell < tl.where(left > 5, CELLS, 0), other=0.0)
        next_c = tl.load(state_ptr + 6 * STEP, mask=cell < tl.where(left > 6, CELLS, 0), other=0.0)
        next_d = tl.load(state_ptr + 7 * STEP, mask=cell < tl.where(left > 7, CELLS, 0), other=0.0)
        tl.store(state_ptr, carry, mask=keep)
        carry = carry * factor_a + a
        tl.store(state_ptr + STEP, carry, mask=cell < tl.where(left > 1, CELLS, 0))
        carry = carry * factor_b + b
        tl.store(state_ptr + 2 * STEP, carry, mask=cell < tl.where(left > 2, CELLS, 0))
        carry = carry * factor_c + c
        tl.store(state_ptr + 3 * STEP, carry, mask=cell < tl.where(left > 3, CELLS, 0))
        carry = carry * factor_d + d
        a, b, c, d = next_a, next_b, next_c, next_d
        state_ptr += 4 * STEP
        total_ptr += 4 * H
        left -= 4
    if STORE_FINAL:
        tl.store(final_ptr + at_sequence, carry, mask=keep)
