"""Attention over chosen blocks as defined: all scores, a mask, a softmax. Any dtype; fp64 is the oracle."""

from __future__ import annotations

import torch
from torch import Tensor


def block_attention(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, block_size: int, scale: float, cu_seqlens: Tensor | None
) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    H = q.shape[2]
    k, v = (x.to(wide).repeat_interleave(H // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q.to(wide), k) * scale
    mask = chosen_keys(indices, k.shape[1], block_size, cu_seqlens).repeat_interleave(H // indices.shape[2], 1)
    weights = masked_softmax(scores, mask)
    return torch.einsum("bhij,bjhv->bihv", weights, v).to(q.dtype)


def masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the last dimension where `mask` holds; rows without any such place are zero."""
    scores = scores.masked_fill(~mask, -torch.inf)
    return torch.where(mask.any(-1, keepdim=True), scores, 0).softmax(-1) * mask


def chosen_keys(indices: Tensor, keys: int, block_size: int, cu_seqlens: Tensor | None) -> Tensor:
    """`[B, Hs, Tq, Tk]`, True where query i may see key j: in a chosen block of its own document, j <= i."""
    queries = indices.shape[1]
    place, document = places(keys, cu_seqlens, indices.device)
    block = place // block_size
    chosen = (indices.transpose(1, 2)[..., None, :] == block[:, None]).any(-1)
    j = torch.arange(keys, device=indices.device)
    i = j[keys - queries :]
    return chosen & (j <= i[:, None]) & (document[i][:, None] == document)


def places(tokens: int, cu_seqlens: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """`[T]` place of every token in its document, and the document's number."""
    token = torch.arange(tokens, device=device)
    if cu_seqlens is None:
        return token, torch.zeros_like(token)
    starts = cu_seqlens.to(torch.int64)
    document = torch.searchsorted(starts[1:].contiguous(), token, right=True)
    return token - starts[document], document
