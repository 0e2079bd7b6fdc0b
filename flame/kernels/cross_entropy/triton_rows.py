"""Row kernel of the cross-entropies: logits `[n, V]` in, loss, statistics and gradients out. One program a row.

A row is read in tiles, once for its max and sum of exponentials and again for the gradient. At the vocabularies in use the
second reading comes from the L1 cache (V = 32000: 64 KB) or the L2 (V = 128256: 256 KB a row, 132 rows in flight), so device
memory sees one read and one write of the logits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from flame.kernels import tiles
from flame.kernels.cross_entropy.options import Statistics, Terms
from flame.kernels.layout import cdiv, power_of_2

_IGNORED = tl.constexpr(-100)
_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _capped(x, soft_cap):
    """soft_cap * tanh(x / soft_cap); exact in the limits, where the exponential is 0 or inf."""
    return soft_cap - 2.0 * soft_cap / (tl.exp2(x * (2.0 * _LOG2E / soft_cap)) + 1.0)


@triton.jit
def _tile(start, BLOCK: tl.constexpr):
    """Columns of a tile `[BLOCK / 8, 8]`: eight adjacent ones a thread, so that sums along them need no other thread."""
    return start + 8 * tl.arange(0, BLOCK // 8)[:, None] + tl.arange(0, 8)[None, :]


@triton.jit
def _logits(row, column, V, V_padded, soft_cap, CAP: tl.constexpr, EVEN: tl.constexpr, KEEP: tl.constexpr):
    """One tile of a row in fp32, -inf past its end. V_padded, a multiple of 16, keeps the loads wide for any V."""
    policy: tl.constexpr = "evict_last" if KEEP else "evict_first"
    s = tl.load(row + column, mask=column < V_padded, other=float("-inf"), eviction_policy=policy).to(tl.float32)
    if CAP:
        s = _capped(s, soft_cap)
    if CAP or not EVEN:
        s = tl.where(column < V, s, float("-inf"))
    return s


@triton.jit
def _scan(
    row, V, V_padded, soft_cap, CAP: tl.constexpr, EVEN: tl.constexpr, SUM: tl.constexpr, UNROLL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """(logsumexp, max, sum) of a row. Every thread keeps its own running max, so that no tile waits for all threads."""
    largest = tl.full((BLOCK // 8,), -1e38, tl.float32)
    total = tl.zeros((BLOCK // 8,), tl.float32)
    summed = tl.zeros((BLOCK // 8,), tl.float32)
    for start in tl.range(0, V, BLOCK, loop_unroll_factor=UNROLL):
        column = _tile(start, BLOCK)
        s = _logits(row, column, V, V_padded, soft_cap, CAP, EVEN, True)
        higher = tl.maximum(largest, tl.max(s, axis=1))
        exponent = s * _LOG2E - (higher * _LOG2E)[:, None]
        total = total * tl.exp2((largest - higher) * _LOG2E) + tl.sum(tl.exp2(exponent), axis=1)
        largest = higher
        if SUM:
            summed += tl.sum(tl.where(column < V, s, 0.0), axis=1)
    top = tl.max(largest, axis=0)
    total = tl.sum(total * tl.exp2((largest - top) * _LOG2E), axis=0)
    return top + tl.log2(total) / _LOG2E, top, tl.sum(summed, axis=0)


@triton.jit
def _find(row, value, V, V_padded, soft_cap, CAP: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr):
    """First column of a row that holds `value`."""
    first = tl.full((BLOCK // 8,), 2147483647, tl.int32)
    for start in range(0, V, BLOCK):
        column = _tile(start, BLOCK)
        s = _logits(row, column, V, V_padded, soft_cap, CAP, EVEN, True)
        first = tl.minimum(first, tl.min(tl.where(s == value, column, 2147483647), axis=1))
    return tl.min(first, axis=0)


@triton.jit
def _gradient(s, column, target, largest_at, lse, largest, factor, confidence, even, z_loss, l2_warp, soft_cap,
              CAP: tl.constexpr, WARP: tl.constexpr):  # fmt: skip
    """factor * d loss / d logits of one tile; the label's column is `target`, outside [0, V) when it is not here."""
    grad = tl.exp2(s * _LOG2E - lse * _LOG2E) * (factor * (1.0 + 2.0 * z_loss * lse)) - factor * even
    grad = tl.where(column == target, grad - factor * confidence, grad)
    if WARP:
        grad = tl.where(column == largest_at, grad + factor * l2_warp * largest, grad)
    if CAP:
        grad *= 1.0 - (s / soft_cap) * (s / soft_cap)
    return grad


