"""Which tiles of keys FoX's gates let a tile of queries leave out, found in three small kernels.

With u >= |scale q k| over a head, a query's own key has at least the score -u, and each of at most T others at most u plus
its gates. So keys whose base-2 gate sum to a query is below ``-2 u log2(e) + log2(share) - log2(T)`` carry less than `share` of
its weight together (adaptive computation pruning, Lin et al., arXiv 2504.06949).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from flame.kernels.layout import cdiv, power_of_2

SPAN = 512  # rows of which one program takes the largest norm
TILE = 32
LANES = 128


@triton.jit
def _norm_kernel(
    q, k, out, q_row, q_head, k_row, k_head, Tq, Tk, spans, H: tl.constexpr, SPAN: tl.constexpr, TILE: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The largest squared norm of SPAN rows of a head of q `[B, Tq, H, D]` or, beyond its heads, of k `[B, Tk, Hk, D]`: out
    `[B, H + Hk, spans]` fp32."""
    span, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    d = tl.arange(0, BD)
    stride = tl.where(h < H, q_row, k_row)
    T = tl.where(h < H, Tq, Tk)
    x = q + b * Tq * q_row + h * q_head
    if h >= H:
        x = k + b * Tk * k_row + (h - H) * k_head
    most = tl.zeros([TILE], tl.float32)
    for start in range(span * SPAN, tl.minimum((span + 1) * SPAN, T), TILE):
        t = start + tl.arange(0, TILE)
        rows = tl.load(
            x + t.to(tl.int64)[:, None] * stride + d[None, :], mask=(t < T)[:, None] & (d < D)[None, :], other=0.0
        )
        rows = rows.to(tl.float32)
        most = tl.maximum(most, tl.sum(rows * rows, 1))
    tl.store(out + (b * tl.num_programs(1) + h) * spans + span, tl.max(most, 0))


@triton.jit
def _bound_kernel(norms, out, spans, slope, offset, H: tl.constexpr, Hk: tl.constexpr, LANES: tl.constexpr):
    """``slope * largest norm of q * largest norm of k + offset`` of each head: out `[B, H]`."""
    b = tl.program_id(0) // H
    h = tl.program_id(0) % H
    q_most = tl.zeros([LANES], tl.float32)
    k_most = tl.zeros([LANES], tl.float32)
    for start in range(0, spans, LANES):
        n = start + tl.arange(0, LANES)
        q_most = tl.maximum(q_most, tl.load(norms + (b * (H + Hk) + h) * spans + n, mask=n < spans, other=0.0))
        at = norms + (b * (H + Hk) + H + h // (H // Hk)) * spans
        k_most = tl.maximum(k_most, tl.load(at + n, mask=n < spans, other=0.0))
    reach = tl.sqrt(tl.max(q_most, 0)) * tl.sqrt(tl.max(k_most, 0))
    tl.store(out + tl.program_id(0), reach * slope + offset)


@triton.jit
def _search_kernel(
    sums, size, bound, out, Tq, Tk, count, others, STEPS: tl.constexpr, OF_ROWS: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """For each tile of queries the first key it has to see, or, with OF_ROWS, for each tile of keys the end of the rows
    that have to see it. Gates only add up, so both are found by bisection."""
    row = tl.program_id(0).to(tl.int64)
    high = sums + row * Tk
    low = high + size
    limit = tl.load(bound + row)
    n = tl.program_id(1) * LANES + tl.arange(0, LANES)
    mine = tl.minimum(n * BN + BN - 1, Tk - 1) if OF_ROWS else tl.minimum(n * BM + (Tk - Tq), Tk - 1)
    own_high = tl.load(high + mine)
    own_low = tl.load(low + mine)
    least = tl.zeros([LANES], tl.int32)
    most = least + others
    for _ in range(STEPS):
        middle = (least + most) // 2
        open_ = least < most
        if OF_ROWS:
            at = tl.minimum(middle * BM + (Tk - Tq), Tk - 1)
            apart = (tl.load(high + at) - own_high) + (tl.load(low + at) - own_low)
            further = apart >= limit
        else:
            at = tl.minimum(middle * BN + BN - 1, Tk - 1)
            apart = (own_high - tl.load(high + at)) + (own_low - tl.load(low + at))
            further = apart < limit
        least = tl.where(open_ & further, middle + 1, least)
        most = tl.where(open_ & (further == 0), middle, most)
    tl.store(out + row * count + n, least * (BM if OF_ROWS else BN), mask=n < count)


def threshold(q: Tensor, k: Tensor, scale: float, share: float) -> Tensor:
    """`[B, H]` fp32: the base-2 gate sum below which keys can be left out. q and k as `triton_flash.as_rows` leaves them."""
    (B, Tq, H, D), (Tk, Hk) = q.shape, k.shape[1:3]
    spans = cdiv(Tk, SPAN)
    norms, out = q.new_empty(B, H + Hk, spans, dtype=torch.float32), q.new_empty(B, H, dtype=torch.float32)
    _norm_kernel[spans, H + Hk, B](
        q, k, norms, q.stride(1), q.stride(2), k.stride(1), k.stride(2), Tq, Tk, spans, H=H, SPAN=SPAN, TILE=TILE, D=D,
        BD=max(16, power_of_2(D)),
    )  # fmt: skip
    slope, offset = -2 * math.log2(math.e) * abs(scale), math.log2(share) - math.log2(Tk)
    _bound_kernel[(B * H,)](norms, out, spans, slope, offset, H=H, Hk=Hk, LANES=LANES, num_warps=1)
    return out


def first_keys(sums: Tensor, bound: Tensor, queries: int, BM: int, BN: int) -> Tensor:
    """`[B, H, tiles]` int32: the first key, a multiple of BN, that each tile of BM queries has to see."""
    return _search(sums, bound, queries, BM, BN, False)


def last_rows(sums: Tensor, bound: Tensor, queries: int, BM: int, BN: int) -> Tensor:
    """`[B, H, tiles]` int32: the end of the query rows, a multiple of BM, that have to see each tile of BN keys."""
    return _search(sums, bound, queries, BM, BN, True)


def _search(sums: Tensor, bound: Tensor, queries: int, BM: int, BN: int, of_rows: bool) -> Tensor:
    B, H, keys = sums.shape[1:]
    row_tiles, key_tiles = cdiv(queries, BM), cdiv(keys, BN)
    count, others = (key_tiles, row_tiles) if of_rows else (row_tiles, key_tiles)
    out = torch.empty(B, H, count, dtype=torch.int32, device=sums.device)
    _search_kernel[B * H, cdiv(count, LANES)](
        sums, B * H * keys, bound, out, queries, keys, count, others, STEPS=others.bit_length(), OF_ROWS=of_rows,
        BM=BM, BN=BN, LANES=LANES,
    )  # fmt: skip
    return out
