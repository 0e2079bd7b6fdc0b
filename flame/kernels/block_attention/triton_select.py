"""Choosing blocks on the GPU: scores of one band of queries, then for each row the value that the last chosen one has.

A row's threshold is found bit by bit on the scores' order-preserving integers, so there is no sort; what lies above it is
chosen, and as many of its equals as still fit, earlier blocks first. Scores live for one band of queries only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flame.kernels.block_attention.triton_common import LOG2E, Sizes, load_rows, precision
from flame.kernels.block_attention.triton_layout import Blocks
from flame.kernels.layout import cdiv, power_of_2

SCRATCH = 1 << 27  # bytes of scores of one band


@triton.jit
def _score_kernel(
    q, means, lse, origin, base, out, first, last, SIZE, COLUMNS, scale,
    H: tl.constexpr, Hk: tl.constexpr, Hs: tl.constexpr, K: tl.constexpr,
    GR: tl.constexpr, GP: tl.constexpr, BK: tl.constexpr,
    BQ: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr, WEIGHTS: tl.constexpr,
):  # fmt: skip
    """Scores `[n, Hs, COLUMNS]` of the blocks before each query's own: products, or with WEIGHTS the sum over the group
    of the compressed attention's weights."""
    hs = tl.program_id(1)
    head = hs // (Hs // Hk)
    r = tl.arange(0, BQ * GP)
    t = first + tl.program_id(0) * BQ + r // GP
    ok = (t < last) & (r % GP < GR)
    row = t.to(tl.int64) * H + hs * GR + r % GP
    queries = load_rows(q, row, ok, K, BK)
    if WEIGHTS:
        weight = tl.load(lse + row, mask=ok, other=0.0)
    tq = first + tl.program_id(0) * BQ + tl.arange(0, BQ)
    there = tq < last
    start = tl.load(base + tq, mask=there, other=2147483647)
    own = (tq - tl.load(origin + tq, mask=there, other=0)) // SIZE
    low, high = tl.min(start, 0), tl.max(tl.where(there, start + own, 0), 0)
    at = out + ((tq - first).to(tl.int64) * Hs + hs) * COLUMNS - start
    for c0 in range(low, high, BC):
        c = c0 + tl.arange(0, BC)
        keys = load_rows(means, c.to(tl.int64) * Hk + head, c < high, K, BK)
        s = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
        if WEIGHTS:
            s = tl.exp2(s - weight[:, None])
        s = tl.where(ok[:, None], s, 0.0)
        s = tl.sum(tl.reshape(s, [BQ, GP, BC]), 1)
        inside = (
            there[:, None] & (c[None, :] >= start[:, None]) & (c[None, :] < (start + tl.minimum(own, COLUMNS))[:, None])
        )
        tl.store(at[:, None] + c[None, :], s, mask=inside)


