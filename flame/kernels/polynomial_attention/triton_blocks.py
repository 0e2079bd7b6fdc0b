"""Quadratic-score attention on the GPU in blocks of a few hundred tokens.

Pairs inside a block are scored directly. What a block leaves behind is the sum of ``f(k) [v, 1]`` over its rows, with
``f(k) = (k_a k_b, k_a, 1)`` made on chip, 64 features at a time, and never written: ``c2 s^2 = c2 / d (q_a q_b) . (k_a k_b)``.
The backward mirrors it: in reverse, a block leaves the sum of ``f(q) [dN, dD]``, the gradients of numerator and denominator.
A feature's order is (a, b) for 16 x 16 pairs, then 16 single ones, then the constant, SIZE in all.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flame.kernels.linear_attention.triton_scalar import item_bounds, load_rows

D = tl.constexpr(16)  # channels of q and k, zero beyond theirs
GROUP = tl.constexpr(4)  # channels a to a part of 64 features
SIZE = tl.constexpr(320)  # features with padding: 4 parts of pairs, one of the others


@triton.jit
def row_products(
    o_ptr,
    rest_ptr,  # what rounding took from o, if REST
    do_ptr,
    delta_ptr,
    rows,
    V: tl.constexpr,
    BV: tl.constexpr,
    BR: tl.constexpr,
    REST: tl.constexpr,
):
    """delta [T * H] = sum over V of o * do."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    columns = tl.arange(0, BV)
    o = load_rows(o_ptr, row, V, columns, row < rows, V, BV).to(tl.float32)
    if REST:
        o += load_rows(rest_ptr, row, V, columns, row < rows, V, BV).to(tl.float32)
    do = load_rows(do_ptr, row, V, columns, row < rows, V, BV).to(tl.float32)
    tl.store(delta_ptr + row, tl.sum(o * do, 1), mask=row < rows)


@triton.jit
def load_short(base, rows, stride, keep, K: tl.constexpr):
    """[R, D] rows of q or k."""
    channels = tl.arange(0, D)
    at = base + rows[:, None] * stride + channels[None, :]
    return tl.load(at, mask=keep[:, None] & (channels < K)[None, :], other=0.0)


@triton.jit
def load_channels(base, rows, stride, keep, part, K: tl.constexpr):
    """[R, GROUP] fp32: the channels a of one part."""
    channel = part * GROUP + tl.arange(0, GROUP)
    at = base + rows[:, None] * stride + channel[None, :]
    return tl.load(at, mask=keep[:, None] & (channel < K)[None, :], other=0.0).to(tl.float32)


