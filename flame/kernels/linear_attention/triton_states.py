# ruff: noqa: SIM102 (compile-time and run-time conditions nest; they do not join with `and`)
"""Boundary states: when heads alone do not fill the GPU, items are cut in segments whose opening states come from here.

`segment_states` writes what each segment adds to the state from zero, all segments at once; `scan_segments` turns these,
in place, into the state at each segment's opening (forward) or the gradient at its end (REVERSE).
"""

from __future__ import annotations

import triton
import triton.language as tl

from flame.kernels.linear_attention.triton_scalar import LOG2E, item_bounds, load_rows, state_offsets


@triton.jit
def segment_states(
    b_ptr,  # [T, HB, K] k, or q in REVERSE
    c_ptr,  # [T, HC, V] v, or do in REVERSE
    decay_ptr,  # [HG], [T, HG] from `chunk_sums`, or [chunks, H, K] factors
    state_ptr,  # [items, H, K, V] fp32
    total_ptr,  # [items, H, 1 | K] fp32, what the segment multiplies the state by
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
    PRECISION: tl.constexpr,
):
    tile_k = tl.program_id(0) // tl.cdiv(V, BV)
    tile_v = tl.program_id(0) % tl.cdiv(V, BV)
    item = tl.program_id(1) // H
    head = tl.program_id(1) % H
    start, length = item_bounds(starts_ptr, ends_ptr, item, tokens, segment, segments, VARLEN)
    DOT: tl.constexpr = b_ptr.dtype.element_ty
    k_index = tile_k * BK + tl.arange(0, BK)
    v_index = tile_v * BV + tl.arange(0, BV)
    state = tl.zeros([BK, BV], tl.float32)
    HG: tl.constexpr = H // GROUP_G
    b_ptr += start * stride_bt + (head // GROUP_B) * stride_bh
    c_ptr += start * stride_ct + (head // GROUP_C) * stride_ch
    if DECAY == "head":
        rate = tl.load(decay_ptr + head // GROUP_G).to(tl.float32) * LOG2E
    if DECAY == "scalar":
        decay_ptr += start * HG + head // GROUP_G
    if DECAY == "head" or DECAY == "scalar":
        total = tl.full([], 1.0, tl.float32)
    if DECAY == "vector":
        decay_ptr += ((start // BT + item) * H + head) * K
        total = tl.full([BK], 1.0, tl.float32)

    local = tl.arange(0, BT)
    chunks = tl.cdiv(length, BT)
    for step in range(chunks):
        chunk = chunks - 1 - step if REVERSE else step
        rows = chunk * BT + local
        keep = rows < length
        rows = rows.to(tl.int64)
        b = load_rows(b_ptr, rows, stride_bt, k_index, keep, K, BK)
        c = load_rows(c_ptr, rows, stride_ct, v_index, keep, V, BV).to(DOT)
        if DECAY == "head":
            count = tl.minimum(length - chunk * BT, BT)
            decayed = rate * tl.minimum(local + 1, count).to(tl.float32)
            whole = rate * count.to(tl.float32)
        if DECAY == "scalar":
            decayed = tl.load(decay_ptr + rows * HG, mask=keep, other=0.0)
            last = tl.minimum(chunk * BT + BT, length) - 1
            whole = tl.load(decay_ptr + last.to(tl.int64) * HG)
        if DECAY == "head" or DECAY == "scalar":
            weight = tl.exp2(decayed) if REVERSE else tl.exp2(whole - decayed)
            c = (c * weight[:, None]).to(DOT)
            factor = tl.exp2(whole)
            state = state * factor
            total *= factor
        if DECAY == "vector":
            factor = tl.load(decay_ptr + chunk.to(tl.int64) * (H * K) + k_index, mask=k_index < K, other=0.0)
            state = state * factor[:, None]
            total *= factor
        state = tl.dot(tl.trans(b), c, state, input_precision=PRECISION)

    slot = item.to(tl.int64) * H + head
    if REVERSE:
        state = state * scale
    cell = state_offsets(k_index, v_index, K, V, False)
    tl.store(state_ptr + slot * K * V + cell, state, mask=(k_index < K)[:, None] & (v_index < V)[None, :])
    if DECAY == "head" or DECAY == "scalar":
        if tl.program_id(0) == 0:
            tl.store(total_ptr + slot, total)
    if DECAY == "vector":
        if tile_v == 0:
            tl.store(total_ptr + slot * K + k_index, total, mask=k_index < K)


@triton.jit
def scan_segments(
    state_ptr,  # [items, H, K * V] fp32, in place
    total_ptr,
    initial_ptr,  # [N, H, K * V] fp32
    final_ptr,  # [N, H, K * V] fp32
    first_ptr,  # [N + 1] first item of each sequence, packed rows only
    segments,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    DECAY: tl.constexpr,
    REVERSE: tl.constexpr,
    VARLEN: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    STORE_FINAL: tl.constexpr,
):
    sequence = tl.program_id(1) // H
    head = tl.program_id(1) % H
    cell = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = cell < K * V
    at_sequence = (sequence.to(tl.int64) * H + head) * K * V + cell
    carry = tl.zeros([BLOCK], tl.float32)
    if HAS_INITIAL:
        carry = tl.load(initial_ptr + at_sequence, mask=keep, other=0.0)
    if VARLEN:
        first = tl.load(first_ptr + sequence)
        count = tl.load(first_ptr + sequence + 1) - first
    else:
        first = sequence * segments
        count = segments
    for step in range(count):
        item = first + count - 1 - step if REVERSE else first + step
        slot = item.to(tl.int64) * H + head
        update = tl.load(state_ptr + slot * K * V + cell, mask=keep, other=0.0)
        tl.store(state_ptr + slot * K * V + cell, carry, mask=keep)
        if DECAY == "head" or DECAY == "scalar":
            carry = carry * tl.load(total_ptr + slot)
        if DECAY == "vector":
            carry = carry * tl.load(total_ptr + slot * K + cell // V, mask=keep, other=0.0)
        carry += update
    if STORE_FINAL:
        tl.store(final_ptr + at_sequence, carry, mask=keep)
