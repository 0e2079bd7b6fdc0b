"""What a chunk's sweep needs and does not depend on its state: decays, lengths, the inverted system, the scores."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
BLOCK = tl.constexpr(16)  # rows inverted by substitution before blocks are merged

# Kinds of decay.
NONE = tl.constexpr(0)
SCALAR = tl.constexpr(1)
KEY = tl.constexpr(2)

# Rows of `vectors` [chunks, H, 6, C] fp32.
TOTAL = tl.constexpr(0)  # G: log2 decay since the chunk's start, the row included
BETA = tl.constexpr(1)
Q_LENGTH = tl.constexpr(2)  # scale / length of q
K_LENGTH = tl.constexpr(3)  # 1 / length of k
READ = tl.constexpr(4)  # G without the row's own decay, where the erase read is exclusive
A_LENGTH = tl.constexpr(5)  # 1 / length of the erase key, where there is one
ROWS = tl.constexpr(6)


@triton.jit
def tile_of(ptr, row, stride, column, keep, inside, WHOLE: tl.constexpr = False):
    """Tile [rows, columns] at the base `ptr`, 0 outside; offsets within a chunk fit 32 bits, which saves registers.

    WHOLE: every column is inside, so that only rows need a mask."""
    mask = keep[:, None] if WHOLE else keep[:, None] & inside[None, :]
    return tl.load(ptr + row[:, None] * stride + column[None, :], mask=mask, other=0.0)


@triton.jit
def state_tile(ptr, channel, stride, column, in_keys, inside, WHOLE: tl.constexpr):
    """Tile [keys, values] of a state; WHOLE: no channel of it is padding."""
    at = ptr + channel[:, None] * stride + column[None, :]
    if WHOLE:
        tile = tl.load(at)
    else:
        tile = tl.load(at, mask=in_keys[:, None] & inside[None, :], other=0.0)
    return tile


@triton.jit
def pivot_row(length, C: tl.constexpr):
    """Row whose decay the others of a moderate chunk are taken from; 0 of an empty chunk."""
    return tl.maximum(tl.minimum(length, C // 2) - 1, 0)


@triton.jit
def square_sum(x):
    wide = x.to(tl.float32)
    return tl.sum(wide * wide, 1)


@triton.jit
def invert_diagonal(d0, d1, d2, d3):
    """(I + d)^-1 of four strictly lower triangular fp32 [BLOCK, BLOCK], side by side, by substitution.

    Once row m is solved its multiples are taken off the rows below; what is picked never has to change its layout."""
    system = tl.join(tl.join(d0, d1), tl.join(d2, d3))
    index = tl.arange(0, BLOCK)
    row = index[:, None, None, None]
    column = index[None, :, None, None]
    inverse = tl.where(row == column, 1.0, 0.0) + tl.zeros_like(system)
    for m in range(BLOCK - 1):
        factor = tl.sum(tl.where(column == m, system, 0.0), 1)
        solved = tl.sum(tl.where(row == m, inverse, 0.0), 0)
        inverse -= factor[:, None, :, :] * solved[None, :, :, :]
    left, right = tl.split(inverse)
    d0, d1 = tl.split(left)
    d2, d3 = tl.split(right)
    return d0, d1, d2, d3


@triton.jit
def times(x, y, PRECISION: tl.constexpr):
    return tl.dot(x, y, input_precision=PRECISION)


@triton.jit
def invert(system, PRECISION: tl.constexpr):
    """(I + system)^-1, both as the ten blocks of a lower triangle, row by row; system's diagonal blocks strictly lower.

    Substitution throughout: the inverse is well scaled, but powers of the system are not (64 equal keys, beta near 2)."""
    l00, l10, l11, l20, l21, l22, l30, l31, l32, l33 = system
    t00, t11, t22, t33 = invert_diagonal(l00, l11, l22, l33)
    t10 = -times(t11, times(l10, t00, PRECISION), PRECISION)
    t21 = -times(t22, times(l21, t11, PRECISION), PRECISION)
    t32 = -times(t33, times(l32, t22, PRECISION), PRECISION)
    t20 = -times(t22, times(l20, t00, PRECISION) + times(l21, t10, PRECISION), PRECISION)
    t31 = -times(t33, times(l31, t11, PRECISION) + times(l32, t21, PRECISION), PRECISION)
    rest = times(l30, t00, PRECISION) + times(l31, t10, PRECISION) + times(l32, t20, PRECISION)
    t30 = -times(t33, rest, PRECISION)
    return t00, t10, t11, t20, t21, t22, t30, t31, t32, t33


@triton.jit
def store_block(ptr, x, i: tl.constexpr, j: tl.constexpr, C: tl.constexpr):
    """Store block (i, j) of a chunk's matrix [C, C], and zeros in its mirror above the diagonal."""
    index = tl.arange(0, BLOCK)
    cell = index[:, None] * C + index[None, :]
    dtype: tl.constexpr = ptr.dtype.element_ty
    tl.store(ptr + (i * C + j) * BLOCK + cell, x.to(dtype))
    if i != j:
        tl.store(ptr + (j * C + i) * BLOCK + cell, tl.zeros([BLOCK, BLOCK], dtype))


