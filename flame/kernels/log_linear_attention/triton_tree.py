"""The tree of chunks that the kernels share: where a chunk lies, its position's bits, and how much every node decays.

Chunks of a document are numbered from 0. Node (l, n) of the tree is the run of chunks n 2^l .. (n + 1) 2^l - 1, and chunk c
reads, for every set bit l of c, node (l, (c >> l) - 1), the left sibling of the node that holds c. So only nodes with an even n
have a state; the one whose last chunk is s is kept in slot s, which makes as many slots as chunks (a Fenwick tree). Sums of
decays are kept for all nodes, in order of position: with e = (n + 1) 2^l the chunk behind the node, in cell 2 e - 2^l - 1.
No sum reaches beyond a node, so differences of large sums, which would cancel, occur nowhere.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flame.kernels.linear_attention.triton_scalar import LOG2E


@triton.jit
def place(table_ptr, chunk, tokens, per_row, BT: tl.constexpr, VARLEN: tl.constexpr):
    """First row of a chunk, rows left in its document from there (0 for a chunk that is none), the chunk's position in the
    document, and the document's number of chunks."""
    if VARLEN:
        start = tl.load(table_ptr + chunk * 4).to(tl.int64)
        left = tl.load(table_ptr + chunk * 4 + 1)
        position = tl.load(table_ptr + chunk * 4 + 2)
        count = tl.load(table_ptr + chunk * 4 + 3)
    else:
        position = chunk % per_row
        start = (chunk // per_row).to(tl.int64) * tokens + position * BT
        left = tokens - position * BT
        count = per_row
    return start, left, position, count


@triton.jit
def set_bits(x):
    """How many bits of an int32 >= 0 are set."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    x = x + (x >> 8)
    return (x + (x >> 16)) & 0x3F


@triton.jit
def exponent(x):
    """log2, rounded down, of an integer from 1 to 2^24."""
    return (x.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def reader_levels(position, count):
    """Mask of the levels at which a chunk lies in a left sibling whose right one has chunks: where others read it."""
    x = position ^ (count - 1)
    x = x | (x >> 1)
    x = x | (x >> 2)
    x = x | (x >> 4)
    x = x | (x >> 8)
    x = x | (x >> 16)
    return x & ~position


@triton.jit
def row_level(i, j, L: tl.constexpr, BT: tl.constexpr):
    """Level at which row i of a chunk sees row j, for broadcast i and j: 0 for itself, at most L - 1."""
    level = tl.zeros([BT, BT], tl.int32) + (i != j).to(tl.int32)
    for bit in tl.static_range(1, 8):
        if (1 << bit) < BT:
            level += ((i >> bit) != (j >> bit)).to(tl.int32)
    return tl.minimum(level, L - 1)


@triton.jit(do_not_specialize=["tokens", "per_row"])
def decay_sums(
    decay_ptr,  # [T, H] natural log
    sum_ptr,  # [chunks, H, BT] fp32 cumulative within the chunk, log2; constant beyond the document
    total_ptr,  # [2 chunks, H] fp32, the tree
    table_ptr,
    tokens,
    per_row,
    H: tl.constexpr,
    BH: tl.constexpr,
    BT: tl.constexpr,
    VARLEN: tl.constexpr,
):
    chunk = tl.program_id(0)
    start, left, _, _ = place(table_ptr, chunk, tokens, per_row, BT, VARLEN)
    heads = tl.program_id(1) * BH + tl.arange(0, BH)
    rows = tl.arange(0, BT)
    keep = (rows < left)[:, None] & (heads < H)[None, :]
    log = tl.load(decay_ptr + (start + rows)[:, None] * H + heads[None, :], mask=keep, other=0.0)
    log = log.to(tl.float32) * LOG2E
    at = (chunk.to(tl.int64) * H + heads[None, :]) * BT + rows[:, None]
    tl.store(sum_ptr + at, tl.cumsum(log, 0), mask=(heads < H)[None, :])
    tl.store(total_ptr + chunk.to(tl.int64) * 2 * H + heads, tl.sum(log, 0), mask=heads < H)


@triton.jit(do_not_specialize=["per_row"])
def decay_tree(
    total_ptr,  # [2 chunks, H] fp32: chunks are given, larger nodes are filled in
    documents_ptr,  # [N, 2] first chunk and number of chunks, packed rows only
    per_row,
    H: tl.constexpr,
    BH: tl.constexpr,
    BN: tl.constexpr,
    VARLEN: tl.constexpr,
):
    document = tl.program_id(0)
    if VARLEN:
        first = tl.load(documents_ptr + document * 2)
        count = tl.load(documents_ptr + document * 2 + 1)
    else:
        first = document * per_row
        count = per_row
    heads = tl.program_id(1) * BH + tl.arange(0, BH)
    total_ptr += first.to(tl.int64) * 2 * H + heads[None, :]
    size = 2
    while size <= count:
        nodes = count // size
        for block in range(0, nodes, BN):
            node = block + tl.arange(0, BN)
            keep = (node < nodes)[:, None] & (heads < H)[None, :]
            middle = ((2 * node + 1) * size - 1)[:, None].to(tl.int64) * H
            children = (size // 2) * H
            total = tl.load(total_ptr + middle - children, mask=keep, other=0.0)
            total += tl.load(total_ptr + middle + children, mask=keep, other=0.0)
            tl.store(total_ptr + middle, total, mask=keep)
        tl.debug_barrier()
        size *= 2
