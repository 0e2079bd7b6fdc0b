# ruff: noqa: SIM102 (compile-time and run-time conditions nest; they do not join with `and`)
"""The last kernel of the backward pass for a decay per channel: terms inside a chunk, and the decay's own gradient."""

from __future__ import annotations

import triton
import triton.language as tl

from flame.kernels.linear_attention.triton_scalar import LOG2E, item_bounds, load_rows
from flame.kernels.linear_attention.triton_vector import LIMIT, level_factor, level_mask, running_sum


@triton.jit
def finish(
    q_ptr,  # [T, HQ, K]
    k_ptr,  # [T, HK, K]
    dscores_ptr,  # [T, H, BT] gradient of the scores from `inter_sweep`, scaled, 0 above the diagonal
    decay_ptr,  # [T, HG, K]
    bonus_ptr,  # [H, K]
    dqs_ptr,  # [T, H, K] fp32 gradient of qs from `inter_sweep`, scaled
    dks_ptr,  # [T, H, K] fp32
    edge_ptr,  # [anchors, H, K] <S, dS>
    factor_ptr,  # [chunks, H, K] fp32
    dq_ptr,  # [T, H, K]
    dk_ptr,  # [T, H, K]
    ddecay_ptr,  # [T, H, K]
    dbonus_ptr,  # [anchors, H, K] fp32
    starts_ptr,
    ends_ptr,
    tokens,
    segment,
    segments,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    H: tl.constexpr,
    GROUP_Q: tl.constexpr,
    GROUP_K: tl.constexpr,
    GROUP_G: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
    BT: tl.constexpr,
    LEVELS: tl.constexpr,
    ANCHOR: tl.constexpr,
    BONUS: tl.constexpr,
    WRITERS: tl.constexpr,
    STRONG: tl.constexpr,
    DECAY_GRADIENT: tl.constexpr,
    VARLEN: tl.constexpr,
    PRECISION: tl.constexpr,
    DOT: tl.constexpr,
):
    TERMS: tl.constexpr = 1 if decay_ptr.dtype.element_ty == tl.bfloat16 else 3
    item = tl.program_id(2) // H
    head = tl.program_id(2) % H
    start, length = item_bounds(starts_ptr, ends_ptr, item, tokens, segment, segments, VARLEN)
    HG: tl.constexpr = H // GROUP_G
    columns = tl.program_id(0) * BK + tl.arange(0, BK)
    in_k = columns < K
    q_ptr += start * stride_qt + (head // GROUP_Q) * stride_qh
    k_ptr += start * stride_kt + (head // GROUP_K) * stride_kh
    dscores_ptr += (start * H + head) * BT
    decay_ptr += (start * HG + head // GROUP_G) * K
    out = (start * H + head) * K
    local = tl.arange(0, BT)
    diagonal = local[:, None] == local[None, :]
    if BONUS:
        bonus = tl.load(bonus_ptr + head * K + columns, mask=in_k, other=0.0).to(tl.float32)
    PER_BLOCK: tl.constexpr = ANCHOR // BT
    chunks = tl.cdiv(length, BT)
    for block in range(tl.program_id(1), tl.cdiv(chunks, PER_BLOCK), tl.num_programs(1)):
        slot = ((start // ANCHOR + block + item) * H + head) * K + columns
        if DECAY_GRADIENT:
            carry = tl.load(edge_ptr + slot, mask=in_k, other=0.0)
        if BONUS:
            dbonus = tl.zeros([BK], tl.float32)
        first = block * PER_BLOCK
        last = tl.minimum(first + PER_BLOCK, chunks)
        each = first + tl.arange(0, PER_BLOCK)
        at_factor = factor_ptr + ((start // BT + item + each)[:, None] * H + head) * K + columns[None, :]
        factors = tl.load(at_factor, mask=(each < last)[:, None] & in_k[None, :], other=1.0)
        mine = (tl.min(tl.min(factors, 0), 0) <= tl.exp2(-LIMIT)) == STRONG
        # A block of the other kind has nothing to do here.
        last = tl.where(mine, last, first)
        for step in range(last - first):
            rows = (last - 1 - step) * BT + local
            keep = rows < length
            rows = rows.to(tl.int64)
            inside = keep[:, None] & in_k[None, :]
            at = out + rows[:, None] * (H * K) + columns[None, :]
            at_scores = dscores_ptr + rows[:, None] * (H * BT) + local[None, :]
            dscores = tl.load(at_scores, mask=keep[:, None], other=0.0)
            raw = load_rows(decay_ptr, rows, HG * K, columns, keep, K, BK)
            k = load_rows(k_ptr, rows, stride_kt, columns, keep, K, BK)
            log = raw.to(tl.float32) * LOG2E
            if tl.float32 == DOT:
                decayed = tl.cumsum(log, 0)
            else:
                earlier = (local[:, None] >= local[None, :]).to(tl.bfloat16)
                decayed = running_sum(earlier, raw, TERMS) * LOG2E
            whole = tl.sum(log, 0)
            if BONUS:
                reader = tl.exp2(decayed - log)
            else:
                reader = tl.exp2(decayed)
            writer = tl.exp2(whole[None, :] - decayed)
            dqs = tl.load(dqs_ptr + at, mask=inside, other=0.0).to(tl.float32)
            dq = dqs * reader
            if WRITERS:
                dscores_transposed = tl.trans(dscores)
                q = load_rows(q_ptr, rows, stride_qt, columns, keep, K, BK)
                dks = tl.load(dks_ptr + at, mask=inside, other=0.0).to(tl.float32)
                dk = dks * writer
                if DECAY_GRADIENT:
                    # Products of a pair use operands rounded as the dots round them: then q dq and k dk cancel in the
                    # suffix sum, where rounding errors would otherwise pile up.
                    read = (q * reader).to(DOT).to(tl.float32) * dqs
                    product = read - (k * writer).to(DOT).to(tl.float32) * dks
            if not STRONG:
                unscale = tl.exp2(-whole)[None, :]
                near_k = (k * writer).to(DOT)
                if BONUS:
                    part = tl.dot(tl.where(diagonal, 0.0, dscores), near_k, input_precision=PRECISION)
                else:
                    part = tl.dot(dscores, near_k, input_precision=PRECISION)
                dq += part * (reader * unscale)
                if WRITERS:
                    near_q = (q * (reader * unscale)).to(DOT)
                    if BONUS:
                        dscores_transposed = tl.where(diagonal, 0.0, dscores_transposed)
                    other = tl.dot(dscores_transposed, near_q, input_precision=PRECISION)
                    dk += other * writer
                    if DECAY_GRADIENT:
                        near_read = near_q.to(tl.float32) * part
                        read += near_read
                        product += near_read - near_k.to(tl.float32) * other
            else:
                met = tl.sum(tl.where(diagonal, dscores.to(tl.float32), 0.0), 1)[:, None]
                if not BONUS:
                    dq += met * k
                    if WRITERS:
                        dk += met * q
                for level in tl.static_range(LEVELS):
                    factor = level_factor(log, 1 << level, BT, BK, BONUS)
                    near_k = (k * factor).to(DOT)
                    part = tl.where(level_mask(1 << level, BT, False), dscores, 0.0)
                    part = tl.dot(part, near_k, input_precision=PRECISION)
                    dq += part * factor
                    if WRITERS:
                        near_q = (q * factor).to(DOT)
                        other = tl.where(level_mask(1 << level, BT, True), dscores_transposed, 0.0)
                        other = tl.dot(other, near_q, input_precision=PRECISION)
                        dk += other * factor
                        if DECAY_GRADIENT:
                            near_read = near_q.to(tl.float32) * part
                            read += near_read
                            product += near_read - near_k.to(tl.float32) * other
            if DECAY_GRADIENT:
                total = tl.sum(product, 0)
                if tl.float32 == DOT:
                    gradient = (carry + total)[None, :] - tl.cumsum(product, 0) + product
                else:
                    later = (local[:, None] <= local[None, :]).to(tl.bfloat16)
                    gradient = carry[None, :] + running_sum(later, product, 2)
                if BONUS:
                    gradient -= read
                tl.store(ddecay_ptr + at, gradient.to(ddecay_ptr.dtype.element_ty), mask=inside)
                carry += total
            if BONUS:
                own = tl.sum(tl.where(diagonal, dscores.to(tl.float32), 0.0), 1)[:, None]
                dq += own * bonus[None, :] * k
                dk += own * bonus[None, :] * q
                dbonus += tl.sum(own * q * k, 0)
            tl.store(dq_ptr + at, dq.to(dq_ptr.dtype.element_ty), mask=inside)
            if WRITERS:
                tl.store(dk_ptr + at, dk.to(dk_ptr.dtype.element_ty), mask=inside)
        if BONUS:
            if mine:
                tl.store(dbonus_ptr + slot, dbonus, mask=in_k)
