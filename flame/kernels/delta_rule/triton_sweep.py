# ruff: noqa: SIM102 (compile-time and run-time conditions nest; they do not join with `and`)
"""Sweeps over the chunks of an item (a sequence or a segment of one), the state or its gradient kept in registers.

Per chunk, with G the log decay since its start, r that of the erase read, T the inverted system and P the scores:

    X = V - e^r (A S),  W = T (beta X),  O = e^G (Q S) + P W,  S' = e^Gc S + K^T (e^(Gc - G) W)
    dW = P^T dO + e^(Gc - G) (K dS'),  dU = T^T dW,  dS = e^Gc dS' + Q^T (e^G dO) - A^T (beta e^r dU)

A scalar decay and the rows' lengths are factors of products' rows, so Q, K and A are read raw. A decay per key channel is
not: then Q, K and A come multiplied by theirs (`triton_keys`), and `factor` holds e^Gc.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flame.kernels.delta_rule.triton_prepare import (
    A_LENGTH,
    BETA,
    K_LENGTH,
    KEY,
    Q_LENGTH,
    READ,
    ROWS,
    SCALAR,
    TOTAL,
)

FIRST = tl.constexpr(1)  # the item opens its sequence
LAST = tl.constexpr(2)  # it ends its sequence


@triton.jit
def load_rows(ptr, rows, stride, columns, keep, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Tile [C, PADDED] of a row-major matrix; 0 outside."""
    mask = keep[:, None]
    if PADDED != WIDTH:
        mask = mask & (columns < WIDTH)[None, :]
    return tl.load(ptr + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def forward_sweep(
    q_ptr,
    k_ptr,
    v_ptr,
    a_ptr,
    vector_ptr,
    inverse_ptr,
    score_ptr,
    factor_ptr,  # [chunks, H, K] fp32 e^Gc, with a decay per key channel
    item_ptr,  # [items, 5], see plan.Plan
    initial_ptr,  # [items, H, K, V] fp32
    final_ptr,  # [N, H, K, V] fp32; with MAP [items, H, K, V + K]
    o_ptr,  # [T, H, V]
    state_ptr,  # [chunks, H, K, V] states before the chunks
    write_ptr,  # [T, H, V] W
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_at,
    stride_ah,
    stride_vt,
    stride_vh,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    DECAY: tl.constexpr,
    ERASE: tl.constexpr,
    EXCLUSIVE: tl.constexpr,
    OUTPUT: tl.constexpr,  # store O
    STATES: tl.constexpr,  # store the states before the chunks, and W
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
    dtype: tl.constexpr = k_ptr.dtype.element_ty
    row = tl.arange(0, C)
    channel = tl.arange(0, BK)
    column = tile * BV + tl.arange(0, BV)
    inside = column < V
    k_ptr += (head // GROUP) * stride_kh
    q_ptr += (head // GROUP) * stride_qh
    a_ptr += (head // GROUP) * stride_ah
    v_ptr += head * stride_vh
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
        vector = vector_ptr + block * (ROWS * C) + row
        k = load_rows(k_ptr, rows, stride_kt, channel, keep, K, BK)
        v = tl.load(
            v_ptr + rows[:, None] * stride_vt + column[None, :], mask=keep[:, None] & inside[None, :], other=0.0
        )
        inverse = tl.load(inverse_ptr + block * (C * C) + square)
        beta = tl.load(vector + BETA * C)
        if DECAY != KEY:
            to_state = tl.load(vector + K_LENGTH * C)
            from_state = tl.load(vector + A_LENGTH * C) if ERASE else to_state
        if DECAY == SCALAR:
            total = tl.load(vector + TOTAL * C)
            whole = tl.load(vector_ptr + block * (ROWS * C) + TOTAL * C + C - 1)
            read = tl.load(vector + READ * C) if EXCLUSIVE else total
            to_state = to_state * tl.exp2(whole - total)
            from_state = from_state * tl.exp2(read)
        low = state.to(dtype)
        if STATES:
            tl.store(state_ptr + block * (K * V) + cell, low, mask=in_state)
        if ERASE:
            erase = load_rows(a_ptr, rows, stride_at, channel, keep, K, BK)
        else:
            erase = k
        held = tl.dot(erase, low, input_precision=DOT)
        if DECAY != KEY:
            held = from_state[:, None] * held
        error = (v.to(tl.float32) - held) * beta[:, None]
        write = tl.dot(inverse, error.to(dtype), input_precision=DOT)
        at_value = (rows[:, None] * H + head) * V + column[None, :]
        if STATES:
            tl.store(write_ptr + at_value, write.to(dtype), mask=keep[:, None] & inside[None, :])
        if OUTPUT:
            q = load_rows(q_ptr, rows, stride_qt, channel, keep, K, BK)
            scores = tl.load(score_ptr + block * (C * C) + square)
            o = tl.dot(q, low, input_precision=DOT)
            if DECAY != KEY:
                q_factor = tl.load(vector + Q_LENGTH * C)
                if DECAY == SCALAR:
                    q_factor = q_factor * tl.exp2(total)
                o = o * q_factor[:, None]
            o = tl.dot(scores, write.to(dtype), o, input_precision=DOT)
            tl.store(o_ptr + at_value, o.to(o_ptr.dtype.element_ty), mask=keep[:, None] & inside[None, :])
        if DECAY != KEY:
            write = write * to_state[:, None]
        write = write.to(dtype)
        if DECAY == SCALAR:
            state = state * tl.exp2(whole)
        if DECAY == KEY:
            factor = tl.load(factor_ptr + block * K + channel, mask=channel < K, other=0.0)
            state = state * factor[:, None]
        state = tl.dot(tl.trans(k), write, state, input_precision=DOT)
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
def reverse_sweep(
    q_ptr,
    k_ptr,
    a_ptr,
    do_ptr,  # [T, H, V]
    vector_ptr,
    inverse_ptr,
    score_ptr,
    factor_ptr,  # [chunks, H, K] fp32 e^Gc, with a decay per key channel
    item_ptr,
    closing_ptr,  # [items, H, K, V] fp32, gradient of the state after the item
    opening_ptr,  # [N, H, K, V] fp32, that of the state before the sequence; with MAP [items, H, K, V] before the item
    dstate_ptr,  # [chunks, H, K, V] gradient of the states after the chunks
    du_ptr,  # [T, H, V] dU
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_at,
    stride_ah,
    stride_ot,
    stride_oh,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    DECAY: tl.constexpr,
    ERASE: tl.constexpr,
    EXCLUSIVE: tl.constexpr,
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
    dtype: tl.constexpr = k_ptr.dtype.element_ty
    row = tl.arange(0, C)
    channel = tl.arange(0, BK)
    column = tile * BV + tl.arange(0, BV)
    inside = column < V
    k_ptr += (head // GROUP) * stride_kh
    q_ptr += (head // GROUP) * stride_qh
    a_ptr += (head // GROUP) * stride_ah
    do_ptr += head * stride_oh
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
        vector = vector_ptr + block * (ROWS * C) + row
        q = load_rows(q_ptr, rows, stride_qt, channel, keep, K, BK)
        k = load_rows(k_ptr, rows, stride_kt, channel, keep, K, BK)
        in_rows = keep[:, None] & inside[None, :]
        do = tl.load(do_ptr + rows[:, None] * stride_ot + column[None, :], mask=in_rows, other=0.0)
        inverse = tl.load(inverse_ptr + block * (C * C) + square)
        scores = tl.load(score_ptr + block * (C * C) + square)
        beta = tl.load(vector + BETA * C)
        taken_factor = -beta
        if DECAY != KEY:
            q_factor = tl.load(vector + Q_LENGTH * C)
            to_state = tl.load(vector + K_LENGTH * C)
            from_state = tl.load(vector + A_LENGTH * C) if ERASE else to_state
        if DECAY == SCALAR:
            total = tl.load(vector + TOTAL * C)
            whole = tl.load(vector_ptr + block * (ROWS * C) + TOTAL * C + C - 1)
            read = tl.load(vector + READ * C) if EXCLUSIVE else total
            to_state = to_state * tl.exp2(whole - total)
            from_state = from_state * tl.exp2(read)
            q_factor = q_factor * tl.exp2(total)
        if DECAY != KEY:
            taken_factor = taken_factor * from_state
        low = dstate.to(dtype)
        if STORE:
            tl.store(dstate_ptr + block * (K * V) + cell, low, mask=in_state)
        dwrite = tl.dot(k, low, input_precision=DOT)
        if DECAY != KEY:
            dwrite = dwrite * to_state[:, None]
        dwrite = tl.dot(tl.trans(scores), do, dwrite, input_precision=DOT)
        du = tl.dot(tl.trans(inverse), dwrite.to(dtype), input_precision=DOT)
        if STORE:
            at_value = (rows[:, None] * H + head) * V + column[None, :]
            tl.store(du_ptr + at_value, du.to(dtype), mask=in_rows)
        if DECAY == SCALAR:
            dstate = dstate * tl.exp2(whole)
        if DECAY == KEY:
            factor = tl.load(factor_ptr + block * K + channel, mask=channel < K, other=0.0)
            dstate = dstate * factor[:, None]
            seen = do
        else:
            seen = (do.to(tl.float32) * q_factor[:, None]).to(dtype)
        dstate = tl.dot(tl.trans(q), seen, dstate, input_precision=DOT)
        taken = (du * taken_factor[:, None]).to(dtype)
        if ERASE:
            erase = load_rows(a_ptr, rows, stride_at, channel, keep, K, BK)
            dstate = tl.dot(tl.trans(erase), taken, dstate, input_precision=DOT)
        else:
            dstate = tl.dot(tl.trans(k), taken, dstate, input_precision=DOT)

    if MAP:
        tl.store(opening_ptr + slot + cell, dstate, mask=in_state)
    if HAS_OPENING:
        if (ends == FIRST) | (ends == FIRST + LAST):
            slot = (sequence.to(tl.int64) * H + head) * K * V
            tl.store(opening_ptr + slot + cell, dstate, mask=in_state)


@triton.jit
def merge_segments(
    map_ptr,  # [items, H, K, V + K] fp32: B | M
    change_ptr,  # [items, H, K, stride] fp32: B in its first V columns (forward), dB (REVERSE)
    first_ptr,  # [N + 1] first item of every sequence
    initial_ptr,  # [N, H, K, V] fp32: state before the sequence, or the gradient after it (REVERSE)
    opening_ptr,  # [items, H, K, V] fp32, written: state before the item, or the gradient after it (REVERSE)
    change_stride,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    PART: tl.constexpr,  # rows of the state in a tile
    REVERSE: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile = tl.program_id(0)
    sequence, head = tl.program_id(1) // H, tl.program_id(1) % H
    first = tl.load(first_ptr + sequence)
    count = tl.load(first_ptr + sequence + 1) - first
    channel = tl.arange(0, PART)
    column = tile * BV + tl.arange(0, BV)
    inside = column < V
    PARTS: tl.constexpr = BK // PART
    at_sequence = (sequence.to(tl.int64) * H + head) * K * V
    carry = ()
    for i in tl.static_range(PARTS):
        row = i * PART + channel
        part = tl.zeros([PART, BV], tl.float32)
        if HAS_INITIAL:
            mask = (row < K)[:, None] & inside[None, :]
            part = tl.load(initial_ptr + at_sequence + row[:, None] * V + column[None, :], mask=mask, other=0.0)
        carry = carry + (part,)
    for step in range(count - 1):
        item = first + count - 1 - step if REVERSE else first + step
        slot = item.to(tl.int64) * H + head
        transition_ptr = map_ptr + slot * K * (V + K) + V
        after = ()
        for i in tl.static_range(PARTS):
            row = i * PART + channel
            mask = (row < K)[:, None] & inside[None, :]
            tl.store(opening_ptr + slot * K * V + row[:, None] * V + column[None, :], carry[i], mask=mask)
            change = change_ptr + slot * K * change_stride + row[:, None] * change_stride + column[None, :]
            part = tl.load(change, mask=mask, other=0.0)
            for j in tl.static_range(PARTS):
                other = j * PART + channel
                if REVERSE:
                    at = row[:, None] + other[None, :] * (V + K)
                else:
                    at = row[:, None] * (V + K) + other[None, :]
                transition = tl.load(transition_ptr + at, mask=(row < K)[:, None] & (other < K)[None, :], other=0.0)
                part = tl.dot(transition, carry[j], part, input_precision=PRECISION)
            after = after + (part,)
        carry = after
    item = first if REVERSE else first + count - 1
    slot = item.to(tl.int64) * H + head
    for i in tl.static_range(PARTS):
        row = i * PART + channel
        mask = (row < K)[:, None] & inside[None, :]
        tl.store(opening_ptr + slot * K * V + row[:, None] * V + column[None, :], carry[i], mask=mask)
