"""Forward pass: every block meets the queries that chose it, gathered into full tiles; then each query joins its parts.

Walking key blocks in the outer loop lets a tile of the tensor core hold queries from anywhere, so that a group of any size
fills it and a block's keys are read once a tile and not once a query.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flame.kernels import tiles
from flame.kernels.block_attention.triton_common import LOG2E, Sizes, gathered_entries, load_rows, precision, store_rows
from flame.kernels.block_attention.triton_layout import Blocks, Entries, cut
from flame.kernels.layout import cdiv, power_of_2

OP = "block_attention"


@triton.jit
def _part_kernel(
    q, k, v, order, offsets, bucket_at, begin_at, starts, ends, part, lse, first, S, NB, scale,
    H: tl.constexpr, Hk: tl.constexpr, Hs: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    GR: tl.constexpr, GP: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BQ: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention of up to BQ entries of a bucket to its block: outputs normalised in the block, and log2 of the weight."""
    bucket = tl.load(bucket_at + tl.program_id(0))
    begin = tl.load(begin_at + tl.program_id(0))
    end = tl.minimum(begin + BQ, tl.load(offsets + bucket + 1))
    if begin < end:
        head, block = bucket // NB, bucket % NB
        start, stop = tl.load(starts + block), tl.load(ends + block)
        row, t, h, ok = gathered_entries(order, begin, end, first, S, Hs, GR, GP, BQ * GP)
        queries = load_rows(q, t.to(tl.int64) * H + h, ok, K, BK)
        most = tl.full([BQ * GP], -float("inf"), tl.float32)
        total = tl.zeros([BQ * GP], tl.float32)
        o = tl.zeros([BQ * GP, BV], tl.float32)
        for j0 in range(start, tl.minimum(stop, tl.max(tl.where(ok, t, 0), 0) + 1), BN):
            j = j0 + tl.arange(0, BN)
            keys = load_rows(k, j.to(tl.int64) * Hk + head, j < stop, K, BK)
            values = load_rows(v, j.to(tl.int64) * Hk + head, j < stop, V, BV)
            s = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
            s = tl.where((j[None, :] <= t[:, None]) & (j < stop)[None, :], s, -float("inf"))
            now = tl.maximum(most, tl.max(s, 1))
            base = tl.where(now == -float("inf"), 0.0, now)
            p = tl.exp2(s - base[:, None])
            shrink = tl.exp2(most - base)
            total = total * shrink + tl.sum(p, 1)
            o = o * shrink[:, None] + tl.dot(p.to(values.dtype), values, input_precision=PRECISION)
            most = now
        some = tl.where(total > 0, total, 1.0)
        store_rows(part, row, ok, o / some[:, None], V, BV)
        tl.store(lse + row, tl.where(total > 0, most + tl.log2(some), -float("inf")), mask=ok)