@triton.jit(do_not_specialize=["first_column"])
def rows_kernel(
    logits, out, labels, loss, stats, largest_index, factor_ptr,
    logits_stride, out_stride, V, V_padded, V_total, first_column,
    confidence, even, z_loss, l2_warp, soft_cap,
    SCAN: tl.constexpr, WRITE: tl.constexpr, LOSS: tl.constexpr, CAP: tl.constexpr, SUM: tl.constexpr,
    WARP: tl.constexpr, EVEN: tl.constexpr, UNROLL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row. SCAN makes stats (lse, target logit, sum, max), else they are read; LOSS and WRITE say what is stored."""
    index = tl.program_id(0).to(tl.int64)
    row = logits + index * logits_stride
    label = tl.load(labels + index).to(tl.int64)
    valid = label != _IGNORED
    target = (label - first_column).to(tl.int32)
    here = valid & (target >= 0) & (target < V)
    target = tl.where(here, target, -1)
    largest_at = -1
    if SCAN:
        # Before the scan, whose reductions are barriers: later, another thread may have overwritten this logit in place.
        target_logit = tl.load(row + target, mask=here, other=0.0).to(tl.float32)
        if CAP:
            target_logit = tl.where(here, _capped(target_logit, soft_cap), 0.0)
        lse, largest, summed = _scan(row, V, V_padded, soft_cap, CAP, EVEN, SUM, UNROLL, BLOCK)
        if WARP:
            largest_at = _find(row, largest, V, V_padded, soft_cap, CAP, EVEN, BLOCK)
        if LOSS:
            value = lse - confidence * target_logit - even * summed + z_loss * lse * lse
            value = tl.where((label >= 0) & (label < V_total), value, float("nan"))  # a label that does not exist
            tl.store(loss + index, tl.where(valid, value, 0.0))
        if not WRITE:
            tl.store(stats + index * 4, lse)
            tl.store(stats + index * 4 + 1, target_logit)
            tl.store(stats + index * 4 + 2, summed)
            tl.store(stats + index * 4 + 3, largest)
            if largest_index is not None and WARP:
                tl.store(largest_index + index, largest_at)
    else:
        lse = tl.load(stats + index * 4)
        largest = tl.load(stats + index * 4 + 3)
        if WARP:
            largest_at = tl.load(largest_index + index)
    if WRITE:
        factor = 1.0
        if factor_ptr is not None:
            factor = tl.load(factor_ptr).to(tl.float32)
        for start in tl.range(0, V, BLOCK, loop_unroll_factor=UNROLL):
            column = _tile(start, BLOCK)
            s = _logits(row, column, V, V_padded, soft_cap, CAP, EVEN, False)
            grad = _gradient(s, column, target, largest_at, lse, largest, factor, confidence, even, z_loss, l2_warp,
                             soft_cap, CAP, WARP)  # fmt: skip
            grad = tl.where(valid, grad, 0.0).to(out.dtype.element_ty)
            tl.store(out + index * out_stride + column, grad, mask=column < V_padded)


@lru_cache(maxsize=64)
def tile_key(vocabulary: int) -> str:
    """Key of the row kernel's tile."""
    return tiles.key("rows", V=power_of_2(vocabulary))


@lru_cache(maxsize=64)
def default_tile(vocabulary: int) -> dict[str, int]:
    """BLOCK: columns read at a time, at least 16. UNROLL: tiles in flight."""
    if vocabulary <= 4096:
        return {"BLOCK": max(16, power_of_2(vocabulary)), "num_warps": 4, "UNROLL": 1}
    return {"BLOCK": 8192, "num_warps": 16, "UNROLL": 1}


@dataclass
class Rows:
    """What one launch reads and writes; a tensor that is None is not touched."""

    logits: Tensor  # [n, V], rows may be padded
    labels: Tensor  # [n]
    out: Tensor | None = None  # gradients like logits, may be logits
    loss: Tensor | None = None  # fp32 [n]
    stats: Tensor | None = None  # fp32 [n, 4]: lse, target logit, sum, max
    largest: Tensor | None = None  # int32 [n]: column of the max, for l2_warp
    factor: Tensor | None = None  # scalar on the device that scales the gradient
    first_column: int = 0  # of this shard of the vocabulary
    vocabulary: int | None = None  # of all shards


def padded_columns(logits: Tensor) -> int:
    """V rounded up to 16 if that many columns of every row are memory of their own, else V."""
    n, V = logits.shape
    wide = -(-V // 16) * 16
    end = (logits.storage_offset() + n * logits.stride(0)) * logits.element_size()
    return wide if wide <= logits.stride(0) and end <= logits.untyped_storage().nbytes() else V


def launch(rows: Rows, terms: Terms, scan: bool) -> None:
    """Run the kernel over all rows."""
    n, V = rows.logits.shape
    tile = tiles.choose("cross_entropy", tile_key(V), default_tile(V), rows.logits.device)
    total = rows.vocabulary or V
    out = rows.out if rows.out is not None else rows.logits
    padded = padded_columns(rows.logits) if out is rows.logits else V
    rows_kernel[(n,)](
        rows.logits, out, rows.labels, rows.loss, rows.stats, rows.largest, rows.factor,
        rows.logits.stride(0), out.stride(0), V, padded, total, rows.first_column,
        1.0 - terms.label_smoothing, terms.label_smoothing / total, terms.z_loss, terms.l2_warp, terms.soft_cap,
        SCAN=scan, WRITE=rows.out is not None, LOSS=rows.loss is not None, CAP=terms.soft_cap > 0,
        SUM=terms.label_smoothing > 0, WARP=terms.l2_warp > 0, EVEN=padded == V, **tile,
    )  # fmt: skip


def cross_entropy_rows(logits: Tensor, labels: Tensor, terms: Terms, write: bool) -> Tensor:
    """Loss of each row (fp32), and with `write` their gradients in place of the logits."""
    loss = logits.new_empty(len(logits), dtype=torch.float32)
    stats = None if write else logits.new_empty(len(logits), 4, dtype=torch.float32)
    launch(Rows(logits, labels, out=logits if write else None, loss=loss, stats=stats), terms, scan=True)
    return loss


def statistics(logits: Tensor, labels: Tensor, terms: Terms, first_column: int = 0) -> Statistics:
    """Of logits `[n, V]`, whose columns begin at `first_column` of the vocabulary."""
    stats = logits.new_empty(len(logits), 4, dtype=torch.float32)
    largest = torch.full_like(labels, -1, dtype=torch.int32)
    launch(Rows(logits, labels, stats=stats, largest=largest, first_column=first_column), terms, scan=True)
    return Statistics(*stats.unbind(1), largest)


def gradient(
    logits: Tensor, labels: Tensor, of: Statistics, terms: Terms, vocabulary: int, first_column: int
) -> Tensor:
    """d loss / d logits in place of the logits, given the statistics of the whole rows."""
    rows = Rows(logits, labels, logits, stats=_packed(of), largest=of.largest_at.to(torch.int32))
    launch(replace(rows, first_column=first_column, vocabulary=vocabulary), terms, scan=False)
    return logits


def gradient_from(logits: Tensor, labels: Tensor, of: Statistics, terms: Terms, out: Tensor, factor: Tensor) -> Tensor:
    """factor * d loss / d logits into `out`, leaving the logits as they are; factor is a scalar on the device."""
    stats = _packed(of)
    launch(Rows(logits, labels, out, stats=stats, largest=of.largest_at, factor=factor), terms, scan=False)
    return out


def _packed(of: Statistics) -> Tensor:
    return torch.stack([of.lse, of.target, of.summed, of.largest], dim=1)


@triton.jit
def _scale_kernel(source, out, factor_ptr, size, BLOCK: tl.constexpr):
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    factor = tl.load(factor_ptr).to(tl.float32)
    value = tl.load(source + offset, mask=offset < size).to(tl.float32) * factor
    tl.store(out + offset, value.to(out.dtype.element_ty), mask=offset < size)


def scaled(source: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """source * factor rounded once to `dtype`; the factor is read on the device, in its own precision."""
    out = torch.empty_like(source, dtype=dtype)
    block = 4096
    _scale_kernel[(cdiv(source.numel(), block),)](source, out, factor, source.numel(), BLOCK=block, num_warps=8)
    return out
