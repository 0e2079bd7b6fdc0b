"""Exact attention from torch's own kernel on any device: a document at a time, a band of keys at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flame.kernels.softmax_attention.reference import visible

_BAND = 256  # queries a time under a window


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, cu_seqlens: Tensor | None
) -> Tensor:
    """Shapes as in the reference. Reads cu_seqlens on the host, which costs nothing on a CPU."""
    if cu_seqlens is None:
        return _one(q, k, v, scale, window)
    lengths = cu_seqlens.diff().tolist()
    documents = zip(*(x.split(lengths, dim=1) for x in (q, k, v)))
    parts = [_one(dq, dk, dv, scale, window) for dq, dk, dv in documents]
    return torch.cat(parts, dim=1)


def _one(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    queries, keys = q.shape[1], k.shape[1]
    if queries == 0:
        return q.new_empty(*q.shape[:3], v.shape[3])
    if window is None or window >= keys:
        return _attend(q, k, v, scale, None)
    offset, parts = keys - queries, []
    for start in range(0, queries, _BAND):
        end = min(start + _BAND, queries)
        seen = slice(max(0, offset + start - window + 1), offset + end)  # all keys that these queries can see
        parts.append(_attend(q[:, start:end], k[:, seen], v[:, seen], scale, window))
    return torch.cat(parts, dim=1)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    """One call of scaled_dot_product_attention, with the cheapest mask that is right."""
    queries, keys, H = q.shape[1], k.shape[1], q.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if k.shape[1] != v.shape[1]:  # keys and values in different numbers of heads: bring both to H
        k, v = (x.repeat_interleave(H // x.shape[1], 1) for x in (k, v))
    plain = window is None or window >= keys
    mask = None if plain and queries in (1, keys) else visible(queries, keys, window, q.device)
    causal = mask is None and queries == keys
    grouped = k.shape[1] != H
    o = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=grouped)
    return o.transpose(1, 2)
