"""MoBA on any device: a document at a time, a band of queries at a time, recomputed in the backward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from flame.kernels.block_attention.chunked import attend_band, band_size, block_means, documents, in_bands
from flame.kernels.block_attention.selection import select_blocks


def moba(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_size: int,
    topk: int,
    scale: float,
    cu_seqlens: Tensor | None,
    means: Tensor | None = None,
) -> Tensor:
    parts = [_one(dq, dk, dv, chunk_size, topk, scale, means) for dq, dk, dv in documents(cu_seqlens, q, k, v)]
    return torch.cat(parts, dim=1)


def _one(q: Tensor, k: Tensor, v: Tensor, chunk_size: int, topk: int, scale: float, means: Tensor | None) -> Tensor:
    B, queries, H, _ = q.shape
    keys = k.shape[1]
    if queries == 0:
        return q.new_empty(*q.shape[:3], v.shape[3])
    wide = torch.promote_types(q.dtype, torch.float32)
    means = block_means(k.detach(), chunk_size) if means is None else means.detach()
    k, v = k.to(wide), v.to(wide)  # once: gradients of bands add up unrounded

    def run(start: int, end: int) -> Tensor:
        band, first = q[:, start:end], keys - queries + start
        indices = route(band.detach(), means, first, chunk_size, topk)
        return attend_band(band, k, v, indices, first, chunk_size, scale)

    size = band_size(B, H, topk * chunk_size, k.shape[3], keys)
    return torch.cat(in_bands(queries, size, run), dim=1)


def route(q: Tensor, means: Tensor, first: int, chunk_size: int, topk: int) -> Tensor:
    """Chunks `[B, n, H, topk]` of queries at places first .. of a document."""
    wide = torch.promote_types(q.dtype, torch.float32)
    current = torch.arange(first, first + q.shape[1], device=q.device) // chunk_size
    columns = (first + q.shape[1] - 1) // chunk_size + 1
    grouped = q.to(wide).unflatten(2, (means.shape[2], -1))
    scores = torch.einsum("bnhgd,bchd->bnhgc", grouped, means[:, :columns].to(wide)).flatten(2, 3)
    scores = torch.nn.functional.pad(scores, (0, columns - scores.shape[-1]))
    return select_blocks(scores, current, topk, neighbours=False)
