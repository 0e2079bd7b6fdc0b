"""NSA's compressed and selected branches as the paper defines them: dense masks, one query's choice at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flame.kernels.block_attention import reference

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
    """Outputs `[B, Tq, H, V]` of both branches. `means` only spare work elsewhere; they are recomputed here."""
    lengths = [k.shape[1]] if cu_seqlens is None else cu_seqlens.diff().tolist()
    queries = [q.shape[1]] if cu_seqlens is None else lengths
    compressed, chosen = [], []
    for dq, dk, dv in zip(q.split(queries, 1), k.split(lengths, 1), v.split(lengths, 1)):
        o, weights = _compressed(dq, dk, dv, pattern.block_size, scale)
        compressed.append(o)
        chosen.append(_choose(weights.detach(), dk.shape[1], pattern, dk.shape[2]))
    indices = torch.cat(chosen, 1) if block_indices is None else block_indices
    selected = reference.block_attention(q, k, v, indices, pattern.block_size, scale, cu_seqlens)
    return torch.cat(compressed, 1).to(q.dtype), selected


def _compressed(q: Tensor, k: Tensor, v: Tensor, size: int, scale: float) -> tuple[Tensor, Tensor]:
    """The branch of one document, and its weights `[B, H, Tq, blocks]`."""
    wide = torch.promote_types(q.dtype, torch.float32)
    queries, keys, H = q.shape[1], k.shape[1], q.shape[2]
    blocks = keys // size  # complete ones: no query sees an incomplete one
    k, v = (x.to(wide)[:, : blocks * size].reshape(x.shape[0], blocks, size, *x.shape[2:]).mean(2) for x in (k, v))
    k, v = (x.repeat_interleave(H // x.shape[2], 2) for x in (k, v))
    i = torch.arange(keys - queries, keys, device=q.device)[:, None]
    last = (torch.arange(blocks, device=q.device) + 1) * size - 1
    weights = reference.masked_softmax(torch.einsum("bihd,bchd->bhic", q.to(wide), k) * scale, last <= i)
    return torch.einsum("bhic,bchv->bihv", weights, v), weights


def _choose(weights: Tensor, keys: int, pattern: SparsePattern, kv_heads: int) -> Tensor:
    """Blocks `[B, Tq, Hk, S]` of one document's queries."""
    B, _, queries, _ = weights.shape
    importance = weights.unflatten(1, (kv_heads, -1)).sum(2)  # [B, Hk, Tq, blocks]
    chosen = torch.full((B, queries, kv_heads, pattern.block_count), -1, dtype=torch.int32)
    for i in range(queries):
        own = (keys - queries + i) // pattern.block_size
        always = list(dict.fromkeys(block for block in (own, own - 1, 0) if block >= 0))
        order = importance[:, :, i, :own].sort(dim=-1, descending=True, stable=True).indices.cpu()
        for b in range(B):
            for h in range(kv_heads):
                others = [block for block in order[b, h].tolist() if block not in always]
                best = sorted((always + others)[: pattern.block_count])
                chosen[b, i, h, : len(best)] = torch.tensor(best, dtype=torch.int32)
    return chosen.to(weights.device)