@triton.jit
def _select_kernel(
    scores, origin, out, rows, first, SIZE, COLUMNS, Hs: tl.constexpr, S: tl.constexpr, NEIGHBOURS: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The S best blocks of each row (query, head), ascending; `out` holds -1 before."""
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    there = r < rows
    t = first + r // Hs
    own = (t - tl.load(origin + t, mask=there, other=0)) // SIZE
    c = tl.arange(0, BC)
    known = there[:, None] & (c[None, :] < own[:, None])
    score = tl.load(scores + r.to(tl.int64)[:, None] * COLUMNS + c[None, :], mask=known, other=0.0)
    bits = score.to(tl.int32, bitcast=True)
    rank = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # ordered as the scores are
    if NEIGHBOURS:
        rank = tl.where(c[None, :] == 0, 0x7FFFFFFD, rank)
        rank = tl.where(c[None, :] == own[:, None] - 1, 0x7FFFFFFE, rank)
    rank = tl.where(c[None, :] == own[:, None], 0x7FFFFFFF, rank)
    rank = tl.where(c[None, :] > own[:, None], -2147483648, rank)
    wanted = tl.minimum(own + 1, S)
    enough = tl.sum((rank >= 0).to(tl.int32), 1) >= wanted
    least = tl.where(enough, 0, -2147483648)
    for i in range(31):
        trial = least + (1 << (30 - i))
        enough = tl.sum((rank >= trial[:, None]).to(tl.int32), 1) >= wanted
        least = tl.where(enough, trial, least)
    above, equal = rank > least[:, None], rank == least[:, None]
    spare = wanted - tl.sum(above.to(tl.int32), 1)
    chosen = above | (equal & (tl.cumsum(equal.to(tl.int32), 1) <= spare[:, None]))
    slot = tl.cumsum(chosen.to(tl.int32), 1) - 1
    at = out + ((first * Hs + r).to(tl.int64) * S)[:, None] + slot
    tl.store(at, tl.zeros([BR, BC], tl.int32) + c[None, :], mask=chosen & there[:, None])


def choose_blocks(
    q: Tensor, means: Tensor, lse: Tensor | None, blocks: Blocks, sizes: Sizes, count: int, neighbours: bool
) -> Tensor:
    """`[B, T, Hs, count]` as of `selection.select_blocks`, of all queries.

    q: `[B, T, H, K]`. means: `[blocks.count, Hk, K]`, of which only complete blocks are used. lse: log2 sums `[B, T, H]`
    of the compressed attention, whose weights are then the scores; None for plain products.
    """
    out = torch.full((*q.shape[:2], sizes.Hs, count), -1, dtype=torch.int32, device=q.device)
    constants = sizes.constants()
    del constants["V"], constants["BV"]
    BQ, columns = sizes.queries(max(64, constants["GP"])), blocks.columns
    band = max(256, SCRATCH // (4 * sizes.Hs * columns) // 256 * 256)
    scores = torch.empty(min(band, blocks.tokens) * sizes.Hs * columns, dtype=torch.float32, device=q.device)
    scale = sizes.scale * LOG2E if lse is not None else 1.0
    BC = power_of_2(columns)
    BR = max(1, 4096 // BC)
    for first in range(0, blocks.tokens, band):
        last = min(first + band, blocks.tokens)
        _score_kernel[cdiv(last - first, BQ), sizes.Hs](
            q, means, lse, blocks.origin, blocks.base, scores, first, last, blocks.size, columns, scale, **constants,
            BQ=BQ, BC=64, PRECISION=precision(q), WEIGHTS=lse is not None, num_warps=4, num_stages=2,
        )  # fmt: skip
        rows = (last - first) * sizes.Hs
        _select_kernel[(cdiv(rows, BR),)](
            scores, blocks.origin, out, rows, first, blocks.size, columns, Hs=sizes.Hs, S=count, NEIGHBOURS=neighbours,
            BR=BR, BC=BC, num_warps=4 if BC <= 4096 else 8,
        )  # fmt: skip
    return out


def packed_means(x: Tensor, blocks: Blocks) -> Tensor:
    """Means of x `[B, T, H, D]` over each block, `[blocks.count, H, D]` in x.dtype; incomplete blocks are zero."""
    rows, wide = x.flatten(0, 1), torch.promote_types(x.dtype, torch.float32)
    if blocks.count * blocks.size == blocks.tokens:  # rows of whole blocks
        return rows.unflatten(0, (blocks.count, blocks.size)).mean(1, dtype=wide).to(x.dtype)
    place = blocks.starts.long()[:, None] + torch.arange(blocks.size, device=x.device)
    complete = blocks.ends - blocks.starts == blocks.size
    gathered = rows.index_select(0, place.clamp(max=blocks.tokens - 1).flatten()).unflatten(0, place.shape)
    means = gathered.mean(1, dtype=wide)
    return torch.where(complete[:, None, None], means, 0).to(x.dtype)
