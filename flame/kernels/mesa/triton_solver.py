"""Conjugate gradients on the GPU: one program solves the systems of a chunk's rows for one head.

Row i of a chunk has the matrix ``A_i = e^{G_i} H + sum_{j <= i} b_j e^{G_i - G_j} k_j k_j^T + diag(l)``, H being the state
before the chunk, which is never formed: for all rows at once

    A p = e^G (p H) + ((p k^T) * w) k + l p,        w_ij = b_j e^{G_i - G_j} for j <= i

is three products on the tensor cores whose second operands, H and k, stay on chip through all steps. Operands are fp16: H is
scaled by its largest entry, so that it neither overflows nor loses its small entries, and p is rounded *as a direction* (the
steps use the rounded p throughout), so that its rounding is no error of the solution. Every right-hand side is brought to
length one, with the 1e-5 of the definition scaled along; so small gradients keep their digits. fp32 problems (SPLIT) carry
each operand as a sum of two fp16 numbers, 22 bits, and take three products for one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flame.kernels.linear_attention.triton_scalar import item_bounds, load_rows
from flame.kernels.mesa.triton_keys import UNIT_EPS as NORM_EPS
from flame.kernels.mesa.triton_keys import load_unit, unit_gradient

EPS = tl.constexpr(1e-5)  # `flame.kernels.mesa.solver.EPS`


@triton.jit
def split_halves(x, SPLIT: tl.constexpr):
    """x as a sum of two fp16 tensors; the second is nothing but a placeholder unless SPLIT."""
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16) if SPLIT else high


@triton.jit
def split_dot(a, a_low, b, b_low, sum, SPLIT: tl.constexpr):
    """sum + (a + a_low) (b + b_low) up to the product of the low parts."""
    if SPLIT:
        sum = tl.dot(a_low, b, sum)
        sum = tl.dot(a, b_low, sum)
    return tl.dot(a, b, sum)


@triton.jit
def mesa_solve(
    right_ptr,  # [T, H, K] right-hand sides
    k_ptr,  # [T, H, K]
    beta_ptr,  # [T, H]
    sum_ptr,  # [T, H] fp32 log2 decays summed within chunks
    state_ptr,  # [chunks, H, K, K] fp32 before each chunk
    ridge_ptr,  # [H, K]
    x_ptr,  # [T, H, K] solutions
    other_ptr,  # [T, H, K] solutions of the first solve, in the second
    dridge_ptr,  # [chunks, H, K] fp32, -sum over rows of x * other
    q_ptr,  # [T, H, K] right-hand sides of the first solve as they were given, in the second
    dq_ptr,  # [T, H, K] their gradient
    starts_ptr,
    ends_ptr,
    tokens,
    segment,
    segments,
    steps,
    stride_rt,
    stride_rh,
    stride_kt,
    stride_kh,
    stride_qt,
    stride_qh,
    H: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
    BT: tl.constexpr,
    VARLEN: tl.constexpr,
    UNIT_EPS: tl.constexpr,  # 1e-5 is meant for right-hand sides of length one
    NORMALIZE: tl.constexpr,  # the first solve's right-hand sides are brought to length one
    GRADIENT: tl.constexpr,  # this is the second solve
    SPLIT: tl.constexpr,
    CHECK: tl.constexpr,  # steps between two looks whether the rest still matters; 0 for never
    TOLERANCE: tl.constexpr,  # it does where steps like the last would move x by more than this part of its length
):
    item = tl.program_id(0) // H
    head = tl.program_id(0) % H
    start, length = item_bounds(starts_ptr, ends_ptr, item, tokens, segment, segments, VARLEN)
    if length == 0:
        return
    local = tl.arange(0, BT)
    keep = local < length
    rows = local.to(tl.int64)
    columns = tl.arange(0, BK)
    inside = columns < K
    slot = item.to(tl.int64) * H + head

    k = load_rows(k_ptr + start * stride_kt + head * stride_kh, rows, stride_kt, columns, keep, K, BK)
    k, k_low = split_halves(k.to(tl.float32), SPLIT)
    at_token = start * H + head + rows * H
    decayed = tl.load(sum_ptr + at_token, mask=keep, other=0.0)
    beta = tl.load(beta_ptr + at_token, mask=keep, other=0.0).to(tl.float32)
    seen = (local[:, None] >= local[None, :]) & keep[:, None]
    weight = tl.exp2(tl.where(seen, decayed[:, None] - decayed[None, :], float("-inf"))) * beta[None, :]
    at_state = state_ptr + slot * K * K + columns[:, None] * K + columns[None, :]
    state = tl.load(at_state, mask=inside[:, None] & inside[None, :], other=0.0)
    largest = tl.maximum(tl.max(tl.max(tl.abs(state), 1), 0), 1e-30)
    read = tl.exp2(decayed) * largest
    state, state_low = split_halves(state / largest, SPLIT)
    ridge = tl.load(ridge_ptr + head * K + columns, mask=inside, other=0.0).to(tl.float32)

    right = load_rows(right_ptr + start * stride_rt + head * stride_rh, rows, stride_rt, columns, keep, K, BK)
    residual = right.to(tl.float32)
    square = tl.sum(residual * residual, 1)
    norm = tl.sqrt(square)
    residual = residual / tl.where(norm > 0, norm, 1.0)[:, None]
    if NORMALIZE and not GRADIENT:
        norm *= tl.rsqrt(square + NORM_EPS)
        square /= square + NORM_EPS
    if UNIT_EPS:
        eps = tl.full([BT], EPS, tl.float32)
    else:
        eps = EPS / tl.where(square > 0, square, 1.0)
    x = tl.zeros([BT, BK], tl.float32)
    p, p_low = split_halves(residual, SPLIT)
    delta = tl.sum(residual * residual, 1)
    left = tl.full([], 0, tl.int32) + steps
    # Squared lengths of x and p and their product, by the steps' own recurrences.
    x_square, x_p, p_square = tl.zeros([BT], tl.float32), tl.zeros([BT], tl.float32), delta
    while left > 0:
        scores = split_dot(p, p_low, tl.trans(k), tl.trans(k_low), tl.zeros([BT, BT], tl.float32), SPLIT)
        scores, scores_low = split_halves(scores * weight, SPLIT)
        image = split_dot(p, p_low, state, state_low, tl.zeros([BT, BK], tl.float32), SPLIT) * read[:, None]
        image = split_dot(scores, scores_low, k, k_low, image, SPLIT)
        direction = p.to(tl.float32)
        if SPLIT:
            direction += p_low.to(tl.float32)
        image += direction * ridge[None, :]
        rate = delta / (tl.sum(direction * image, 1) + eps)
        x += rate[:, None] * direction
        residual -= rate[:, None] * image
        previous = delta
        delta = tl.sum(residual * residual, 1)
        turn = delta / (previous + eps)
        p, p_low = split_halves(residual + turn[:, None] * direction, SPLIT)
        left -= 1
        if CHECK > 0:
            x_square += rate * (2 * x_p + rate * p_square)
            if left % CHECK == 0:
                reach = left.to(tl.float32) * rate
                moving = reach * reach * p_square > TOLERANCE * TOLERANCE * x_square
                if tl.max(moving.to(tl.int32), 0) == 0:
                    left = tl.full([], 0, tl.int32)
            x_p = turn * (x_p + rate * p_square)
            p_square = delta + turn * turn * p_square
    x = x * norm[:, None]

    at_x = (start + rows[:, None]) * (H * K) + head * K + columns[None, :]
    mask = keep[:, None] & inside[None, :]
    tl.store(x_ptr + at_x, x.to(x_ptr.dtype.element_ty), mask=mask)
    if GRADIENT:
        other = tl.load(other_ptr + at_x, mask=mask, other=0.0).to(tl.float32)
        tl.store(dridge_ptr + slot * K + columns, -tl.sum(x * other, 0), mask=inside)
        if NORMALIZE:
            q_ptr += start * stride_qt + head * stride_qh
            q, factor = load_unit(q_ptr, rows, stride_qt, columns, keep, K, NORMALIZE)
            dq = unit_gradient(x, q, factor, NORMALIZE)
            tl.store(dq_ptr + at_x, dq.to(dq_ptr.dtype.element_ty), mask=mask)
