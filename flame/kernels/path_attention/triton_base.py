"""What blocks of 64 tokens do to their queries and keys, and its gradient, a block a program.

The WY form of `flame.kernels.path_attention.base`, whose names are used here. Products that would need a transposed
accumulator are computed transposed from the start, since Triton 3.4 to 3.7 miscompile the former on Hopper; so every matrix
that is needed both ways is made twice.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flame.kernels.path_attention.triton_inverse import PIECE, invert, store_block
from flame.kernels.softmax_attention.triton_forward import columns

C = tl.constexpr(64)  # tokens of a block


@triton.jit
def block_inverse(
    w_ptr, beta_ptr, out_ptr, w_batch, w_row, w_head, beta_batch, beta_row, beta_head, T, blocks, Hk,
    K: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(I + strictly_lower(beta w w^T))^-1 of a block: out [B * Hk, blocks, C, C] fp32."""
    block = tl.program_id(0) % blocks
    row = (tl.program_id(0) // blocks).to(tl.int64)
    w_ptr += row // Hk * w_batch + row % Hk * w_head
    beta_ptr += row // Hk * beta_batch + row % Hk * beta_head
    index = tl.arange(0, PIECE)
    system = ()
    for i in tl.static_range(C // PIECE):
        t = block * C + i * PIECE + index
        w = columns(w_ptr, t, w_row, K, BK, t < T, True)
        beta = tl.load(beta_ptr + t * beta_row, mask=t < T, other=0.0)
        for j in tl.static_range(i + 1):
            s = block * C + j * PIECE + index
            other = columns(w_ptr, s, w_row, K, BK, s < T, True)
            gram = tl.dot(w, tl.trans(other), input_precision=PRECISION) * beta[:, None]
            if i == j:
                gram = tl.where(index[:, None] > index[None, :], gram, 0.0)
            system = system + (gram,)
    inverse = invert(system, PRECISION)
    out_ptr += tl.program_id(0).to(tl.int64) * (C * C)
    for i in tl.static_range(C // PIECE):
        for j in tl.static_range(i + 1):
            store_block(out_ptr, inverse[i * (i + 1) // 2 + j], i, j, C)


@triton.jit
def square(ptr, D: tl.constexpr, TRANSPOSED: tl.constexpr):
    """A dense matrix [D, D] or its transpose."""
    i = tl.arange(0, D)
    if TRANSPOSED:
        return tl.load(ptr + i[:, None] + i[None, :] * D)
    return tl.load(ptr + i[:, None] * D + i[None, :])


@triton.jit
def block_keys(
    k_ptr, w_ptr, beta_ptr, inverse_ptr, k_out, e_out, y_out, reach_out, k_batch, k_row, k_head, w_batch, w_row, w_head,
    beta_batch, beta_row, beta_head, T, blocks, Hk,
    K: tl.constexpr, BK: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Keys moved to the ends of their blocks, k_out [B * Hk, blocks * C, BK], and e_out [B * Hk, blocks, BK, BK] fp32; with
    KEEP, y_out [B * Hk, blocks, C, BK] and reach_out [B * Hk, blocks, C, C] fp32 for the gradient."""
    block = tl.program_id(0) % blocks
    row = (tl.program_id(0) // blocks).to(tl.int64)
    t = block * C + tl.arange(0, C)
    i = tl.arange(0, C)
    d = tl.arange(0, BK)
    w = columns(w_ptr + row // Hk * w_batch + row % Hk * w_head, t, w_row, K, BK, t < T, True)
    k = columns(k_ptr + row // Hk * k_batch + row % Hk * k_head, t, k_row, K, BK, t < T, True).to(tl.float32)
    beta = tl.load(beta_ptr + row // Hk * beta_batch + row % Hk * beta_head + t * beta_row, mask=t < T, other=0.0)
    inverse = inverse_ptr + tl.program_id(0).to(tl.int64) * (C * C)
    met = tl.dot(k, tl.trans(w), input_precision=PRECISION) * beta[None, :]  # [j, m]: beta_m w_m . k_j
    met = tl.where(i[:, None] < i[None, :], met, 0.0)
    reach = tl.dot(met, square(inverse, C, True), input_precision=PRECISION)  # transposed
    moved = k - tl.dot(reach, w, input_precision=PRECISION)
    tl.store(k_out + (row * blocks * C + t)[:, None] * BK + d[None, :], moved.to(k_out.dtype.element_ty))
    y = tl.dot(square(inverse, C, False), beta[:, None] * w, input_precision=PRECISION)
    e = tl.dot(tl.trans(w), y, input_precision=PRECISION)
    if KEEP:
        cell = tl.program_id(0).to(tl.int64) * (C * C)
        tl.store(reach_out + cell + i[:, None] + i[None, :] * C, reach)
        tl.store(y_out + (row * blocks * C + t)[:, None] * BK + d[None, :], y)
    at = e_out + tl.program_id(0).to(tl.int64) * (BK * BK)
    tl.store(at + d[:, None] * BK + d[None, :], e)


@triton.jit
def block_queries(
    q_ptr, k_ptr, v_ptr, w_ptr, beta_ptr, inverse_ptr, gates_ptr, q_out, o_ptr, lse_ptr,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, w_batch, w_row, w_head,
    beta_batch, beta_row, beta_head, T, blocks, H, Hk, gates_size, scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, GATED: tl.constexpr,
    ATTEND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Queries moved to before their blocks, q_out [B * H, blocks * C, BK], and, with ATTEND, what they see of their own
    block: o [B * H, blocks * C, BV] and lse [B * H, blocks * C], fp32. gates [2, B * H, blocks * C] base 2."""
    block = tl.program_id(0) % blocks
    row = (tl.program_id(0) // blocks).to(tl.int64)
    b = row // H
    kh = row % H // (H // Hk)
    t = block * C + tl.arange(0, C)
    i = tl.arange(0, C)
    d = tl.arange(0, BK)
    w = columns(w_ptr + b * w_batch + kh * w_head, t, w_row, K, BK, t < T, True)
    q = columns(q_ptr + b * q_batch + row % H * q_head, t, q_row, K, BK, t < T, True)
    beta = tl.load(beta_ptr + b * beta_batch + kh * beta_head + t * beta_row, mask=t < T, other=0.0)
    inverse = square(inverse_ptr + ((b * Hk + kh) * blocks + block) * (C * C), C, False)
    read = tl.dot(q.to(tl.float32), tl.trans(w), input_precision=PRECISION)
    read = tl.where(i[:, None] >= i[None, :], read, 0.0)
    # What read meets, through the inverse: the queries' shares of the block's reflections.
    share = tl.dot(read, inverse, input_precision=PRECISION) * beta[None, :]
    moved = q.to(tl.float32) - tl.dot(share, w, input_precision=PRECISION)
    tl.store(q_out + (row * blocks * C + t)[:, None] * BK + d[None, :], moved.to(q_out.dtype.element_ty))
    if ATTEND:
        k = columns(k_ptr + b * k_batch + kh * k_head, t, k_row, K, BK, t < T, True)
        below = tl.dot(w, tl.trans(k.to(tl.float32)), input_precision=PRECISION)
        below = tl.where(i[:, None] > i[None, :], below, 0.0)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        s = (s - tl.dot(share, below, input_precision=PRECISION)) * scale
        if GATED:
            high = tl.load(gates_ptr + row * blocks * C + t)
            low = tl.load(gates_ptr + gates_size + row * blocks * C + t)
            s += (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
        s = tl.where(i[:, None] >= i[None, :], s, float("-inf"))
        m = tl.max(s, 1)
        p = tl.exp2(s - m[:, None])
        mass = tl.sum(p, 1)
        v = columns(v_ptr + b * v_batch + kh * v_head, t, v_row, V, BV, t < T, True)
        o = tl.dot(p.to(v.dtype), v, input_precision=PRECISION) / mass[:, None]
        dv = tl.arange(0, BV)
        tl.store(o_ptr + (row * blocks * C + t)[:, None] * BV + dv[None, :], o)
        tl.store(lse_ptr + row * blocks * C + t, m + tl.log2(mass))


@triton.jit
def put(ptr, t, stride, x, D: tl.constexpr, BD: tl.constexpr, live):
    """Rows t of a gradient [T, D], rounded to its dtype."""
    d = tl.arange(0, BD)
    tl.store(ptr + t[:, None] * stride + d[None, :], x.to(ptr.dtype.element_ty), mask=live[:, None] & (d < D)[None, :])


@triton.jit
def times(x, y, PRECISION: tl.constexpr):
    """x y by tensor cores in fp32; PRECISION "bf16" rounds fp32 operands to that first, which halves shared memory."""
    if PRECISION == "bf16":
        if x.dtype == tl.float32:
            z = tl.dot(x.to(tl.bfloat16), y.to(tl.bfloat16))
        else:
            z = tl.dot(x, y)
    else:
        z = tl.dot(x, y, input_precision=PRECISION)
    return z


@triton.jit
def times_added(x, y, total, PRECISION: tl.constexpr):
    if PRECISION == "bf16":
        if x.dtype == tl.float32:
            total = tl.dot(x.to(tl.bfloat16), y.to(tl.bfloat16), total)
        else:
            total = tl.dot(x, y, total)
    else:
        total = tl.dot(x, y, total, input_precision=PRECISION)
    return total


@triton.jit
def pair_gradients(
    q_ptr, k_ptr, v_ptr, w_ptr, y_ptr, reach_ptr, gates_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr,
    dk_ptr, dv_ptr, dw_ptr, dreach_ptr, dy_ptr, total_ptr, dq_out,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, w_batch, w_row, w_head,
    do_batch, do_row, do_head, dq_batch, dq_row, dq_head, T, blocks, H, Hk, gates_size, scale, natural,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, GATED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the pairs inside a block and its moved queries ask for.

    dq [B * H, tokens, BK] is that of the moved queries; dq_out that of q. With gates, total [B * H, tokens] is added to.
    Written for each query head: the pairs' share of dk, dv and dw [B * H, tokens, .] and what is taken off the gradients of
    reach [B * H, blocks, C, C] and y [B * H, tokens, BK]."""
    block = tl.program_id(0) % blocks
    row = (tl.program_id(0) // blocks).to(tl.int64)
    bt = row // H
    h = row % H
    kh = h // (H // Hk)
    krow = bt * Hk + kh
    t = block * C + tl.arange(0, C)
    i = tl.arange(0, C)
    d = tl.arange(0, BK)
    below_diagonal = i[:, None] > i[None, :]
    above = i[:, None] < i[None, :]
    at = row * blocks * C + t
    here = at[:, None] * BK + d[None, :]
    reach_ptr += (krow * blocks + block) * (C * C)
    k = columns(k_ptr + bt * k_batch + kh * k_head, t, k_row, K, BK, t < T, True)
    v = columns(v_ptr + bt * v_batch + kh * v_head, t, v_row, V, BV, t < T, True)
    w = columns(w_ptr + bt * w_batch + kh * w_head, t, w_row, K, BK, t < T, True)
    q = columns(q_ptr + bt * q_batch + h * q_head, t, q_row, K, BK, t < T, True)
    wide = q.to(tl.float32)
    do = columns(do_ptr + bt * do_batch + h * do_head, t, do_row, V, BV, t < T, True)
    lse = tl.load(lse_ptr + at)
    delta = tl.load(delta_ptr + at)
    read = tl.where(above, 0.0, times(wide, tl.trans(w), PRECISION))
    s = times(q, tl.trans(k), PRECISION)
    s = (s - times(read, square(reach_ptr, C, False), PRECISION)) * scale
    read_t = tl.where(below_diagonal, 0.0, times(w, tl.trans(wide), PRECISION))
    s_t = times(k, tl.trans(q), PRECISION)
    s_t = (s_t - times(square(reach_ptr, C, True), read_t, PRECISION)) * scale
    if GATED:
        high = tl.load(gates_ptr + at)
        low = tl.load(gates_ptr + gates_size + at)
        s += (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
        s_t += (high[None, :] - high[:, None]) + (low[None, :] - low[:, None])
    p = tl.where(above, 0.0, tl.exp2(s - lse[:, None]))
    p_t = tl.where(below_diagonal, 0.0, tl.exp2(s_t - lse[None, :]))
    dv = times(p_t.to(do.dtype), do, PRECISION)
    tl.store(dv_ptr + at[:, None] * BV + tl.arange(0, BV)[None, :], dv.to(dv_ptr.dtype.element_ty))
    ds = p * (times(do, tl.trans(v), PRECISION) - delta[:, None])
    ds_t = p_t * (times(v, tl.trans(do), PRECISION) - delta[None, :])
    if GATED:
        tl.store(total_ptr + at, tl.load(total_ptr + at) + tl.sum(ds, 1) - tl.sum(ds_t, 1))
    ds = ds * natural
    ds_t = ds_t * natural
    tl.store(dk_ptr + here, times(ds_t.to(q.dtype), q, PRECISION))
    cell = tl.program_id(0).to(tl.int64) * (C * C)
    tl.store(dreach_ptr + cell + i[:, None] * C + i[None, :], times(read_t, ds, PRECISION))
    dq = tl.load(dq_ptr + here).to(tl.float32)
    y = tl.load(y_ptr + (krow * blocks * C + t)[:, None] * BK + d[None, :])
    tl.store(dy_ptr + here, times(read_t, dq, PRECISION))
    dread_t = times(square(reach_ptr, C, False), ds_t, PRECISION)
    dread_t = tl.where(below_diagonal, 0.0, times_added(y, tl.trans(dq), dread_t, PRECISION))
    tl.store(dw_ptr + here, -times(dread_t, wide, PRECISION))
    dread = times(ds, square(reach_ptr, C, True), PRECISION)
    dread = tl.where(above, 0.0, times_added(dq, tl.trans(y), dread, PRECISION))
    dq = times_added(ds.to(k.dtype), k, dq, PRECISION) - times(dread, w, PRECISION)
    put(dq_out + bt * dq_batch + h * dq_head, t, dq_row, dq, K, BK, t < T)


@triton.jit
def over_heads(ptr, krow, blocks, block, H, Hk, R: tl.constexpr, J: tl.constexpr, MIRRORED: tl.constexpr):
    """The sum over a key head's query heads of a block's [R, J], or, MIRRORED, of its transpose: of [B * H, blocks, R, J]."""
    each = H // Hk
    if MIRRORED:
        at = tl.arange(0, J)[:, None] + tl.arange(0, R)[None, :] * J
        total = tl.zeros([J, R], tl.float32)
    else:
        at = tl.arange(0, R)[:, None] * J + tl.arange(0, J)[None, :]
        total = tl.zeros([R, J], tl.float32)
    ptr += ((krow // Hk * H + krow % Hk * each) * blocks + block) * (R * J)
    for _ in range(0, each):
        total += tl.load(ptr + at).to(tl.float32)
        ptr += blocks * (R * J)
    return total


@triton.jit
def reflection_gradients(
    k_ptr, w_ptr, beta_ptr, inverse_ptr, y_ptr, reach_ptr, moved_ptr, values_ptr, de_ptr, dk_ptr, dv_ptr, dw_ptr, dreach_ptr,
    dy_ptr, dk_out, dv_out, dw_out, dbeta_out, k_batch, k_row, k_head, w_batch, w_row, w_head, beta_batch, beta_row,
    beta_head, dk_batch, dk_row, dk_head, dv_batch, dv_row, dv_head, dw_batch, dw_row, dw_head, dbeta_batch, dbeta_row,
    dbeta_head, T, blocks, H, Hk, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What a block's keys, values and reflections get, from `pair_gradients`, the gradients of the moved keys, moved
    [B * Hk, tokens, BK], of values seen from other blocks [B * Hk, tokens, BV], and of e."""
    block = tl.program_id(0) % blocks
    krow = (tl.program_id(0) // blocks).to(tl.int64)
    bt = krow // Hk
    kh = krow % Hk
    t = block * C + tl.arange(0, C)
    i = tl.arange(0, C)
    d = tl.arange(0, BK)
    below_diagonal = i[:, None] > i[None, :]
    above = i[:, None] < i[None, :]
    row = krow * blocks * C + t
    here = row[:, None] * BK + d[None, :]
    cell = tl.program_id(0).to(tl.int64) * (C * C)
    dv = tl.load(values_ptr + row[:, None] * BV + tl.arange(0, BV)[None, :]).to(tl.float32)
    dv += over_heads(dv_ptr, krow, blocks, block, H, Hk, C, BV, False)
    put(dv_out + bt * dv_batch + kh * dv_head, t, dv_row, dv, V, BV, t < T)
    w_ptr += bt * w_batch + kh * w_head
    w = columns(w_ptr, t, w_row, K, BK, t < T, True)
    beta = tl.load(beta_ptr + bt * beta_batch + kh * beta_head + t * beta_row, mask=t < T, other=0.0)
    de = de_ptr + tl.program_id(0).to(tl.int64) * (BK * BK)
    y = tl.load(y_ptr + here)
    moved = tl.load(moved_ptr + here).to(tl.float32)
    # First transposed, for what dk and the symmetric gradient of the products w w^T need.
    dy_t = times(square(de, BK, True), tl.trans(w), PRECISION) - over_heads(
        dy_ptr, krow, blocks, block, H, Hk, C, BK, True
    )
    dscaled_t = times(dy_t, square(inverse_ptr + cell, C, False), PRECISION)
    dreach_t = over_heads(dreach_ptr, krow, blocks, block, H, Hk, C, C, True)
    dreach_t = times_added(moved, tl.trans(w), dreach_t, PRECISION)
    dmet_t = -times(dreach_t, square(inverse_ptr + cell, C, False), PRECISION)
    dsystem_t = times(y, dscaled_t, PRECISION)
    dsystem_t = times_added(square(reach_ptr + cell, C, False), dmet_t, dsystem_t, PRECISION)
    dgram = tl.where(above, -dsystem_t, 0.0) * beta[None, :]
    dk = over_heads(dk_ptr, krow, blocks, block, H, Hk, C, BK, False) + moved
    dk = times_added(tl.where(above, dmet_t, 0.0) * beta[None, :], w, dk, PRECISION)
    put(dk_out + bt * dk_batch + kh * dk_head, t, dk_row, dk, K, BK, t < T)
    w = columns(w_ptr, t, w_row, K, BK, t < T, True)  # again, which is cheaper than to hold them
    y = tl.load(y_ptr + here)
    moved = tl.load(moved_ptr + here).to(tl.float32)
    dy = times(w, square(de, BK, False), PRECISION) - over_heads(dy_ptr, krow, blocks, block, H, Hk, C, BK, False)
    dscaled = times(square(inverse_ptr + cell, C, True), dy, PRECISION)
    dreach = over_heads(dreach_ptr, krow, blocks, block, H, Hk, C, C, False)
    dreach = times_added(w, tl.trans(moved), dreach, PRECISION)
    dmet = -times(square(inverse_ptr + cell, C, True), dreach, PRECISION)
    dsystem = times(dscaled, tl.trans(y), PRECISION)
    dsystem = times_added(dmet, square(reach_ptr + cell, C, True), dsystem, PRECISION)
    dsystem = tl.where(below_diagonal, -dsystem, 0.0)
    dgram += beta[:, None] * dsystem
    k = columns(k_ptr + bt * k_batch + kh * k_head, t, k_row, K, BK, t < T, True).to(tl.float32)
    dmet = tl.where(below_diagonal, dmet, 0.0)
    dbeta = tl.sum(dscaled * w, 1) + tl.sum(dmet * times(w, tl.trans(k), PRECISION), 1)
    dbeta += tl.sum(dsystem * times(w, tl.trans(w), PRECISION), 1)
    tl.store(dbeta_out + bt * dbeta_batch + kh * dbeta_head + t * dbeta_row, dbeta, mask=t < T)
    dw = over_heads(dw_ptr, krow, blocks, block, H, Hk, C, BK, False) + beta[:, None] * dscaled
    dw = times_added(y, square(de, BK, True), dw, PRECISION)
    dw -= times(square(reach_ptr + cell, C, False), moved, PRECISION)
    dw = times_added(dmet * beta[:, None], k, dw, PRECISION)
    dw = times_added(dgram, w, dw, PRECISION)
    put(dw_out + bt * dw_batch + kh * dw_head, t, dw_row, dw, K, BK, t < T)


@triton.jit
def row_products(
    o_ptr, do_ptr, out_ptr, o_batch, o_row, o_head, do_batch, do_row, do_head, T, tokens, H,
    V: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Products of the rows of o and do [B, T, H, V]: out [B * H, tokens] fp32, zero beyond T."""
    tiles = tokens // BM
    row = (tl.program_id(0) // tiles).to(tl.int64)
    t = tl.program_id(0) % tiles * BM + tl.arange(0, BM)
    o = columns(o_ptr + row // H * o_batch + row % H * o_head, t, o_row, V, BV, t < T, True)
    do = columns(do_ptr + row // H * do_batch + row % H * do_head, t, do_row, V, BV, t < T, True)
    tl.store(out_ptr + row * tokens + t, tl.sum(o.to(tl.float32) * do.to(tl.float32), 1))