@triton.jit
def prepare(
    q_ptr,
    k_ptr,
    a_ptr,  # erase key
    beta_ptr,  # [T, H]
    decay_ptr,  # [T, H]; with a decay per key channel [T, H, K], log2 since the chunk's start
    moderate_ptr,  # [chunks, H], with a decay per key channel: others are left to prepare_keys
    chunk_ptr,  # [chunks, 2] first token, tokens
    vector_ptr,
    inverse_ptr,  # [chunks, H, C, C]
    score_ptr,  # [chunks, H, C, C]
    scale,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_at,
    stride_ah,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    K: tl.constexpr,
    SLICE: tl.constexpr,  # channels of a key at a time
    C: tl.constexpr,
    DECAY: tl.constexpr,
    HAS_BETA: tl.constexpr,
    ERASE: tl.constexpr,
    EXCLUSIVE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    NORM_EPS: tl.constexpr,
    DOT: tl.constexpr,
    MERGE: tl.constexpr,  # precision of fp32 products
):
    """A chunk by blocks of rows, so that only its lower triangle is formed and one or two warps hold it."""
    program = tl.program_id(0)
    chunk, head = program // H, program % H
    start = tl.load(chunk_ptr + 2 * chunk).to(tl.int64)
    length = tl.load(chunk_ptr + 2 * chunk + 1)
    index = tl.arange(0, BLOCK)
    if DECAY == KEY:
        if tl.load(moderate_ptr + program) == 0:
            return
        decay_ptr += (start * H + head) * K
    q_ptr += start * stride_qt + (head // GROUP) * stride_qh
    k_ptr += start * stride_kt + (head // GROUP) * stride_kh
    if ERASE:
        a_ptr += start * stride_at + (head // GROUP) * stride_ah
    vector_ptr += program.to(tl.int64) * (ROWS * C)
    cell = program.to(tl.int64) * (C * C)
    score_ptr += cell
    inverse_ptr += cell
    lengths = ()
    totals = ()
    system = ()
    before = 0.0  # total of the rows before the block
    for i in tl.static_range(C // BLOCK):
        row = i * BLOCK + index
        keep = row < length
        q_length = tl.zeros([BLOCK], tl.float32)
        k_length = tl.zeros([BLOCK], tl.float32)
        a_length = tl.zeros([BLOCK], tl.float32)
        products = ()  # Q K^T and A K^T of the blocks of columns up to the diagonal
        for _ in tl.static_range(2 * i + 2):
            products = products + (tl.zeros([BLOCK, BLOCK], tl.float32),)
        for offset in range(0, K, SLICE):
            channel = offset + tl.arange(0, SLICE)
            in_keys = channel < K
            q = tile_of(q_ptr, row, stride_qt, channel, keep, in_keys, K % SLICE == 0)
            k = tile_of(k_ptr, row, stride_kt, channel, keep, in_keys, K % SLICE == 0)
            a = k
            if ERASE:
                a = tile_of(a_ptr, row, stride_at, channel, keep, in_keys, K % SLICE == 0)
            if NORMALIZE:
                q_length += square_sum(q)
                k_length += square_sum(k)
                a_length += square_sum(a)
            if DECAY == KEY:
                # Both factors are moderate, of rows beyond the end (which are 0) too.
                at = tile_of(decay_ptr, row, H * K, channel, keep, in_keys, K % SLICE == 0)
                pivot = tl.load(decay_ptr + pivot_row(length, C) * H * K + channel, mask=in_keys, other=0.0)
                read_at = at
                if EXCLUSIVE:
                    later = keep & (row > 0)
                    read_at = tile_of(decay_ptr - H * K, row, H * K, channel, later, in_keys, K % SLICE == 0)
                q = (q * tl.exp2(at - pivot[None, :])).to(k.dtype)
                a = (a * tl.exp2(read_at - pivot[None, :])).to(k.dtype)
                k = (k * tl.exp2(pivot[None, :] - at)).to(k.dtype)
            sums = ()
            for j in tl.static_range(i + 1):
                key = k
                if j < i:
                    column = j * BLOCK + index
                    inside = column < length
                    key = tile_of(k_ptr, column, stride_kt, channel, inside, in_keys, K % SLICE == 0)
                    if DECAY == KEY:
                        at = tile_of(decay_ptr, column, H * K, channel, inside, in_keys, K % SLICE == 0)
                        key = (key * tl.exp2(pivot[None, :] - at)).to(k.dtype)
                key = tl.trans(key)
                sums = sums + (
                    tl.dot(q, key, products[2 * j], input_precision=DOT),
                    tl.dot(a, key, products[2 * j + 1], input_precision=DOT),
                )
            products = sums
        if NORMALIZE:
            q_length = tl.rsqrt(q_length + NORM_EPS)
            k_length = tl.rsqrt(k_length + NORM_EPS)
            a_length = tl.rsqrt(a_length + NORM_EPS)
        else:
            q_length += 1.0
            k_length += 1.0
            a_length += 1.0
        q_length = q_length * scale
        vector = vector_ptr + row
        tl.store(vector + Q_LENGTH * C, q_length)
        tl.store(vector + K_LENGTH * C, k_length)
        if ERASE:
            tl.store(vector + A_LENGTH * C, a_length)
        beta = tl.full([BLOCK], 1.0, tl.float32)
        if HAS_BETA:
            beta = tl.load(beta_ptr + (start + row) * H + head, mask=keep, other=0.0).to(tl.float32)
        tl.store(vector + BETA * C, beta)
        total = tl.zeros([BLOCK], tl.float32)
        read = total
        if DECAY == NONE:
            tl.store(vector + TOTAL * C, total)
        if DECAY == SCALAR:
            log = tl.load(decay_ptr + (start + row) * H + head, mask=keep, other=0.0).to(tl.float32) * LOG2E
            total = before + tl.cumsum(log, 0)
            before += tl.sum(log, 0)
            read = total
            tl.store(vector + TOTAL * C, total)
            if EXCLUSIVE:
                read = total - log
                tl.store(vector + READ * C, read)
        lengths = lengths + (k_length,)
        totals = totals + (total,)
        for j in tl.static_range(i + 1):
            s = products[2 * j] * q_length[:, None] * lengths[j][None, :]
            m = products[2 * j + 1] * (a_length * beta)[:, None] * lengths[j][None, :]
            if DECAY == SCALAR:
                # Exponents above the diagonal would overflow.
                s = s * tl.exp2(tl.minimum(total[:, None] - totals[j][None, :], 0.0))
                m = m * tl.exp2(tl.minimum(read[:, None] - totals[j][None, :], 0.0))
            if i == j:
                s = tl.where(index[:, None] >= index[None, :], s, 0.0)
                m = tl.where(index[:, None] > index[None, :], m, 0.0)
            store_block(score_ptr, s, i, j, C)
            system = system + (m,)
    inverse = invert(system, MERGE)
    for i in tl.static_range(C // BLOCK):
        for j in tl.static_range(i + 1):
            store_block(inverse_ptr, inverse[i * (i + 1) // 2 + j], i, j, C)
