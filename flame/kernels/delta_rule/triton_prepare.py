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
def inverse_length(x, NORM_EPS: tl.constexpr):
    wide = x.to(tl.float32)
    return tl.rsqrt(tl.sum(wide * wide, 1) + NORM_EPS)


@triton.jit
def invert(system, C: tl.constexpr, PRECISION: tl.constexpr):
    """(I + system)^-1 of a strictly lower triangular fp32 [C, C].

    Diagonal blocks of 16 rows by substitution, all at once; then, with D their inverse and N = D * rest (whose fourth
    power vanishes), (I + N)^-1 D = (I - N)(I + N^2) D.
    """
    BLOCKS: tl.constexpr = C // BLOCK
    index = tl.arange(0, BLOCK)
    block = tl.arange(0, BLOCKS)
    own = (block[:, None] == block[None, :])[:, None, :, None]  # [block, 1, block, 1]
    folded = tl.reshape(system, (BLOCKS, BLOCK, BLOCKS, BLOCK))
    diagonal = tl.sum(tl.where(own, folded, 0.0), 2)  # [block, row, column]
    small = tl.where(index[:, None] == index[None, :], 1.0, 0.0)[None, :, :] + tl.zeros_like(diagonal)
    for i in range(1, BLOCK):
        picked = (index == i)[None, :, None]
        weights = tl.sum(tl.where(picked, diagonal, 0.0), 1)  # row i of every block
        update = tl.sum(weights[:, :, None] * small, 1)
        small = tl.where(picked, small - update[:, None, :], small)
    row = tl.arange(0, C)
    inside = (row[:, None] // BLOCK) == (row[None, :] // BLOCK)
    inverse = tl.reshape(tl.where(own, small[:, :, None, :], 0.0), (C, C))
    rest = tl.where(inside, 0.0, system)
    nilpotent = tl.dot(inverse, rest, input_precision=PRECISION)
    square = tl.dot(nilpotent, nilpotent, input_precision=PRECISION)
    inverse = tl.dot(square, inverse, inverse, input_precision=PRECISION)
    return inverse - tl.dot(nilpotent, inverse, input_precision=PRECISION)


@triton.jit
def prepare(
    q_ptr,
    k_ptr,
    a_ptr,  # erase key
    beta_ptr,  # [T, H]
    decay_ptr,  # [T, H]
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
    BK: tl.constexpr,
    C: tl.constexpr,
    DECAY: tl.constexpr,
    HAS_BETA: tl.constexpr,
    ERASE: tl.constexpr,
    EXCLUSIVE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    NORM_EPS: tl.constexpr,
    DOT: tl.constexpr,
    EXACT: tl.constexpr,  # merge the inverted blocks with three tf32 products instead of one
):
    program = tl.program_id(0)
    chunk, head = program // H, program % H
    start = tl.load(chunk_ptr + 2 * chunk).to(tl.int64)
    length = tl.load(chunk_ptr + 2 * chunk + 1)
    row = tl.arange(0, C)
    keep = row < length
    channel = tl.arange(0, BK)
    in_keys = channel < K
    q = tile_of(
        q_ptr + start * stride_qt + (head // GROUP) * stride_qh, row, stride_qt, channel, keep, in_keys, K == BK
    )
    k = tile_of(
        k_ptr + start * stride_kt + (head // GROUP) * stride_kh, row, stride_kt, channel, keep, in_keys, K == BK
    )
    vector = vector_ptr + program.to(tl.int64) * (ROWS * C) + row
    q_length = tl.full([C], 1.0, tl.float32)
    k_length = tl.full([C], 1.0, tl.float32)
    if NORMALIZE:
        q_length = inverse_length(q, NORM_EPS)
        k_length = inverse_length(k, NORM_EPS)
    a_length = k_length
    q_length = q_length * scale
    tl.store(vector + Q_LENGTH * C, q_length)
    tl.store(vector + K_LENGTH * C, k_length)
    beta = tl.full([C], 1.0, tl.float32)
    if HAS_BETA:
        beta = tl.load(beta_ptr + (start + row) * H + head, mask=keep, other=0.0).to(tl.float32)
    tl.store(vector + BETA * C, beta)

    keys = tl.trans(k)
    scores = tl.dot(q, keys, input_precision=DOT) * q_length[:, None] * k_length[None, :]
    if ERASE:
        a_ptr += start * stride_at + (head // GROUP) * stride_ah
        a = tile_of(a_ptr, row, stride_at, channel, keep, in_keys, K == BK)
        if NORMALIZE:
            a_length = inverse_length(a, NORM_EPS)
        tl.store(vector + A_LENGTH * C, a_length)
        system = tl.dot(a, keys, input_precision=DOT)
    else:
        system = tl.dot(k, keys, input_precision=DOT)
    system = system * (a_length * beta)[:, None] * k_length[None, :]
    lower = row[:, None] >= row[None, :]
    below = row[:, None] > row[None, :]
    if DECAY == SCALAR:
        log = tl.load(decay_ptr + (start + row) * H + head, mask=keep, other=0.0).to(tl.float32) * LOG2E
        total = tl.cumsum(log, 0)
        read = total
        tl.store(vector + TOTAL * C, total)
        if EXCLUSIVE:
            read = total - log
            tl.store(vector + READ * C, read)
        scores = scores * tl.exp2(tl.where(lower, total[:, None] - total[None, :], 0.0))
        system = system * tl.exp2(tl.where(below, read[:, None] - total[None, :], 0.0))
    scores = tl.where(lower, scores, 0.0)
    system = tl.where(below, system, 0.0)
    cell = program.to(tl.int64) * (C * C) + row[:, None] * C + row[None, :]
    tl.store(score_ptr + cell, scores.to(score_ptr.dtype.element_ty))
    PRECISION: tl.constexpr = "tf32x3" if EXACT else "tf32"
    tl.store(inverse_ptr + cell, invert(system, C, PRECISION).to(inverse_ptr.dtype.element_ty))
