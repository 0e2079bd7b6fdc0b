# ruff: noqa: SIM102 (compile-time and run-time conditions nest; they do not join with `and`)
"""The sweep of `triton_scalar` for a decay per channel: on the summed index D, or on the output's index E (OUTER).

Each chunk takes one of two ways, both exact. Where no channel decays by more than 2^-LIMIT over the chunk, the weight
``exp(L_i - L_j)`` is split into a factor of row i and one of row j, and the chunk costs as much as a scalar decay.
Otherwise the second factor could overflow, and the chunk is halved again and again: rows of a right half meet rows of the
left half through the pivot between them, where both exponents are <= 0, so six masked products cover 64 rows.
The reader of a pair (q's side) uses the decay before its own row when there is a BONUS; the writer (k's side) the decay
after it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flame.kernels.linear_attention.triton_scalar import LOG2E, item_bounds, load_rows, state_offsets

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
def level_mask(half: tl.constexpr, BT: tl.constexpr, REVERSE: tl.constexpr):
    """Pairs whose reader lies in the right half and whose writer in the left half of one block."""
    local = tl.arange(0, BT)
    right = (local // half) % 2 == 1
    block = local // (2 * half)
    same = block[:, None] == block[None, :]
    if REVERSE:
        return same & (right[:, None] == 0) & right[None, :]
    return same & right[:, None] & (right[None, :] == 0)


@triton.jit
def vector_sweep(
    a_ptr,  # [T, HA, D]
    b_ptr,  # [T, HB, D]
    c_ptr,  # [T, HC, E]
    x_ptr,  # [T, HX, E]
    y_ptr,  # [T, H, E]
    decay_ptr,  # [T, HG, D], or [T, HG, E] when OUTER
    bonus_ptr,  # [H, D], or [H, E] when OUTER
    initial_ptr,  # [items, H, K, V] fp32
    final_ptr,  # [items, H, K, V] fp32
    anchor_ptr,  # [anchors, H, D, E]
    anchor_base_ptr,  # [items]
    product_ptr,  # [T, H, E] fp32 x * y, forward
    ddecay_ptr,  # [T, H, E], reverse
    dbonus_ptr,  # [items, H, E] fp32, forward
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
    stride_ct,
    stride_ch,
    stride_xt,
    stride_xh,
    H: tl.constexpr,
    GROUP_A: tl.constexpr,
    GROUP_B: tl.constexpr,
    GROUP_C: tl.constexpr,
    GROUP_X: tl.constexpr,
    GROUP_G: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
    BT: tl.constexpr,
    LEVELS: tl.constexpr,
    OUTER: tl.constexpr,
    BONUS: tl.constexpr,
    REVERSE: tl.constexpr,
    VARLEN: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    STORE_FINAL: tl.constexpr,
    STORE_Y: tl.constexpr,
    DECAY_GRADIENT: tl.constexpr,
    ANCHOR: tl.constexpr,
    PRECISION: tl.constexpr,
    DOT: tl.constexpr,
):
    tile = tl.program_id(0)
    item = tl.program_id(1) // H
    head = tl.program_id(1) % H
    start, length = item_bounds(starts_ptr, ends_ptr, item, tokens, segment, segments, VARLEN)
    slot = (item.to(tl.int64) * H + head) * D * E
    d_index = tl.arange(0, BD)
    e_index = tile * BE + tl.arange(0, BE)
    in_e = e_index < E
    in_state = (d_index < D)[:, None] & in_e[None, :]
    cell = state_offsets(d_index, e_index, D, E, TRANSPOSED)
    state = tl.zeros([BD, BE], tl.float32)
    if HAS_INITIAL:
        state = tl.load(initial_ptr + slot + cell, mask=in_state, other=0.0)
        if REVERSE:
            state = state / scale

    HG: tl.constexpr = H // GROUP_G
    WIDTH: tl.constexpr = E if OUTER else D
    a_ptr += start * stride_at + (head // GROUP_A) * stride_ah
    b_ptr += start * stride_bt + (head // GROUP_B) * stride_bh
    c_ptr += start * stride_ct + (head // GROUP_C) * stride_ch
    decay_ptr += (start * HG + head // GROUP_G) * WIDTH
    out_offset = (start * H + head) * E
    if BONUS:
        if OUTER:
            bonus = tl.load(bonus_ptr + head * E + e_index, mask=in_e, other=0.0).to(tl.float32)
            dbonus = tl.zeros([BE], tl.float32)
        else:
            bonus = tl.load(bonus_ptr + head * D + d_index, mask=d_index < D, other=0.0).to(tl.float32)
    if DECAY_GRADIENT:
        x_ptr += start * stride_xt + (head // GROUP_X) * stride_xh
        if VARLEN:
            anchor = tl.load(anchor_base_ptr + item).to(tl.int64)
        else:
            anchor = item.to(tl.int64) * tl.cdiv(segment, ANCHOR)
        anchor_ptr += (anchor * H + head) * D * E
        anchor_cell = d_index[:, None] * E + e_index[None, :]
        carry = tl.zeros([BE], tl.float32)

    local = tl.arange(0, BT)
    diagonal = local[:, None] == local[None, :]
    if REVERSE:
        keep_pair = local[:, None] <= local[None, :]
    else:
        keep_pair = local[:, None] >= local[None, :]
    if BONUS:
        keep_pair = keep_pair & (diagonal == 0)
    chunks = tl.cdiv(length, BT)
    for step in range(chunks):
        chunk = chunks - 1 - step if REVERSE else step
        rows = chunk * BT + local
        keep = rows < length
        rows = rows.to(tl.int64)
        a = load_rows(a_ptr, rows, stride_at, d_index, keep, D, BD).to(DOT)
        b = load_rows(b_ptr, rows, stride_bt, d_index, keep, D, BD).to(DOT)
        c = load_rows(c_ptr, rows, stride_ct, e_index, keep, E, BE).to(DOT)
        if OUTER:
            log = load_rows(decay_ptr, rows, HG * E, e_index, keep, E, BE).to(tl.float32) * LOG2E
        else:
            log = load_rows(decay_ptr, rows, HG * D, d_index, keep, D, BD).to(tl.float32) * LOG2E
        decayed = tl.cumsum(log, 0)
        whole = tl.sum(log, 0)
        if BONUS:
            reader = tl.exp2(decayed - log)
        else:
            reader = tl.exp2(decayed)
        writer = tl.exp2(whole[None, :] - decayed)
        weak = tl.min(whole, 0) > -LIMIT
        if DECAY_GRADIENT:
            at_anchor = anchor_ptr + (chunk * BT // ANCHOR).to(tl.int64) * (H * D * E) + anchor_cell
            at_edge = ((chunk + 1) * BT % ANCHOR == 0) | (chunk == chunks - 1)
            if REVERSE:
                # As in `scalar_sweep`: the suffix sum restarts from <S, dS>, `state` still being that after the chunk.
                if at_edge:
                    anchored = tl.load(at_anchor, mask=in_state, other=0.0).to(tl.float32)
                    carry = tl.sum(anchored * state, 0) * scale

        if OUTER:
            scores = tl.dot(a, tl.trans(b), input_precision=PRECISION)
            met = tl.sum(tl.where(diagonal, scores, 0.0), 1)
            inter = tl.dot(a, state.to(DOT), input_precision=PRECISION)
            if REVERSE:
                column = c * reader
                row_factor = writer
            else:
                column = c * writer
                row_factor = reader
            if DECAY_GRADIENT:
                x = load_rows(x_ptr, rows, stride_xt, e_index, keep, E, BE).to(tl.float32)
            if weak:
                unscale = tl.exp2(-whole)[None, :]
                near = (column * unscale).to(DOT)
                y = tl.dot(tl.where(keep_pair, scores, 0.0).to(DOT), near, inter, input_precision=PRECISION)
                if DECAY_GRADIENT:
                    # x is rounded as the other sweep rounds it for its dot: then the two products of a pair are equal
                    # and cancel in the suffix sum, where their rounding errors would otherwise pile up.
                    product = (x * row_factor * unscale).to(DOT).to(tl.float32) * tl.exp2(whole)[None, :] * y
                y = y * row_factor
            else:
                y = inter * row_factor
                if DECAY_GRADIENT:
                    product = x * y
                if not BONUS:
                    own = met[:, None] * c
                    y += own
                    if DECAY_GRADIENT:
                        product += x * own
                for level in tl.static_range(LEVELS):
                    factor = level_factor(log, 1 << level, BT, BE, BONUS)
                    part = tl.where(level_mask(1 << level, BT, REVERSE), scores, 0.0).to(DOT)
                    part = tl.dot(part, (c * factor).to(DOT), input_precision=PRECISION)
                    y += part * factor
                    if DECAY_GRADIENT:
                        product += (x * factor).to(DOT).to(tl.float32) * part
            y = y * scale
            state = tl.dot(tl.trans(b), column.to(DOT), state * tl.exp2(whole)[None, :], input_precision=PRECISION)
        else:
            if REVERSE:
                row = a * writer
                column = (b * reader).to(DOT)
            else:
                row = a * reader
                column = (b * writer).to(DOT)
            if weak:
                near = (row * tl.exp2(-whole)[None, :]).to(DOT)
                scores = tl.dot(near, tl.trans(column), input_precision=PRECISION)
                scores = tl.where(keep_pair, scores, 0.0)
            else:
                scores = tl.zeros([BT, BT], tl.float32)
                if not BONUS:
                    scores += tl.where(diagonal, tl.sum(a.to(tl.float32) * b.to(tl.float32), 1)[:, None], 0.0)
                for level in tl.static_range(LEVELS):
                    factor = level_factor(log, 1 << level, BT, BD, BONUS)
                    part = tl.dot((a * factor).to(DOT), tl.trans((b * factor).to(DOT)), input_precision=PRECISION)
                    scores += tl.where(level_mask(1 << level, BT, REVERSE), part, 0.0)
            if BONUS:
                met = tl.sum(a.to(tl.float32) * b.to(tl.float32) * bonus[None, :], 1)
                scores += tl.where(diagonal, met[:, None], 0.0)
            y = tl.dot(row.to(DOT), state.to(DOT), input_precision=PRECISION)
            y = tl.dot(scores.to(DOT), c, y, input_precision=PRECISION) * scale
            state = tl.dot(tl.trans(column), c, state * tl.exp2(whole)[:, None], input_precision=PRECISION)

        at_y = out_offset + rows[:, None] * (H * E) + e_index[None, :]
        inside = keep[:, None] & in_e[None, :]
        if DECAY_GRADIENT:
            product = product * scale
            if REVERSE:
                read_product = tl.load(product_ptr + at_y, mask=inside, other=0.0)
                product = read_product - product
                total = tl.sum(product, 0)
                gradient = carry[None, :] + total[None, :] - tl.cumsum(product, 0) + product
                if BONUS:
                    gradient -= read_product
                tl.store(ddecay_ptr + at_y, gradient.to(ddecay_ptr.dtype.element_ty), mask=inside)
                carry += total
            else:
                tl.store(product_ptr + at_y, product, mask=inside)
                if at_edge:
                    tl.store(at_anchor, state.to(anchor_ptr.dtype.element_ty), mask=in_state)
        if BONUS and OUTER:
            # The token's own term, outside every decay; its coefficient is v . do here.
            y += met[:, None] * bonus[None, :] * c * scale
            if DECAY_GRADIENT:
                if not REVERSE:
                    dbonus += tl.sum(met[:, None] * x * c, 0) * scale
        if STORE_Y:
            tl.store(y_ptr + at_y, y.to(y_ptr.dtype.element_ty), mask=inside)

    if BONUS and OUTER and DECAY_GRADIENT and not REVERSE:
        tl.store(dbonus_ptr + (item.to(tl.int64) * H + head) * E + e_index, dbonus, mask=in_e)
    if STORE_FINAL:
        if REVERSE:
            state = state * scale
        tl.store(final_ptr + slot + cell, state, mask=in_state)