@triton.jit
def _block_kernel(
    q, k, v, order, offsets, bucket_at, begin_at, starts, ends, part, lse, first, S, NB, LENGTH, scale,
    H: tl.constexpr, Hk: tl.constexpr, Hs: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    GR: tl.constexpr, GP: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BQ: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What `_part_kernel` does, for LENGTH entries of a block of at most BN keys, which are loaded once."""
    bucket = tl.load(bucket_at + tl.program_id(0))
    begin = tl.load(begin_at + tl.program_id(0))
    end = tl.minimum(begin + LENGTH, tl.load(offsets + bucket + 1))
    if begin < end:
        head, block = bucket // NB, bucket % NB
        start, stop = tl.load(starts + block), tl.load(ends + block)
        j = start + tl.arange(0, BN)
        keys = load_rows(k, j.to(tl.int64) * Hk + head, j < stop, K, BK)
        values = load_rows(v, j.to(tl.int64) * Hk + head, j < stop, V, BV)
        for i in range(begin, end, BQ):
            row, t, h, ok = gathered_entries(order, i, end, first, S, Hs, GR, GP, BQ * GP)
            queries = load_rows(q, t.to(tl.int64) * H + h, ok, K, BK)
            s = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
            s = tl.where(((j[None, :] <= t[:, None]) & (j < stop)[None, :]) | (ok[:, None] == 0), s, -float("inf"))
            most = tl.max(s, 1)
            p = tl.exp2(s - most[:, None])
            total = tl.sum(p, 1)
            o = tl.dot(p.to(values.dtype), values, input_precision=PRECISION)
            store_rows(part, row, ok, o / total[:, None], V, BV)
            tl.store(lse + row, most + tl.log2(total), mask=ok)


@triton.jit
def _join_kernel(
    choices, part, part_lse, o, lse, rows, first_row, S,
    V: tl.constexpr, GR: tl.constexpr, BV: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Each row's parts, weighed by their share of its softmax. Row (query, head, g) has parts at ((query, head), slot, g)."""
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    ok = r < rows
    pair, g = r // GR, r % GR
    most = tl.full([BR], -float("inf"), tl.float32)
    for s in range(S):
        there = ok & (tl.load(choices + pair * S + s, mask=ok, other=-1) >= 0)
        most = tl.maximum(most, tl.load(part_lse + (pair * S + s) * GR + g, mask=there, other=-float("inf")))
    base = tl.where(most == -float("inf"), 0.0, most)
    total = tl.zeros([BR], tl.float32)
    sum_ = tl.zeros([BR, BV], tl.float32)
    for s in range(S):
        there = ok & (tl.load(choices + pair * S + s, mask=ok, other=-1) >= 0)
        at = (pair * S + s) * GR + g
        weight = tl.exp2(tl.load(part_lse + at, mask=there, other=-float("inf")) - base)
        sum_ += weight[:, None] * load_rows(part, at, there, V, BV).to(tl.float32)
        total += weight
    some = tl.where(total > 0, total, 1.0)
    store_rows(o, first_row + r, ok, sum_ / some[:, None], V, BV)
    tl.store(lse + first_row + r, tl.where(total > 0, base + tl.log2(some), 0.0), mask=ok)


def attend(q: Tensor, k: Tensor, v: Tensor, entries: Entries, blocks: Blocks, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """o `[B, T, H, V]` and the log2 of every row's softmax sum `[B, T, H]`."""
    whole = power_of_2(blocks.size) <= 64 and max(sizes.K, sizes.V) <= 128
    name, default = ("block", block_tile(sizes)) if whole else ("part", part_tile(sizes, blocks.size))
    tile = dict(tiles.choose(OP, tile_key(name, sizes, blocks.size, q.dtype), default, q.device))
    queries = sizes.queries(tile.pop("BM"))
    length = max(queries, tile.pop("ROWS") // power_of_2(sizes.rows)) if whole else queries
    kernel, length_of_piece = (_block_kernel, (length,)) if whole else (_part_kernel, ())
    pieces, S = cut(entries, length), entries.choices.shape[2]
    o, lse = q.new_empty(*q.shape[:3], sizes.V), q.new_empty(q.shape[:3], dtype=torch.float32)
    parts = min(entries.band, blocks.tokens) * sizes.H * S
    part, part_lse = q.new_empty(parts, sizes.V), lse.new_empty(parts)
    options, scale = {**sizes.constants(), "BQ": queries, "PRECISION": precision(q), **tile}, sizes.scale * LOG2E
    BV = max(16, power_of_2(sizes.V))
    BR = max(1, 2048 // BV)
    for band, (first, last) in enumerate(entries.queries()):
        tables = (
            entries.order,
            entries.offsets[band],
            pieces.bucket[band],
            pieces.begin[band],
            blocks.starts,
            blocks.ends,
        )
        numbers = (first, S, blocks.count, *length_of_piece)
        kernel[(pieces.count,)](q, k, v, *tables, part, part_lse, *numbers, scale, **options)
        rows = (last - first) * sizes.H
        _join_kernel[(cdiv(rows, BR),)](
            entries.choices[first], part, part_lse, o, lse, rows, first * sizes.H, S, V=sizes.V, GR=sizes.rows, BV=BV,
            BR=BR, num_warps=4,
        )  # fmt: skip
    return o, lse


def tile_key(name: str, sizes: Sizes, block_size: int, dtype: torch.dtype) -> str:
    """What a tile is filed under; `rows` are the query heads that share a choice."""
    return tiles.key(name, D=sizes.K, E=sizes.V, rows=sizes.rows, block=block_size, dtype=dtype)


def block_tile(sizes: Sizes) -> dict[str, int]:
    """Of blocks of up to 64 keys; ROWS of a piece."""
    return {"BM": max(16, power_of_2(sizes.rows), 64), "BN": 64, "ROWS": 512, "num_warps": 4, "num_stages": 2}


def part_tile(sizes: Sizes, block_size: int) -> dict[str, int]:
    """A tile that compiles on every GPU of interest."""
    wide = max(sizes.K, sizes.V) > 128
    return {
        "BM": max(16, power_of_2(sizes.rows), 64 if wide else 128),
        "BN": max(16, min(32 if wide else 64, power_of_2(block_size))),
        "num_warps": 8,
        "num_stages": 2,
    }
