"""One sweep over time for no decay, a decay per head, and a decay per head and token.

A sweep computes, with a state S [D, E] that stays in registers in fp32,

    y_i = scale * sum_j w_ij (a_i . b_j) c_j        a, b [T, D]; c, y [T, E]

over rows j <= i (forward) or j >= i (REVERSE), where w_ij is the decay between the two. Forward, dq, dk and dv are all
sweeps of this one kernel (see `triton_passes`). E is tiled over programs; a program walks its item (a document, or a
segment of one) in chunks of BT rows. Nothing transposes an accumulator into another dot: on Hopper, Triton 3.4 to 3.7
miscompiles that.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def chunk_sums(
    decay_ptr,  # [T, HG] natural log
    sum_ptr,  # [T, HG] fp32, cumulative within each chunk of BT rows, log2
    starts_ptr,
    ends_ptr,
    tokens,
    segment,
    segments,
    HG: tl.constexpr,
    BH: tl.constexpr,
    BT: tl.constexpr,
    VARLEN: tl.constexpr,
):
    """Cumulative decays once for all sweeps: 4 bytes a token and head, where a scan in each chunk would stall them."""
    start, length = item_bounds(starts_ptr, ends_ptr, tl.program_id(1), tokens, segment, segments, VARLEN)
    heads = tl.program_id(2) * BH + tl.arange(0, BH)
    for chunk in range(tl.program_id(0), tl.cdiv(length, BT), tl.num_programs(0)):
        rows = chunk * BT + tl.arange(0, BT)
        keep = (rows < length)[:, None] & (heads < HG)[None, :]
        at = (start + rows)[:, None] * HG + heads[None, :]
        log = tl.load(decay_ptr + at, mask=keep, other=0.0).to(tl.float32) * LOG2E
        tl.store(sum_ptr + at, tl.cumsum(log, 0), mask=keep)


@triton.jit
def item_bounds(starts, ends, item, tokens, segment, segments, VARLEN: tl.constexpr):
    """First row and number of rows of an item. Packed: from the tables. Dense: segment item % segments of a batch row."""
    if VARLEN:
        start = tl.load(starts + item).to(tl.int64)
        length = tl.load(ends + item).to(tl.int64) - start
    else:
        row = item // segments
        offset = (item % segments).to(tl.int64) * segment
        start = row.to(tl.int64) * tokens + offset
        length = tl.minimum(tokens - offset, segment)
    return start, length.to(tl.int32)


@triton.jit
def load_rows(base, rows, stride, columns, keep, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """[BT, BLOCK] of a [T, WIDTH] matrix; zero where keep is false and beyond WIDTH."""
    at = base + rows[:, None] * stride + columns[None, :]
    if WIDTH % BLOCK == 0:
        return tl.load(at, mask=keep[:, None], other=0.0)
    return tl.load(at, mask=keep[:, None] & (columns < WIDTH)[None, :], other=0.0)


@triton.jit
def state_offsets(rows, columns, D: tl.constexpr, E: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Element (d, e) of a state stored [D, E], or [E, D] when TRANSPOSED."""
    if TRANSPOSED:
        return columns[None, :] * D + rows[:, None]
    return rows[:, None] * E + columns[None, :]


