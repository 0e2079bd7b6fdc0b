"""Backward pass, block by block like the forward pass: keys and values gather their queries; queries sum their parts.

A piece of a bucket owns its block's keys and walks the queries that chose them. Where one tile holds the whole block it
also leaves each query's part of dq; larger blocks take dq from a pass with the forward's shape. Buckets with several pieces
(the first block, which every query sees) leave partial sums that are added in a fixed order, so results repeat bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from flame.kernels import tiles
from flame.kernels.block_attention.triton_common import LOG2E, Sizes, gathered_entries, load_rows, precision, store_rows
from flame.kernels.block_attention.triton_forward import OP, tile_key
from flame.kernels.block_attention.triton_layout import Blocks, Entries, cut
from flame.kernels.layout import cdiv, power_of_2

ROWS_PER_PIECE = 4096


@triton.jit
def _delta_kernel(o, do, delta, rows, V: tl.constexpr, BV: tl.constexpr, BR: tl.constexpr):
    """Sum over channels of o * do, a row each."""
    r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    ok = r < rows
    product = load_rows(o, r, ok, V, BV).to(tl.float32) * load_rows(do, r, ok, V, BV).to(tl.float32)
    tl.store(delta + r, tl.sum(product, 1), mask=ok)


@triton.jit
def _query_kernel(
    q, k, v, do, lse, delta, order, offsets, bucket_at, begin_at, starts, ends, part, first, S, NB, scale,
    H: tl.constexpr, Hk: tl.constexpr, Hs: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    GR: tl.constexpr, GP: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BQ: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a block adds to dq / scale of the queries that chose it."""
    bucket = tl.load(bucket_at + tl.program_id(0))
    begin = tl.load(begin_at + tl.program_id(0))
    end = tl.minimum(begin + BQ, tl.load(offsets + bucket + 1))
    if begin < end:
        head, block = bucket // NB, bucket % NB
        start, stop = tl.load(starts + block), tl.load(ends + block)
        row, t, h, ok = gathered_entries(order, begin, end, first, S, Hs, GR, GP, BQ * GP)
        own = t.to(tl.int64) * H + h
        queries, grads = load_rows(q, own, ok, K, BK), load_rows(do, own, ok, V, BV)
        weight, shift = tl.load(lse + own, mask=ok, other=0.0), tl.load(delta + own, mask=ok, other=0.0)
        dq = tl.zeros([BQ * GP, BK], tl.float32)
        for j0 in range(start, tl.minimum(stop, tl.max(tl.where(ok, t, 0), 0) + 1), BN):
            j = j0 + tl.arange(0, BN)
            keys = load_rows(k, j.to(tl.int64) * Hk + head, j < stop, K, BK)
            values = load_rows(v, j.to(tl.int64) * Hk + head, j < stop, V, BV)
            s = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
            seen = (j[None, :] <= t[:, None]) & (j < stop)[None, :] & ok[:, None]
            p = tl.where(seen, tl.exp2(s - weight[:, None]), 0.0)
            dp = tl.dot(grads, tl.trans(values), input_precision=PRECISION)
            ds = (p * (dp - shift[:, None])).to(keys.dtype)
            dq += tl.dot(ds, keys, input_precision=PRECISION)
        store_rows(part, row, ok, dq, K, BK)


