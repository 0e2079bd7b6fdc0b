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
def times(x, y, PRECISION: tl.constexpr):
    return tl.dot(x, y, input_precision=PRECISION)


@triton.jit
def form_scores(
    q_ptr,
    k_ptr,
    a_ptr,  # erase key
    beta_ptr,  # [T, H]
    decay_ptr,  # [T, H]
    chunk_ptr,  # [chunks, 2] first token, tokens
    vector_ptr,
    system_ptr,  # [chunks, H, C, C] fp32, written at and left of the blocks of BLOCK rows on the diagonal
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
):
    program = tl.program_id(0)
    chunk, head = program // H, program % H
    start = tl.load(chunk_ptr + 2 * chunk).to(tl.int64)
    length = tl.load(chunk_ptr + 2 * chunk + 1)
    row = tl.arange(0, C)
    keep = row < length
    q_ptr += start * stride_qt + (head // GROUP) * stride_qh
    k_ptr += start * stride_kt + (head // GROUP) * stride_kh
    if ERASE:
        a_ptr += start * stride_at + (head // GROUP) * stride_ah
    vector = vector_ptr + program.to(tl.int64) * (ROWS * C) + row
    # Asked for before anything is used, so that the loads run side by side.
    beta = tl.full([C], 1.0, tl.float32)
    if HAS_BETA:
        beta = tl.load(beta_ptr + (start + row) * H + head, mask=keep, other=0.0).to(tl.float32)
    if DECAY == SCALAR:
        log = tl.load(decay_ptr + (start + row) * H + head, mask=keep, other=0.0).to(tl.float32) * LOG2E
    scores = tl.zeros([C, C], tl.float32)
    system = tl.zeros([C, C], tl.float32)
    q_length = tl.zeros([C], tl.float32)
    k_length = tl.zeros([C], tl.float32)
    a_length = tl.zeros([C], tl.float32)
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
            if ERASE:
                a_length += square_sum(a)
        scores = tl.dot(q, tl.trans(k), scores, input_precision=DOT)
        system = tl.dot(a, tl.trans(k), system, input_precision=DOT)
    if NORMALIZE:
        q_length = tl.rsqrt(q_length + NORM_EPS)
        k_length = tl.rsqrt(k_length + NORM_EPS)
        a_length = tl.rsqrt(a_length + NORM_EPS)
    else:
        q_length += 1.0
        k_length += 1.0
        a_length += 1.0
    q_length = q_length * scale
    tl.store(vector + Q_LENGTH * C, q_length)
    tl.store(vector + K_LENGTH * C, k_length)
    if ERASE:
        tl.store(vector + A_LENGTH * C, a_length)
    else:
        a_length = k_length
    tl.store(vector + BETA * C, beta)
    scores = scores * q_length[:, None] * k_length[None, :]
    system = system * (a_length * beta)[:, None] * k_length[None, :]
    if DECAY == NONE:
        tl.store(vector + TOTAL * C, tl.zeros([C], tl.float32))
    if DECAY == SCALAR:
        total = tl.cumsum(log, 0)
        tl.store(vector + TOTAL * C, total)
        # Exponents above the diagonal would overflow.
        decay = tl.exp2(tl.minimum(total[:, None] - total[None, :], 0.0))
        scores = scores * decay
        if EXCLUSIVE:
            read = total - log
            tl.store(vector + READ * C, read)
            decay = tl.exp2(tl.minimum(read[:, None] - total[None, :], 0.0))
        system = system * decay
    cell = program.to(tl.int64) * (C * C) + row[:, None] * C + row[None, :]
    scores = tl.where(row[:, None] >= row[None, :], scores, 0.0)
    tl.store(score_ptr + cell, scores.to(score_ptr.dtype.element_ty))
    system = tl.where(row[:, None] > row[None, :], system, 0.0)
    tl.store(system_ptr + cell, system, mask=row[:, None] // BLOCK >= row[None, :] // BLOCK)


@triton.jit
def load_block(ptr, i, j, C: tl.constexpr, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    return tl.load(ptr + (i * C + j) + index[:, None] * C + index[None, :])


@triton.jit
def put_block(ptr, x, i, j, C: tl.constexpr, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    tl.store(ptr + (i * C + j) + index[:, None] * C + index[None, :], x.to(ptr.dtype.element_ty))


@triton.jit
def invert_systems(
    system_ptr,  # [chunks, H, C, C] fp32, strictly lower; overwritten
    inverse_ptr,  # [chunks, H, C, C]
    C: tl.constexpr,
    MERGE: tl.constexpr,  # precision of fp32 products
):
    """(I + system)^-1: blocks of BLOCK rows by substitution, a column a lane, then pairs of blocks and pairs of pairs.

    Substitution, because the inverse is well scaled, but powers of the system are not (64 equal keys, beta near 2)."""
    cell = tl.program_id(0).to(tl.int64) * (C * C)
    system_ptr += cell
    inverse_ptr += cell
    lane = tl.arange(0, C)
    column = lane % BLOCK
    corner = system_ptr + (lane // BLOCK) * (BLOCK * C + BLOCK)  # of the lane's block
    solved = ()
    for i in tl.static_range(BLOCK):
        x = tl.where(column == i, 1.0, 0.0)
        for j in tl.static_range(i):
            x -= tl.load(corner + (i * C + j)) * solved[j]
        solved = solved + (x,)
    tl.debug_barrier()
    for i in tl.static_range(BLOCK):
        tl.store(corner + i * C + column, solved[i])
    tl.debug_barrier()
    HALF: tl.constexpr = 2 * BLOCK
    for pair in tl.static_range(2):
        at = pair * HALF
        left = load_block(system_ptr, at, at, C, BLOCK)
        below = load_block(system_ptr, at + BLOCK, at, C, BLOCK)
        right = load_block(system_ptr, at + BLOCK, at + BLOCK, C, BLOCK)
        put_block(system_ptr, -times(right, times(below, left, MERGE), MERGE), at + BLOCK, at, C, BLOCK)
        put_block(system_ptr, tl.zeros([BLOCK, BLOCK], tl.float32), at, at + BLOCK, C, BLOCK)
    tl.debug_barrier()
    left = load_block(system_ptr, 0, 0, C, HALF)
    below = load_block(system_ptr, HALF, 0, C, HALF)
    right = load_block(system_ptr, HALF, HALF, C, HALF)
    below = -times(right, times(below, left, MERGE), MERGE)
    put_block(inverse_ptr, left, 0, 0, C, HALF)
    put_block(inverse_ptr, right, HALF, HALF, C, HALF)
    put_block(inverse_ptr, below, HALF, 0, C, HALF)
    put_block(inverse_ptr, tl.zeros([HALF, HALF], tl.float32), 0, HALF, C, HALF)
