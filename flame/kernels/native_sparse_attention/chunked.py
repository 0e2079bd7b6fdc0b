"""NSA's compressed and selected branches on any device: a document at a time, a band of queries at a time.

A band scores its queries against the block means, chooses their blocks from those weights and attends to them; it is
recomputed in the backward pass, so no matrix of all queries against anything is kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flame.kernels.block_attention.chunked import attend_band, band_size, block_means, documents, in_bands
from flame.kernels.block_attention.reference import masked_softmax
from flame.kernels.block_attention.selection import select_blocks

if TYPE_CHECKING:
    from flame.kernels.native_sparse_attention import SparsePattern


def branches(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: SparsePattern,
    scale: float,
    cu_seqlens: Tensor | None,
    means: tuple[Tensor, Tensor] | None = None,
    block_indices: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs `[B, Tq, H, V]` of both branches."""
    if block_indices is None:
        block_indices = q.new_empty(*q.shape[:2], k.shape[2], 0, dtype=torch.int32)  # none given
    split = documents(cu_seqlens, q, k, v, block_indices)
    parts = [_one(dq, dk, dv, di, pattern, scale, means) for dq, dk, dv, di in split]
    compressed, selected = zip(*parts)
    return torch.cat(compressed, 1), torch.cat(selected, 1)


def _one(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    pattern: SparsePattern,
    scale: float,
    means: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    B, queries, H, _ = q.shape
    keys, size = k.shape[1], pattern.block_size
    if queries == 0:
        empty = q.new_empty(*q.shape[:3], v.shape[3])
        return empty, empty
    k_means, v_means = (block_means(k, size), block_means(v, size)) if means is None else means
    wide = torch.promote_types(q.dtype, torch.float32)
    k, v, k_means, v_means = (x.to(wide) for x in (k, v, k_means, v_means))  # once: gradients of bands add up unrounded

    def run(start: int, end: int) -> tuple[Tensor, Tensor]:
        band, first = q[:, start:end], keys - queries + start
        compressed, weights = compressed_band(band, k_means, v_means, first, size, scale)
        chosen = indices[:, start:end]
        if chosen.shape[-1] == 0:
            chosen = choose(weights, first, pattern, k.shape[2])
        return compressed, attend_band(band, k, v, chosen, first, size, scale)

    bands = in_bands(queries, band_size(B, H, pattern.block_count * size, k.shape[3], keys), run)
    compressed, selected = zip(*bands)
    return torch.cat(compressed, 1), torch.cat(selected, 1)


def compressed_band(
    q: Tensor, k_means: Tensor, v_means: Tensor, first: int, size: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of queries at places first .. to the blocks that end before them, and its weights `[B, n, Hk, G, C]`."""
    wide = torch.promote_types(q.dtype, torch.float32)
    place = torch.arange(first, first + q.shape[1], device=q.device)
    blocks = (first + q.shape[1]) // size
    grouped = q.to(wide).unflatten(2, (k_means.shape[2], -1)) * scale
    scores = torch.einsum("bnhgd,bchd->bnhgc", grouped, k_means[:, :blocks].to(wide))
    complete = (torch.arange(blocks, device=q.device) + 1) * size - 1 <= place[:, None]
    weights = masked_softmax(scores, complete[:, None, None])
    o = torch.einsum("bnhgc,bchv->bnhgv", weights, v_means[:, :blocks].to(wide))
    return o.flatten(2, 3).to(q.dtype), weights


def choose(weights: Tensor, first: int, pattern: SparsePattern, kv_heads: int) -> Tensor:
    queries = weights.shape[1]
    current = torch.arange(first, first + queries, device=weights.device) // pattern.block_size
    columns = (first + queries - 1) // pattern.block_size + 1
    importance = weights.detach().sum(3)
    importance = torch.nn.functional.pad(importance, (0, columns - importance.shape[-1]))
    return select_blocks(importance, current, pattern.block_count, neighbours=True)