@triton.jit
def scalar_sweep(
    a_ptr,  # [T, HA, D]
    b_ptr,  # [T, HB, D]
    c_ptr,  # [T, HC, E]
    x_ptr,  # [T, HX, E] the tensor whose product with y gives the decay's gradient
    y_ptr,  # [T, H, E]
    decay_ptr,  # [HG] natural log, or [T, HG] from `chunk_sums`
    initial_ptr,  # [items, H, K, V] fp32
    final_ptr,  # [items, H, K, V] fp32
    anchor_ptr,  # [chunks, H, D, E] states before every chunk, for the decay's gradient
    product_ptr,  # [tiles, T, H] fp32 row sums of x * y: written forward, read in reverse
    ddecay_ptr,  # [tiles, T, H] fp32, reverse
    starts_ptr,
    ends_ptr,
    scale,
    tokens,
    segment,
    segments,
    rows_total,
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
    DECAY: tl.constexpr,
    REVERSE: tl.constexpr,
    VARLEN: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    STORE_FINAL: tl.constexpr,
    DECAY_GRADIENT: tl.constexpr,
    READ_TILES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile = tl.program_id(0)
    item = tl.program_id(1) // H
    head = tl.program_id(1) % H
    start, length = item_bounds(starts_ptr, ends_ptr, item, tokens, segment, segments, VARLEN)
    slot = (item.to(tl.int64) * H + head) * D * E
    d_index = tl.arange(0, BD)
    e_index = tile * BE + tl.arange(0, BE)
    in_state = (d_index < D)[:, None] & (e_index < E)[None, :]
    cell = state_offsets(d_index, e_index, D, E, TRANSPOSED)
    state = tl.zeros([BD, BE], tl.float32)
    if HAS_INITIAL:
        state = tl.load(initial_ptr + slot + cell, mask=in_state, other=0.0)
        if REVERSE:
            state = state / scale

    HG: tl.constexpr = H // GROUP_G
    a_ptr += start * stride_at + (head // GROUP_A) * stride_ah
    b_ptr += start * stride_bt + (head // GROUP_B) * stride_bh
    c_ptr += start * stride_ct + (head // GROUP_C) * stride_ch
    y_ptr += (start * H + head) * E
    if DECAY == "head":
        rate = tl.load(decay_ptr + head // GROUP_G).to(tl.float32) * LOG2E
    if DECAY == "scalar":
        decay_ptr += start * HG + head // GROUP_G
    if DECAY_GRADIENT:
        x_ptr += start * stride_xt + (head // GROUP_X) * stride_xh
        token_offset = (tile * rows_total + start) * H + head
        anchor_ptr += ((start // BT + item) * H + head) * D * E
        anchor_cell = d_index[:, None] * E + e_index[None, :]

    local = tl.arange(0, BT)
    keep_pair = (local[:, None] <= local[None, :]) if REVERSE else (local[:, None] >= local[None, :])
    if DECAY == "head":
        distance = local[None, :] - local[:, None] if REVERSE else local[:, None] - local[None, :]
        weight = tl.exp2(tl.where(keep_pair, distance.to(tl.float32) * rate, float("-inf"))) * scale
    chunks = tl.cdiv(length, BT)
    for step in range(chunks):
        chunk = chunks - 1 - step if REVERSE else step
        rows = chunk * BT + local
        keep = rows < length
        rows = rows.to(tl.int64)
        a = load_rows(a_ptr, rows, stride_at, d_index, keep, D, BD)
        b = load_rows(b_ptr, rows, stride_bt, d_index, keep, D, BD)
        c = load_rows(c_ptr, rows, stride_ct, e_index, keep, E, BE)
        # Loads that feed no dot are not pipelined: issued here, their latency passes behind the first two dots.
        if DECAY == "scalar":
            decayed = tl.load(decay_ptr + rows * HG, mask=keep, other=0.0)
            last = tl.minimum(chunk * BT + BT, length) - 1
            whole = tl.load(decay_ptr + last.to(tl.int64) * HG)
            # Rows beyond the end come after all others: at 0 their distance to them would overflow.
            decayed = tl.where(keep, decayed, whole)
        if DECAY_GRADIENT:
            x = load_rows(x_ptr, rows, stride_xt, e_index, keep, E, BE)
            at_token = token_offset + rows * H
            if REVERSE:
                read_product = tl.zeros([BT], tl.float32)
                if tile == 0:
                    for part in tl.static_range(READ_TILES):
                        at_product = product_ptr + (part * rows_total + start + rows) * H + head
                        read_product += tl.load(at_product, mask=keep, other=0.0)
        scores = tl.dot(a, tl.trans(b), input_precision=PRECISION)
        y = tl.dot(a, state.to(a.dtype), input_precision=PRECISION)
        if DECAY == "none":
            scores = tl.where(keep_pair, scores, 0.0)
            y = tl.dot(scores.to(c.dtype), c, y, input_precision=PRECISION) * scale
        else:
            if DECAY == "head":
                count = tl.minimum(length - chunk * BT, BT)
                decayed = rate * tl.minimum(local + 1, count).to(tl.float32)
                whole = rate * count.to(tl.float32)
            else:
                between = decayed[None, :] - decayed[:, None] if REVERSE else decayed[:, None] - decayed[None, :]
                weight = tl.exp2(tl.where(keep_pair, between, float("-inf"))) * scale
            read = tl.exp2(whole - decayed) if REVERSE else tl.exp2(decayed)
            write = tl.exp2(decayed) if REVERSE else tl.exp2(whole - decayed)
            scores = (scores * weight).to(c.dtype)
            y = y * (read * scale)[:, None]
            if DECAY_GRADIENT:
                at_anchor = anchor_ptr + chunk.to(tl.int64) * (H * D * E) + anchor_cell
                if REVERSE:
                    # <S, dS> at the chunk's end in two parts: the state before the chunk, and the chunk's own writes.
                    anchored = tl.load(at_anchor, mask=in_state, other=0.0).to(tl.float32) * state
                    carry = tl.sum(tl.sum(anchored, 1), 0) * (scale * tl.exp2(whole))
                    carry += tl.sum(tl.sum(x.to(tl.float32) * y, 1), 0)
                else:
                    tl.store(at_anchor, state.to(anchor_ptr.dtype.element_ty), mask=in_state)
            y = tl.dot(scores, c, y, input_precision=PRECISION)
            if DECAY_GRADIENT:
                product = tl.sum(x.to(tl.float32) * y, 1)
            column = (c * write[:, None]).to(c.dtype)
        at_y = y_ptr + rows[:, None] * (H * E) + e_index[None, :]
        tl.store(at_y, y.to(y_ptr.dtype.element_ty), mask=keep[:, None] & (e_index < E)[None, :])

        if DECAY_GRADIENT:
            if REVERSE:
                # The gradient of a token's decay is the suffix sum of q dq - k dk. It restarts at every chunk from <S, dS>:
                # rounding errors of later tokens would otherwise pile up in earlier ones. Pairs inside a chunk cancel, since
                # both sweeps round their scores alike, and so do the chunk's writes, being taken from this very sweep.
                product = read_product - product
                gradient = carry + tl.sum(product, 0) - tl.cumsum(product, 0) + product
                tl.store(ddecay_ptr + at_token, gradient, mask=keep)
            else:
                tl.store(product_ptr + at_token, product, mask=keep)

        if DECAY == "none":
            state = tl.dot(tl.trans(b), c, state, input_precision=PRECISION)
        else:
            state = tl.dot(tl.trans(b), column, state * tl.exp2(whole), input_precision=PRECISION)

    if STORE_FINAL:
        if REVERSE:
            state = state * scale
        tl.store(final_ptr + slot + cell, state, mask=in_state)
