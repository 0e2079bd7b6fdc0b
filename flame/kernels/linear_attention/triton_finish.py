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
    DOTS: tl.constexpr,
):
    # DOTS: 1 sums the decay by products, 2 the decay's gradient, 3 both.
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
    blocks = tl.cdiv(chunks, PER_BLOCK)
    if STRONG:
        # One look at up to 8 blocks: mostly there is nothing to do.
        look = tl.arange(0, 8 * PER_BLOCK)
        look = (tl.program_id(1) + look // PER_BLOCK * tl.num_programs(1)) * PER_BLOCK + look % PER_BLOCK
        at_seen = factor_ptr + ((start // BT + item + look)[:, None] * H + head) * K + columns[None, :]
        seen = tl.load(at_seen, mask=(look < chunks)[:, None] & in_k[None, :], other=1.0)
        quiet = tl.min(tl.min(seen, 0), 0) > tl.exp2(-LIMIT)
        blocks = tl.where(quiet & (blocks <= 8 * tl.num_programs(1)), 0, blocks)
    for block in range(tl.program_id(1), blocks, tl.num_programs(1)):
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
            keep = (last - 1 - step) * BT + local < length
            # The chunk's rows are found by scalars of 64 bits and offsets of 32, which take half the registers.
            row = tl.full((), 0, tl.int64) + (last - 1 - step) * BT
            inside = keep[:, None] & in_k[None, :]
            at_chunk = out + row * (H * K)
            at = local[:, None] * (H * K) + columns[None, :]
            dscores = load_rows(dscores_ptr + row * (H * BT), local, H * BT, local, keep, BT, BT)
            raw = load_rows(decay_ptr + row * (HG * K), local, HG * K, columns, keep, K, BK)
            k = load_rows(k_ptr + row * stride_kt, local, stride_kt, columns, keep, K, BK)
            log = raw.to(tl.float32) * LOG2E
            if DOTS & 1:
                decayed = running_sum((local[:, None] >= local[None, :]).to(tl.bfloat16), raw, TERMS) * LOG2E
            else:
                decayed = tl.cumsum(log, 0)
            if STRONG:
                writer = tl.exp2(tl.sum(log, 0)[None, :] - decayed)
            else:
                at_whole = factor_ptr + ((start // BT + item + last - 1 - step) * H + head) * K + columns
                whole = tl.load(at_whole, mask=in_k, other=1.0)[None, :]
                writer = tl.exp2(-decayed) * whole
            if BONUS:
                reader = tl.exp2(decayed - log)
            else:
                reader = tl.exp2(decayed)
            dqs = tl.load(dqs_ptr + at_chunk + at, mask=inside, other=0.0).to(tl.float32)
            dq = dqs * reader
            if WRITERS:
                dscores_transposed = tl.trans(dscores)
                q = load_rows(q_ptr + row * stride_qt, local, stride_qt, columns, keep, K, BK)
                dks = tl.load(dks_ptr + at_chunk + at, mask=inside, other=0.0).to(tl.float32)
                dk = dks * writer
                if DECAY_GRADIENT:
                    # Products of a pair use operands rounded as the dots round them: then q dq and k dk cancel in the
                    # suffix sum, where rounding errors would otherwise pile up.
                    read = (q * reader).to(DOT).to(tl.float32) * dqs
                    product = read - (k * writer).to(DOT).to(tl.float32) * dks
            if not STRONG:
                unscale = 1.0 / whole
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
                if DOTS & 2:
                    # Through the triangle that the decay's sums take, which stays in registers.
                    through = (local[:, None] >= local[None, :]).to(tl.bfloat16)
                    prefix = running_sum(through, product, 3 if tl.float32 == DOT else 2)
                    gradient = (carry + total)[None, :] - prefix + product
                else:
                    gradient = (carry + total)[None, :] - tl.cumsum(product, 0) + product
                if BONUS:
                    gradient -= read
                tl.store(ddecay_ptr + at_chunk + at, gradient.to(ddecay_ptr.dtype.element_ty), mask=inside)
                carry += total
            if BONUS:
                own = tl.sum(tl.where(diagonal, dscores.to(tl.float32), 0.0), 1)[:, None]
                dq += own * bonus[None, :] * k
                dk += own * bonus[None, :] * q
                dbonus += tl.sum(own * q * k, 0)
            tl.store(dq_ptr + at_chunk + at, dq.to(dq_ptr.dtype.element_ty), mask=inside)
            if WRITERS:
                tl.store(dk_ptr + at_chunk + at, dk.to(dk_ptr.dtype.element_ty), mask=inside)
        if BONUS:
            if mine:
                tl.store(dbonus_ptr + slot, dbonus, mask=in_k)
