"""The compressed branch on a GPU: queries attend to the means of the blocks that end at or before them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flame.kernels import tiles
from flame.kernels.block_attention.triton_common import LOG2E, Sizes, load_rows, precision, store_rows
from flame.kernels.block_attention.triton_layout import Blocks
from flame.kernels.layout import cdiv, power_of_2

OP = "native_sparse_attention"


@triton.jit
def _query_tile(
    origin, base, tokens, SIZE, H: tl.constexpr, GR: tl.constexpr, GP: tl.constexpr, BQ: tl.constexpr, tile, head
):
    """Rows of a tile of BQ queries: (row of [tokens, H], whether there is one, first block and end of what it sees)."""
    r = tl.arange(0, BQ * GP)
    t = tile * BQ + r // GP
    ok = (t < tokens) & (r % GP < GR)
    low = tl.load(base + t, mask=ok, other=2147483647)
    seen = (t - tl.load(origin + t, mask=ok, other=0) + 1) // SIZE
    return t.to(tl.int64) * H + head * GR + r % GP, ok, low, tl.where(ok, low + seen, 0)


@triton.jit
def _forward_kernel(
    q, means, values, origin, base, o, lse, tokens, SIZE, scale,
    H: tl.constexpr, Hk: tl.constexpr, Hs: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    GR: tl.constexpr, GP: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BQ: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    # The last queries see most blocks: they start first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    row, ok, low, high = _query_tile(origin, base, tokens, SIZE, H, GR, GP, BQ, tile, head)
    queries = load_rows(q, row, ok, K, BK)
    most = tl.full([BQ * GP], -float("inf"), tl.float32)
    total = tl.zeros([BQ * GP], tl.float32)
    sum_ = tl.zeros([BQ * GP, BV], tl.float32)
    last = tl.max(high, 0)
    for c0 in range(tl.min(low, 0), last, BC):
        c = c0 + tl.arange(0, BC)
        block = c.to(tl.int64) * Hk + head
        s = tl.dot(queries, tl.trans(load_rows(means, block, c < last, K, BK)), input_precision=PRECISION) * scale
        s = tl.where((c[None, :] >= low[:, None]) & (c[None, :] < high[:, None]), s, -float("inf"))
        now = tl.maximum(most, tl.max(s, 1))
        shift = tl.where(now == -float("inf"), 0.0, now)
        p, shrink = tl.exp2(s - shift[:, None]), tl.exp2(most - shift)
        total = total * shrink + tl.sum(p, 1)
        rows = load_rows(values, block, c < last, V, BV)
        sum_ = sum_ * shrink[:, None] + tl.dot(p.to(rows.dtype), rows, input_precision=PRECISION)
        most = now
    some = tl.where(total > 0, total, 1.0)
    store_rows(o, row, ok, sum_ / some[:, None], V, BV)
    tl.store(lse + row, tl.where(total > 0, most + tl.log2(some), 0.0), mask=ok)


@triton.jit
def _query_kernel(
    q, means, values, do, lse, delta, origin, base, dq, tokens, SIZE, scale, softmax_scale,
    H: tl.constexpr, Hk: tl.constexpr, Hs: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    GR: tl.constexpr, GP: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BQ: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    row, ok, low, high = _query_tile(origin, base, tokens, SIZE, H, GR, GP, BQ, tile, head)
    queries, grads = load_rows(q, row, ok, K, BK), load_rows(do, row, ok, V, BV)
    weight, shift = tl.load(lse + row, mask=ok, other=0.0), tl.load(delta + row, mask=ok, other=0.0)
    sum_ = tl.zeros([BQ * GP, BK], tl.float32)
    last = tl.max(high, 0)
    for c0 in range(tl.min(low, 0), last, BC):
        c = c0 + tl.arange(0, BC)
        block = c.to(tl.int64) * Hk + head
        keys, rows = load_rows(means, block, c < last, K, BK), load_rows(values, block, c < last, V, BV)
        s = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
        seen = (c[None, :] >= low[:, None]) & (c[None, :] < high[:, None])
        p = tl.where(seen, tl.exp2(s - weight[:, None]), 0.0)
        dp = tl.dot(grads, tl.trans(rows), input_precision=PRECISION)
        sum_ += tl.dot((p * (dp - shift[:, None])).to(keys.dtype), keys, input_precision=PRECISION)
    store_rows(dq, row, ok, sum_ * softmax_scale, K, BK)


@triton.jit
def _mean_kernel(
    q, means, values, do, lse, delta, origin, base, starts, finish, dmeans, dvalues, tokens, SIZE, NB, SPAN, scale,
    softmax_scale,
    H: tl.constexpr, Hk: tl.constexpr, Hs: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    GR: tl.constexpr, GP: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BQ: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of BC means from the SPAN queries of one split, fp32 `[splits, NB, Hk, .]`; the means lie in the rows."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    head, split = tl.program_id(1), tl.program_id(2)
    inside = c < NB
    block = c.to(tl.int64) * Hk + head
    keys, rows = load_rows(means, block, inside, K, BK), load_rows(values, block, inside, V, BV)
    sum_k, sum_v = tl.zeros([BC, BK], tl.float32), tl.zeros([BC, BV], tl.float32)
    # Tiles of queries count from token 0, so the first may begin before the split does: `t >= begin` cuts it.
    begin = tl.load(starts + tl.program_id(0) * BC) + SIZE - 1 + split * SPAN
    end = tl.minimum(begin + SPAN, tl.max(tl.load(finish + c, mask=inside, other=0), 0))
    for tile in range(begin // BQ, tl.cdiv(end, BQ)):
        row, ok, low, high = _query_tile(origin, base, tokens, SIZE, H, GR, GP, BQ, tile, head)
        t = tile * BQ + tl.arange(0, BQ * GP) // GP
        ok = ok & (t >= begin) & (t < end)
        queries, grads = load_rows(q, row, ok, K, BK), load_rows(do, row, ok, V, BV)
        weight, shift = tl.load(lse + row, mask=ok, other=0.0), tl.load(delta + row, mask=ok, other=0.0)
        s = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * scale
        seen = (c[:, None] >= low[None, :]) & (c[:, None] < high[None, :]) & ok[None, :]
        p = tl.where(seen, tl.exp2(s - weight[None, :]), 0.0)
        sum_v += tl.dot(p.to(grads.dtype), grads, input_precision=PRECISION)
        dp = tl.dot(rows, tl.trans(grads), input_precision=PRECISION)
        sum_k += tl.dot((p * (dp - shift[None, :])).to(queries.dtype), queries, input_precision=PRECISION)
    out = (split * NB + c).to(tl.int64) * Hk + head
    store_rows(dmeans, out, inside, sum_k * softmax_scale, K, BK)
    store_rows(dvalues, out, inside, sum_v, V, BV)


def attend(q: Tensor, means: Tensor, values: Tensor, blocks: Blocks, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """o `[B, T, H, V]`, zero for queries that see no block, and log2 of the softmax sums `[B, T, H]`."""
    o, lse = q.new_empty(*q.shape[:3], sizes.V), q.new_empty(q.shape[:3], dtype=torch.float32)
    tile, queries = _tile("compressed", q, sizes, 128, 8)
    _forward_kernel[cdiv(blocks.tokens, queries), sizes.Hk](
        q, means, values, blocks.origin, blocks.base, o, lse, blocks.tokens, blocks.size, sizes.scale * LOG2E,
        **sizes.constants(), BQ=queries, PRECISION=precision(q), **tile,
    )  # fmt: skip
    return o, lse


def differentiate(tensors: tuple[Tensor, ...], blocks: Blocks, sizes: Sizes) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, means and values; tensors are q, means, values, do, lse, delta."""
    q, means, values = tensors[:3]
    dq = torch.empty_like(q)
    tile, queries = _tile("compressed_queries", q, sizes, 128, 8)
    options = {**sizes.constants(), "PRECISION": precision(q)}
    _query_kernel[cdiv(blocks.tokens, queries), sizes.Hk](
        *tensors, blocks.origin, blocks.base, dq, blocks.tokens, blocks.size, sizes.scale * LOG2E, sizes.scale, **options,
        BQ=queries, **tile,
    )  # fmt: skip
    tile, queries = _tile("compressed_means", q, sizes, 64, 4, 64)
    parts = cdiv(blocks.count, tile["BC"])
    span = split_span(blocks, parts * sizes.Hk, tiles.multiprocessors(q.device))
    # From the first block of a part to the end of its last one's document.
    splits = cdiv(min(blocks.tokens, (blocks.columns + tile["BC"]) * blocks.size), span)
    dmeans = means.new_empty(splits, *means.shape, dtype=torch.float32)
    dvalues = values.new_empty(splits, *values.shape, dtype=torch.float32)
    _mean_kernel[parts, sizes.Hk, splits](
        *tensors, blocks.origin, blocks.base, blocks.starts, blocks.finish, dmeans, dvalues, blocks.tokens, blocks.size,
        blocks.count, span, sizes.scale * LOG2E, sizes.scale, **options, BQ=queries, **tile,
    )  # fmt: skip
    return dq, dmeans.sum(0).to(means.dtype), dvalues.sum(0).to(values.dtype)


def split_span(blocks: Blocks, programs: int, multiprocessors: int) -> int:
    """Queries of a split, so that about four programs fall on each multiprocessor."""
    wanted = cdiv(8 * multiprocessors, programs)  # half of the programs see no query
    return max(128, min(8192, power_of_2(cdiv(blocks.tokens, wanted))))


def _tile(name: str, q: Tensor, sizes: Sizes, rows: int, warps: int, columns: int = 32) -> tuple[dict[str, int], int]:
    """The tile without its rows, and how many queries those hold."""
    wide = max(sizes.K, sizes.V) > 128
    rows = rows // 2 if wide else rows
    default = {
        "BM": max(16, power_of_2(sizes.rows), rows),
        "BC": columns if wide else 64,
        "num_warps": 8 if wide else warps,
        "num_stages": 2,
    }
    key = tiles.key(name, D=sizes.K, E=sizes.V, rows=sizes.rows, dtype=q.dtype)
    tile = dict(tiles.choose(OP, key, default, q.device))
    return tile, sizes.queries(tile.pop("BM"))