@triton.jit
def _key_kernel(
    q, k, v, do, lse, delta, order, offsets, bucket_at, begin_at, slot_at, starts, ends, part, dk, dv, dk_part, dv_part,
    first, S, NB, SIZE, LENGTH, scale, softmax_scale,
    H: tl.constexpr, Hk: tl.constexpr, Hs: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    GR: tl.constexpr, GP: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BQ: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr, WITH_DQ: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """dk and dv of BN keys of a block from a piece of its bucket, in fp32; all products have the keys in their rows."""
    piece = tl.program_id(0)
    bucket, begin, slot = tl.load(bucket_at + piece), tl.load(begin_at + piece), tl.load(slot_at + piece)
    end = tl.minimum(begin + LENGTH, tl.load(offsets + bucket + 1))
    head, block = bucket // NB, bucket % NB
    start, stop = tl.load(starts + block), tl.load(ends + block)
    j = start + tl.program_id(1) * BN + tl.arange(0, BN)
    inside = (j < stop) & (j < start + SIZE)
    if begin < end:
        keys = load_rows(k, j.to(tl.int64) * Hk + head, inside, K, BK)
        values = load_rows(v, j.to(tl.int64) * Hk + head, inside, V, BV)
        sum_k, sum_v = tl.zeros([BN, BK], tl.float32), tl.zeros([BN, BV], tl.float32)
        for i in range(begin, end, BQ):
            row, t, h, ok = gathered_entries(order, i, end, first, S, Hs, GR, GP, BQ * GP)
            own = t.to(tl.int64) * H + h
            queries, grads = load_rows(q, own, ok, K, BK), load_rows(do, own, ok, V, BV)
            weight, shift = tl.load(lse + own, mask=ok, other=0.0), tl.load(delta + own, mask=ok, other=0.0)
            s = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * scale
            seen = (j[:, None] <= t[None, :]) & inside[:, None] & ok[None, :]
            p = tl.where(seen, tl.exp2(s - weight[None, :]), 0.0)
            sum_v += tl.dot(p.to(grads.dtype), grads, input_precision=PRECISION)
            dp = tl.dot(values, tl.trans(grads), input_precision=PRECISION)
            ds = (p * (dp - shift[None, :])).to(queries.dtype)
            sum_k += tl.dot(ds, queries, input_precision=PRECISION)
            if WITH_DQ:
                # [K, rows] from ds as it lies: a transposed accumulator must not be an operand.
                dq = tl.dot(tl.trans(keys), ds, input_precision=PRECISION)
                store_rows(part, row, ok, tl.trans(dq), K, BK)
        sum_k *= softmax_scale
        if slot < 0:
            own = j.to(tl.int64) * Hk + head
            if ADD:
                sum_k += load_rows(dk, own, inside, K, BK)
                sum_v += load_rows(dv, own, inside, V, BV)
            store_rows(dk, own, inside, sum_k, K, BK)
            store_rows(dv, own, inside, sum_v, V, BV)
        else:
            own = slot.to(tl.int64) * SIZE + j - start
            store_rows(dk_part, own, inside, sum_k, K, BK)
            store_rows(dv_part, own, inside, sum_v, V, BV)


@triton.jit
def _sum_pieces_kernel(
    slots, starts, ends, x_part, x, NB, SIZE,
    Hk: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Adds the partial sums of a bucket with several pieces."""
    bucket = tl.program_id(0)
    low, high = tl.load(slots + bucket), tl.load(slots + bucket + 1)
    if low < high:
        head, block = bucket // NB, bucket % NB
        start, stop = tl.load(starts + block), tl.load(ends + block)
        j = start + tl.program_id(1) * BN + tl.arange(0, BN)
        inside = (j < stop) & (j < start + SIZE)
        own = j.to(tl.int64) * Hk + head
        total = tl.zeros([BN, BD], tl.float32)
        if ADD:
            total += load_rows(x, own, inside, D, BD)
        for slot in range(low, high):
            total += load_rows(x_part, slot * SIZE + j - start, inside, D, BD)
        store_rows(x, own, inside, total, D, BD)


@triton.jit
def _join_queries_kernel(
    choices, part, dq, rows, first_row, S, scale, K: tl.constexpr, GR: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
    ADD: tl.constexpr,
):  # fmt: skip
    """The sum of each query's parts times `scale`, added to dq or in its place."""
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    ok = r < rows
    pair, g = r // GR, r % GR
    total = tl.zeros([BR, BK], tl.float32)
    for s in range(S):
        there = ok & (tl.load(choices + pair * S + s, mask=ok, other=-1) >= 0)
        total += load_rows(part, (pair * S + s) * GR + g, there, K, BK).to(tl.float32)
    total *= scale
    if ADD:
        total += load_rows(dq, first_row + r, ok, K, BK).to(tl.float32)
    store_rows(dq, first_row + r, ok, total, K, BK)


def row_sums(o: Tensor, do: Tensor) -> Tensor:
    """delta = sum(o * do) over the last dimension, fp32, of contiguous `[..., V]`."""
    V, rows = o.shape[-1], o.numel() // o.shape[-1]
    BV = max(16, power_of_2(V))
    BR = max(1, 4096 // BV)
    delta = o.new_empty(o.shape[:-1], dtype=torch.float32)
    _delta_kernel[(cdiv(rows, BR),)](o, do, delta, rows, V=V, BV=BV, BR=BR)
    return delta


def differentiate(
    tensors: tuple[Tensor, ...], entries: Entries, blocks: Blocks, sizes: Sizes, dq: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; tensors are q, k, v, do, lse, delta. A dq that is given is added to, in place."""
    q, k, v = tensors[:3]
    add, more = entries.bands > 1, dq is not None
    dq = torch.empty_like(q) if dq is None else dq
    dk, dv = (torch.zeros_like(x, dtype=torch.float32 if add else x.dtype) for x in (k, v))
    part = q.new_empty(min(entries.band, blocks.tokens) * sizes.H * entries.choices.shape[2], sizes.K)
    keys = KeyPass(tensors, entries, blocks, sizes, (part, dk, dv))
    queries = None if keys.fused else _query_pass(tensors, entries, blocks, sizes, part)
    BK = max(16, power_of_2(sizes.K))
    BR = max(1, 2048 // BK)
    for band, (first, last) in enumerate(entries.queries()):
        if queries is not None:
            queries(band, first)
        keys(band, first)
        rows = (last - first) * sizes.H
        _join_queries_kernel[(cdiv(rows, BR),)](
            entries.choices[first], part, dq, rows, first * sizes.H, entries.choices.shape[2], sizes.scale, K=sizes.K,
            GR=sizes.rows, BK=BK, BR=BR, ADD=more,
        )  # fmt: skip
    return dq, dk.to(k.dtype), dv.to(v.dtype)


class KeyPass:
    """Adds to dk and dv what the queries of a band give, and, if fused, leaves their parts of dq."""

    def __init__(
        self, tensors: tuple[Tensor, ...], entries: Entries, blocks: Blocks, sizes: Sizes, out: tuple[Tensor, ...]
    ) -> None:
        q = tensors[0]
        key = tile_key("keys", sizes, blocks.size, q.dtype)
        tile = dict(tiles.choose(OP, key, key_tile(sizes, blocks.size), q.device))
        queries = sizes.queries(tile.pop("BM"))
        # With K = 192 on an H200 under Triton 3.6 the parts of dq left here were wrong, with K = 256 an illegal access.
        self.fused = tile["BN"] >= blocks.size and sizes.K <= 128
        self.pieces = cut(entries, max(queries, ROWS_PER_PIECE // power_of_2(sizes.rows)))
        self.tensors, self.entries, self.blocks, self.sizes = tensors, entries, blocks, sizes
        self.part, self.dk, self.dv = out
        slots = self.pieces.most_slots * blocks.size
        self.partial = [x.new_empty(slots, x.shape[-1], dtype=torch.float32) for x in (self.dk, self.dv)]
        self.options = {**sizes.constants(), "BQ": queries, "PRECISION": precision(q), "WITH_DQ": self.fused, **tile}

    def __call__(self, band: int, first: int) -> None:
        blocks, sizes, add, size = self.blocks, self.sizes, self.entries.bands > 1, self.blocks.size
        pieces = self.pieces
        _key_kernel[self.pieces.count, cdiv(size, self.options["BN"])](
            *self.tensors, self.entries.order, self.entries.offsets[band], pieces.bucket[band], pieces.begin[band],
            pieces.slot[band], blocks.starts, blocks.ends, self.part, self.dk, self.dv, *self.partial,
            first, self.entries.choices.shape[2], blocks.count, size, pieces.length, sizes.scale * LOG2E, sizes.scale, ADD=add,
            **self.options,
        )  # fmt: skip
        for x_part, x in zip(self.partial, (self.dk, self.dv)):
            BD, BN = max(16, power_of_2(x.shape[-1])), max(1, min(32, power_of_2(size)))
            _sum_pieces_kernel[self.entries.buckets, cdiv(size, BN)](
                pieces.slots[band], blocks.starts, blocks.ends, x_part, x, blocks.count, size, Hk=sizes.Hk, D=x.shape[-1],
                BD=BD, BN=BN, ADD=add,
            )  # fmt: skip


def _query_pass(
    tensors: tuple[Tensor, ...], entries: Entries, blocks: Blocks, sizes: Sizes, part: Tensor
) -> Callable[[int, int], None]:
    """Writes the parts of dq of a band's queries."""
    q = tensors[0]
    key = tile_key("queries", sizes, blocks.size, q.dtype)
    tile = dict(tiles.choose(OP, key, query_tile(sizes, blocks.size), q.device))
    queries = sizes.queries(tile.pop("BM"))
    pieces = cut(entries, queries)

    def run(band: int, first: int) -> None:
        _query_kernel[(pieces.count,)](
            *tensors, entries.order, entries.offsets[band], pieces.bucket[band], pieces.begin[band], blocks.starts,
            blocks.ends, part, first, entries.choices.shape[2], blocks.count, sizes.scale * LOG2E, **sizes.constants(),
            BQ=queries, PRECISION=precision(q), **tile,
        )  # fmt: skip

    return run


def key_tile(sizes: Sizes, block_size: int) -> dict[str, int]:
    wide = max(sizes.K, sizes.V) > 128
    return {
        "BM": max(16, power_of_2(sizes.rows), 32 if wide else 64),
        "BN": max(16, min(64, power_of_2(block_size))),
        "num_warps": 8 if wide else 4,
        "num_stages": 1 if wide else 2,
    }


def query_tile(sizes: Sizes, block_size: int) -> dict[str, int]:
    wide = max(sizes.K, sizes.V) > 128
    return {
        "BM": max(16, power_of_2(sizes.rows), 64 if wide else 128),
        "BN": max(16, min(32 if wide else 64, power_of_2(block_size))),
        "num_warps": 8,
        "num_stages": 2,
    }
