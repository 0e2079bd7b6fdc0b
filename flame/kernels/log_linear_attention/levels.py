"""The fast path: every level beyond a chunk is one call of the plain op, so that its kernels do the work.

A level of blocks of b tokens lets the second half of each run of 2 b tokens read the first half. That is the plain recurrence
over documents of 2 b tokens of which only the first half writes: a decayed sum with keys of zero in the second half, or the
delta rule with values of zero there, which goes on erasing. Levels within a chunk are dense, recomputed in the backward.
Costs log2(T / 64) plain passes. There are no states here: those are for `chunked`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flame.kernels.delta_rule import delta_rule
from flame.kernels.linear_attention import linear_attention
from flame.kernels.linear_attention.packing import chunk_table, join
from flame.kernels.log_linear_attention.chunked import CHUNK, make_chunks
from flame.kernels.log_linear_attention.problem import Problem, level_table


def by_levels(p: Problem) -> Tensor:
    """o [B, T, H, V] in v's dtype of a problem without initial states."""
    longest = p.q.shape[1]
    o = cast(Tensor, checkpoint(within_chunks, p, use_reentrant=False, preserve_rng_state=False))
    packed = pack(p)
    position, half, level = positions(packed), CHUNK, CHUNK.bit_length()
    rows = o.new_zeros(packed.v.shape, dtype=p.compute_dtype)
    while half < longest:
        second = ((position // half) % 2).view(1, -1, 1)  # 1 where a token lies in the second half of its run
        weight = packed.weights[..., min(level, p.levels - 1)].to(p.compute_dtype) * second
        rows = rows + weight.unsqueeze(-1) * one_level(packed, second.unsqueeze(-1), run_bounds(packed, 2 * half))
        half, level = 2 * half, level + 1
    return (o + rows.view(o.shape)).to(p.v.dtype)


def pack(p: Problem) -> Problem:
    """The rows of a batch as documents of one row."""
    B, T = p.q.shape[:2]
    if p.cu_seqlens is not None:
        return p
    q, k, v, weights, decay, beta = (
        None if x is None else x.flatten(0, 1).unsqueeze(0) for x in (p.q, p.k, p.v, p.weights, p.decay, p.beta)
    )
    bounds = torch.arange(B + 1, device=p.q.device, dtype=torch.int32) * T
    return replace(p, q=q, k=k, v=v, weights=weights, decay=decay, beta=beta, cu_seqlens=bounds)


def positions(p: Problem) -> Tensor:
    """[T] index of every token in its document."""
    bounds = cast(Tensor, p.cu_seqlens).long()
    index = torch.arange(p.q.shape[1], device=bounds.device)
    return index - bounds[(torch.searchsorted(bounds, index, right=True) - 1).clamp(max=len(bounds) - 1)]


def run_bounds(p: Problem, size: int) -> Tensor:
    """Bounds [M + 1] int32 of runs of `size` tokens that restart at every document; surplus ones are empty."""
    bounds = cast(Tensor, p.cu_seqlens).long()
    lengths = bounds[1:] - bounds[:-1]
    counts = (lengths + size - 1) // size
    ends = counts.cumsum(0)
    index = torch.arange(p.q.shape[1] // size + len(lengths) + 1, device=bounds.device)
    document = torch.searchsorted(ends, index, right=True).clamp(max=len(lengths) - 1)
    start = bounds[document] + (index - (ends - counts)[document]) * size
    return torch.where(index < ends[-1], start, bounds[-1]).to(torch.int32)


def one_level(p: Problem, second: Tensor, bounds: Tensor) -> Tensor:
    """[1, T, H, V]: reads of second halves from first halves; of no meaning in first halves."""
    if p.beta is None:
        k = p.k.masked_fill(second.bool(), 0.0)
        return linear_attention(p.q, k, p.v, scalar_decay=p.decay, scale=p.scale, cu_seqlens=bounds)[0]
    v = p.v.masked_fill(second.bool(), 0.0)
    return delta_rule(p.q, p.k, v, p.beta, scalar_decay=p.decay, scale=p.scale, cu_seqlens=bounds)[0]


def within_chunks(p: Problem) -> Tensor:
    """[B, T, H, V] in the compute dtype: what tokens read in their own chunk."""
    table = None if p.cu_seqlens is None else chunk_table(p.cu_seqlens, p.q.shape[1], CHUNK)
    chunks = make_chunks(p, CHUNK, table, open_end=False)
    levels = level_table(CHUNK, p.levels, p.q.device).expand(chunks.scores.shape)
    return join((chunks.scores * chunks.weights.gather(-1, levels)) @ chunks.v, p.q.shape[1], table)