@triton.jit
def block_sums(
    k_ptr,  # [T, H, K] keys, or queries in GRADIENT
    v_ptr,  # [T, H, V] values, or do
    denominator_ptr,  # [T, H] fp32, GRADIENT
    delta_ptr,  # [T, H] fp32, GRADIENT
    state_ptr,  # [items, H, SIZE * V + SIZE] fp32: sums over rows of features times [v, 1] or [dN, dD]
    starts_ptr,
    ends_ptr,
    tokens,
    segment,
    segments,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BV: tl.constexpr,
    BT: tl.constexpr,
    VARLEN: tl.constexpr,
    GRADIENT: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    part = tl.program_id(0)
    item = tl.program_id(1) // H
    head = tl.program_id(1) % H
    start, length = item_bounds(starts_ptr, ends_ptr, item, tokens, segment, segments, VARLEN)
    k_ptr += start * stride_kt + head * stride_kh
    v_ptr += start * stride_vt + head * stride_vh
    local, channels, columns = tl.arange(0, BT), tl.arange(0, D), tl.arange(0, BV)
    feature = tl.arange(0, GROUP * D)
    state = tl.zeros([GROUP * D, BV], tl.float32)
    ones = tl.zeros([GROUP * D], tl.float32)
    for first in range(0, length, BT):
        rows = first + local
        keep = rows < length
        rows = rows.to(tl.int64)
        mask = keep[None, :] & (channels < K)[:, None]
        k = tl.load(k_ptr + rows[None, :] * stride_kt + channels[:, None], mask=mask, other=0.0).to(tl.float32)
        v = load_rows(v_ptr, rows, stride_vt, columns, keep, V, BV).to(DOT)
        if part < D // GROUP:
            channel = part * GROUP + tl.arange(0, GROUP)
            in_a = keep[None, :] & (channel < K)[:, None]
            a = tl.load(k_ptr + rows[None, :] * stride_kt + channel[:, None], mask=in_a, other=0.0).to(tl.float32)
            features = tl.reshape(a[:, None, :] * k[None, :, :], (GROUP * D, BT))
        else:
            single = keep[None, :] & (feature < K)[:, None]
            features = tl.load(k_ptr + rows[None, :] * stride_kt + feature[:, None], mask=single, other=0.0).to(
                tl.float32
            )
            features += tl.where((feature == D)[:, None] & keep[None, :], 1.0, 0.0)
        if GRADIENT:
            at = (start + rows) * H + head
            inverse = 1 / tl.load(denominator_ptr + at, mask=keep, other=1.0)
            delta = tl.load(delta_ptr + at, mask=keep, other=0.0)
            features *= inverse[None, :]
            ones -= tl.sum(features * delta[None, :], 1)
        else:
            ones += tl.sum(features, 1)
        state = tl.dot(features.to(DOT), v, state, input_precision=PRECISION)
    state_ptr += (item.to(tl.int64) * H + head) * (SIZE * V + SIZE)
    feature += part * GROUP * D
    tl.store(state_ptr + feature[:, None] * V + columns[None, :], state, mask=(columns < V)[None, :])
    tl.store(state_ptr + SIZE * V + feature, ones)


@triton.jit
def read_state(
    x, x_ptr, rows, stride, keep, state_ptr, C0, C1, C2,
    K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """f(x) . state with the scores' coefficients: [R, BV], and for the column of ones [R]. x [R, D]."""
    wide = x.to(tl.float32)
    columns, channels, feature = tl.arange(0, BV), tl.arange(0, D), tl.arange(0, GROUP * D)
    at_v = columns[None, :]
    in_v = (columns < V)[None, :]
    y = tl.zeros([BT, BV], tl.float32)
    z = tl.zeros([BT], tl.float32)
    for part in tl.static_range(D // GROUP):
        a = load_channels(x_ptr, rows, stride, keep, part, K)
        features = tl.reshape(a[:, :, None] * wide[:, None, :], (BT, GROUP * D))
        row = part * GROUP * D + feature
        state = tl.load(state_ptr + row[:, None] * V + at_v, mask=in_v, other=0.0)
        ones = tl.load(state_ptr + SIZE * V + row)
        y = tl.dot(features.to(DOT), state.to(DOT), y, input_precision=PRECISION)
        z += tl.sum(features * ones[None, :], 1)
    row = D * D + channels
    state = tl.load(state_ptr + row[:, None] * V + at_v, mask=in_v, other=0.0)
    single = tl.dot(x.to(DOT), state.to(DOT), input_precision=PRECISION)
    constant = tl.load(state_ptr + (D * D + D) * V + columns, mask=columns < V, other=0.0)
    ones = tl.load(state_ptr + SIZE * V + row)
    count = tl.load(state_ptr + SIZE * V + D * D + D)
    y = C2 * y + C1 * single + C0 * constant[None, :]
    z = C2 * z + C1 * tl.sum(wide * ones[None, :], 1) + C0 * count
    return y, z


@triton.jit
def state_gradient(
    x, x_ptr, rows, stride, keep, y, z, state_ptr, C1, C2,
    K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of x in `read_state`, [R, D], y [R, BV] and z [R] being those of its results."""
    columns, channels, feature = tl.arange(0, BV), tl.arange(0, D), tl.arange(0, GROUP * D)
    at_v = columns[:, None]
    in_v = (columns < V)[:, None]
    dx = tl.zeros([BT, D], tl.float32)
    for part in tl.static_range(D // GROUP):
        a = load_channels(x_ptr, rows, stride, keep, part, K)
        row = part * GROUP * D + feature
        state = tl.load(state_ptr + row[None, :] * V + at_v, mask=in_v, other=0.0)
        ones = tl.load(state_ptr + SIZE * V + row)
        dfeatures = tl.dot(y.to(DOT), state.to(DOT), input_precision=PRECISION) + z[:, None] * ones[None, :]
        dx += tl.sum(tl.reshape(dfeatures, (BT, GROUP, D)) * a[:, :, None], 1)
    row = D * D + channels
    state = tl.load(state_ptr + row[None, :] * V + at_v, mask=in_v, other=0.0)
    ones = tl.load(state_ptr + SIZE * V + row)
    single = tl.dot(y.to(DOT), state.to(DOT), input_precision=PRECISION) + z[:, None] * ones[None, :]
    return 2 * C2 * dx + C1 * single


@triton.jit
def block_forward(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,  # [T, H, V]
    rest_ptr,  # [T, H, V] what rounding takes from o, if REST
    denominator_ptr,  # [T, H] fp32, eps included
    state_ptr,  # sums over the blocks before
    starts_ptr,
    ends_ptr,
    tokens,
    segment,
    segments,
    scale,
    eps,
    c0,
    c1,
    c2,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BV: tl.constexpr,
    BT: tl.constexpr,
    BS: tl.constexpr,
    VARLEN: tl.constexpr,
    HAS_STATE: tl.constexpr,
    REST: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    item = tl.program_id(1) // H
    head = tl.program_id(1) % H
    start, length = item_bounds(starts_ptr, ends_ptr, item, tokens, segment, segments, VARLEN)
    top = tl.program_id(0) * BT
    if top >= length:
        return
    q_ptr += start * stride_qt + head * stride_qh
    k_ptr += start * stride_kt + head * stride_kh
    v_ptr += start * stride_vt + head * stride_vh
    columns, channels = tl.arange(0, BV), tl.arange(0, D)
    row = top + tl.arange(0, BT)
    keep = row < length
    rows = row.to(tl.int64)
    q = load_short(q_ptr, rows, stride_qt, keep, K).to(DOT)
    y = tl.zeros([BT, BV], tl.float32)
    z = tl.zeros([BT], tl.float32)
    for first in range(0, tl.minimum(top + BT, length), BS):
        column = first + tl.arange(0, BS)
        there = column < length
        at_k = k_ptr + column.to(tl.int64)[None, :] * stride_kt + channels[:, None]
        k = tl.load(at_k, mask=there[None, :] & (channels < K)[:, None], other=0.0).to(DOT)
        v = load_rows(v_ptr, column.to(tl.int64), stride_vt, columns, there, V, BV).to(DOT)
        scores = tl.dot(q, k, input_precision=PRECISION) * scale
        weights = tl.where(row[:, None] >= column[None, :], c0 + scores * (c1 + c2 * scores), 0.0).to(DOT)
        z += tl.sum(weights.to(tl.float32), 1)  # as rounded, so that one large weight leaves o exact
        y = tl.dot(weights, v, y, input_precision=PRECISION)
    if HAS_STATE:
        state_ptr += (item.to(tl.int64) * H + head) * (SIZE * V + SIZE)
        far, ones = read_state(
            q, q_ptr, rows, stride_qt, keep, state_ptr, c0, c1 * scale, c2 * scale * scale, K, V, BV, BT, DOT, PRECISION
        )
        y += far
        z += ones
    z += eps
    at = (start + rows) * H + head
    tl.store(denominator_ptr + at, z, mask=keep)
    y = y / z[:, None]
    o = y.to(o_ptr.dtype.element_ty)
    at_o = at[:, None] * V + columns[None, :]
    tl.store(o_ptr + at_o, o, mask=keep[:, None] & (columns < V)[None, :])
    if REST:
        rest = (y - o.to(tl.float32)).to(rest_ptr.dtype.element_ty)
        tl.store(rest_ptr + at_o, rest, mask=keep[:, None] & (columns < V)[None, :])


@triton.jit
def block_dq(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,  # [T, H, V], contiguous
    denominator_ptr,
    delta_ptr,
    dq_ptr,  # [T, H, K]
    state_ptr,  # sums over the blocks before
    starts_ptr,
    ends_ptr,
    tokens,
    segment,
    segments,
    scale,
    c1,
    c2,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BV: tl.constexpr,
    BT: tl.constexpr,
    BS: tl.constexpr,
    VARLEN: tl.constexpr,
    HAS_STATE: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    item = tl.program_id(1) // H
    head = tl.program_id(1) % H
    start, length = item_bounds(starts_ptr, ends_ptr, item, tokens, segment, segments, VARLEN)
    top = tl.program_id(0) * BT
    if top >= length:
        return
    q_ptr += start * stride_qt + head * stride_qh
    k_ptr += start * stride_kt + head * stride_kh
    v_ptr += start * stride_vt + head * stride_vh
    columns, channels = tl.arange(0, BV), tl.arange(0, D)
    row = top + tl.arange(0, BT)
    keep = row < length
    rows = row.to(tl.int64)
    at = (start + rows) * H + head
    q = load_short(q_ptr, rows, stride_qt, keep, K).to(DOT)
    do = load_rows(do_ptr, at, V, columns, keep, V, BV).to(DOT)
    inverse = 1 / tl.load(denominator_ptr + at, mask=keep, other=1.0)
    delta = tl.load(delta_ptr + at, mask=keep, other=0.0)
    dq = tl.zeros([BT, D], tl.float32)
    for first in range(0, tl.minimum(top + BT, length), BS):
        column = first + tl.arange(0, BS)
        there = column < length
        in_k = (channels < K)[:, None] & there[None, :]
        at_k = k_ptr + column.to(tl.int64)[None, :] * stride_kt + channels[:, None]
        at_v = v_ptr + column.to(tl.int64)[None, :] * stride_vt + columns[:, None]
        k = tl.load(at_k, mask=in_k, other=0.0).to(DOT)
        v = tl.load(at_v, mask=(columns < V)[:, None] & there[None, :], other=0.0).to(DOT)
        scores = tl.dot(q, k, input_precision=PRECISION) * scale
        dweights = tl.dot(do, v, input_precision=PRECISION) - delta[:, None]
        slope = tl.where(row[:, None] >= column[None, :], c1 + 2 * c2 * scores, 0.0)
        dscores = (dweights * slope * inverse[:, None]).to(DOT)
        dq = tl.dot(dscores, tl.trans(k), dq, input_precision=PRECISION)
    dq *= scale
    if HAS_STATE:
        state_ptr += (item.to(tl.int64) * H + head) * (SIZE * V + SIZE)
        dq += inverse[:, None] * state_gradient(
            q, q_ptr, rows, stride_qt, keep, do, -delta, state_ptr, c1 * scale, c2 * scale * scale,
            K, V, BV, BT, DOT, PRECISION,
        )  # fmt: skip
    at_q = dq_ptr + at[:, None] * K + channels[None, :]
    tl.store(at_q, dq.to(dq_ptr.dtype.element_ty), mask=keep[:, None] & (channels < K)[None, :])


@triton.jit
def block_dkv(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,  # [T, H, V], contiguous
    denominator_ptr,
    delta_ptr,
    dk_ptr,  # [T, H, K]
    dv_ptr,  # [T, H, V]
    state_ptr,  # sums over the blocks after
    starts_ptr,
    ends_ptr,
    tokens,
    segment,
    segments,
    scale,
    c0,
    c1,
    c2,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BV: tl.constexpr,
    BT: tl.constexpr,
    BS: tl.constexpr,
    VARLEN: tl.constexpr,
    HAS_STATE: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    item = tl.program_id(1) // H
    head = tl.program_id(1) % H
    start, length = item_bounds(starts_ptr, ends_ptr, item, tokens, segment, segments, VARLEN)
    top = tl.program_id(0) * BT
    if top >= length:
        return
    q_ptr += start * stride_qt + head * stride_qh
    k_ptr += start * stride_kt + head * stride_kh
    v_ptr += start * stride_vt + head * stride_vh
    columns, channels = tl.arange(0, BV), tl.arange(0, D)
    row = top + tl.arange(0, BT)
    keep = row < length
    rows = row.to(tl.int64)
    at = (start + rows) * H + head
    k = load_short(k_ptr, rows, stride_kt, keep, K).to(DOT)
    v = load_rows(v_ptr, rows, stride_vt, columns, keep, V, BV).to(DOT)
    dk = tl.zeros([BT, D], tl.float32)
    dv = tl.zeros([BT, BV], tl.float32)
    for first in range(top // BS * BS, length, BS):
        column = first + tl.arange(0, BS)
        there = column < length
        at_column = (start + column) * H + head
        q = load_short(q_ptr, column.to(tl.int64), stride_qt, there, K).to(DOT)
        do = load_rows(do_ptr, at_column, V, columns, there, V, BV).to(DOT)
        inverse = 1 / tl.load(denominator_ptr + at_column, mask=there, other=1.0)
        delta = tl.load(delta_ptr + at_column, mask=there, other=0.0)
        inverse = tl.where(there, inverse, 0.0)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
        seen = column[None, :] >= row[:, None]
        weights = tl.where(seen, c0 + scores * (c1 + c2 * scores), 0.0) * inverse[None, :]
        dv = tl.dot(weights.to(DOT), do, dv, input_precision=PRECISION)
        dweights = tl.dot(v, tl.trans(do), input_precision=PRECISION) - delta[None, :]
        slope = tl.where(seen, c1 + 2 * c2 * scores, 0.0)
        dscores = (dweights * slope * inverse[None, :]).to(DOT)
        dk = tl.dot(dscores, q, dk, input_precision=PRECISION)
    dk *= scale
    if HAS_STATE:
        state_ptr += (item.to(tl.int64) * H + head) * (SIZE * V + SIZE)
        s1, s2 = c1 * scale, c2 * scale * scale
        far, _ = read_state(k, k_ptr, rows, stride_kt, keep, state_ptr, c0, s1, s2, K, V, BV, BT, DOT, PRECISION)
        dv += far
        ones = tl.full([BT], 1.0, tl.float32)
        dk += state_gradient(k, k_ptr, rows, stride_kt, keep, v, ones, state_ptr, s1, s2, K, V, BV, BT, DOT, PRECISION)
    at_k = dk_ptr + at[:, None] * K + channels[None, :]
    tl.store(at_k, dk.to(dk_ptr.dtype.element_ty), mask=keep[:, None] & (channels < K)[None, :])
    at_v = dv_ptr + at[:, None] * V + columns[None, :]
    tl.store(at_v, dv.to(dv_ptr.dtype.element_ty), mask=keep[:, None] & (columns < V)[None, :])
