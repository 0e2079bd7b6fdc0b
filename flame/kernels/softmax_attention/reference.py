"""Softmax attention as defined: all scores, a mask, a softmax. Any dtype; fp64 is the oracle."""

from __future__ import annotations

import torch
from torch import Tensor


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int | None,
    cu_seqlens: Tensor | None,
    sink: Tensor | None = None,
) -> Tensor:
    """q `[B, Tq, H, Dqk]`, k `[B, Tk, Hk, Dqk]`, v `[B, Tk, Hv, Dv]`, sink `[H]` -> `[B, Tq, H, Dv]` in q.dtype."""
    wide = torch.promote_types(q.dtype, torch.float32)
    H = q.shape[2]
    k, v = k.repeat_interleave(H // k.shape[2], 2), v.repeat_interleave(H // v.shape[2], 2)
    scores = torch.einsum("bihd,bjhd->bhij", q.to(wide), k.to(wide)) * scale
    mask = visible(q.shape[1], k.shape[1], window, q.device)
    if cu_seqlens is not None:
        token = torch.arange(k.shape[1], device=q.device)
        document = torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True)
        mask = mask & (document[k.shape[1] - q.shape[1] :, None] == document)
    scores = scores.masked_fill(~mask, -torch.inf)
    if sink is not None:
        logits = sink.to(wide)[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, logits], -1)
    weights = scores.softmax(-1)[..., : k.shape[1]]
    return torch.einsum("bhij,bjhv->bihv", weights, v.to(wide)).to(q.dtype)


def visible(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """`[queries, keys]`, True where query i may see key j: causal, the last query meeting the last key."""
    i = torch.arange(keys - queries, keys, device=device)[:, None]
    j = torch.arange(keys, device=device)
    mask = j <= i
    return mask if window is None else mask & (j > i - window)
