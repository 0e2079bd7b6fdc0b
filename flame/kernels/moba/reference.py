"""MoBA as defined: a list of chunks for every query, a mask, a softmax. Any dtype; fp64 is the oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from flame.kernels.block_attention import reference


def moba(
    q: Tensor, k: Tensor, v: Tensor, chunk_size: int, topk: int, scale: float, cu_seqlens: Tensor | None
) -> Tensor:
    indices = route(q.detach(), k.detach(), chunk_size, topk, cu_seqlens)
    return reference.block_attention(q, k, v, indices, chunk_size, scale, cu_seqlens)


def route(q: Tensor, k: Tensor, chunk_size: int, topk: int, cu_seqlens: Tensor | None) -> Tensor:
    """`[B, Tq, H, topk]` chunks of every query and head, ascending, -1 after the last; one query at a time."""
    wide = torch.promote_types(q.dtype, torch.float32)
    B, queries, H, _ = q.shape
    keys = k.shape[1]
    place, _ = reference.places(keys, cu_seqlens, q.device)
    indices = torch.full((B, queries, H, topk), -1, dtype=torch.int32)
    for i in range(queries):
        token = keys - queries + i
        at = int(place[token])
        own = at // chunk_size
        past = k[:, token - at : token - at + own * chunk_size].to(wide).unflatten(1, (own, chunk_size))
        means = past.mean(2).to(k.dtype).to(wide).repeat_interleave(H // k.shape[2], 2)  # [B, own, H, K]
        scores = torch.einsum("bhd,bchd->bhc", q[:, i].to(wide), means)
        best = scores.sort(dim=-1, descending=True, stable=True).indices[..., : topk - 1]
        best = torch.cat([best, torch.full_like(best[..., :1], own) if own else best.new_zeros(B, H, 1)], -1)
        indices[:, i, :, : best.shape[-1]] = best.sort(-1).values.to(torch.int32).cpu()
    return indices.to(q.device)
