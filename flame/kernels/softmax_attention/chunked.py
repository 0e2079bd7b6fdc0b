"""Exact attention from torch's own kernel on any device: a document at a time, a band of keys at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flame.kernels.softmax_attention.reference import visible

_BAND = 256  # queries a time under a window, and in a graph that must not depend on the documents


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int | None,
    cu_seqlens: Tensor | None,
    sink: Tensor | None = None,
) -> Tensor:
    """Shapes as in the reference. Reads cu_seqlens on the host, which costs nothing on a CPU, but not when compiled."""
    if cu_seqlens is None:
        return _one(q, k, v, scale, window, sink)
    if torch.compiler.is_compiling():
        return _masked(q, k, v, scale, window, cu_seqlens, sink)
    parts = [_one(dq, dk, dv, scale, window, sink) for dq, dk, dv in documents(cu_seqlens, q, k, v)]
    return torch.cat(parts, dim=1)


def documents(cu_seqlens: Tensor, q: Tensor, *keys: Tensor) -> list[tuple[Tensor, ...]]:
    """The pieces of every document: its queries, of which an early one may have none or few, and rows of each of `keys`."""
    bounds, earlier = cu_seqlens.tolist(), keys[0].shape[1] - q.shape[1]
    return [
        (q[:, max(start - earlier, 0) : max(end - earlier, 0)], *(x[:, start:end] for x in keys))
        for start, end in zip(bounds, bounds[1:])
    ]


def _one(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, sink: Tensor | None) -> Tensor:
    queries, keys = q.shape[1], k.shape[1]
    if queries == 0:
        return q.new_empty(*q.shape[:3], v.shape[3])
    if window is None or window >= keys:
        plain = queries in (1, keys) and sink is None
        return _attend(q, k, v, scale, None if plain else visible(queries, keys, None, q.device), sink)
    offset, parts = keys - queries, []
    for start in range(0, queries, _BAND):
        end = min(start + _BAND, queries)
        seen = slice(max(0, offset + start - window + 1), offset + end)  # all keys that these queries can see
        mask = visible(end - start, seen.stop - seen.start, window, q.device)
        parts.append(_attend(q[:, start:end], k[:, seen], v[:, seen], scale, mask, sink))
    return torch.cat(parts, dim=1)


def _masked(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, cu_seqlens: Tensor, sink: Tensor | None
) -> Tensor:
    """Packed documents told apart by masks alone, so that one graph serves all packings."""
    token, parts = torch.arange(k.shape[1], device=q.device), []
    document, offset = torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True), k.shape[1] - q.shape[1]
    for start in range(0, q.shape[1], _BAND):
        end = min(start + _BAND, q.shape[1])
        seen = slice(0 if window is None else max(0, offset + start - window + 1), offset + end)
        mask = visible(end - start, seen.stop - seen.start, window, q.device)
        mask = mask & (document[offset + start : offset + end, None] == document[seen])
        parts.append(_attend(q[:, start:end], k[:, seen], v[:, seen], scale, mask, sink))
    return torch.cat(parts, dim=1)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, sink: Tensor | None) -> Tensor:
    """One call of scaled_dot_product_attention; mask `[Tq, Tk]`, or None for a full row or a causal square."""
    if sink is not None and mask is not None:
        return _with_sink(q, k, v, scale, mask, sink)
    queries, keys, H = q.shape[1], k.shape[1], q.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if k.shape[1] != v.shape[1]:  # keys and values in different numbers of heads: bring both to H
        k, v = (x.repeat_interleave(H // x.shape[1], 1) for x in (k, v))
    causal, grouped = mask is None and queries == keys, k.shape[1] != H
    o = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=grouped)
    return o.transpose(1, 2)


def _with_sink(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor, sink: Tensor) -> Tensor:
    """The sink as one more key, visible to all, with a channel of its own and no value. In fp32, as the logit is."""
    wide = torch.promote_types(q.dtype, torch.float32)
    B, _, H, _ = q.shape
    k, v = (x.repeat_interleave(H // x.shape[2], 2).to(wide) for x in (k, v))
    logit = F.pad((sink.to(wide) / scale)[None, None, :, None], (k.shape[3], 0)).expand(B, -1, -1, -1)
    k = torch.cat([logit, F.pad(k, (0, 1))], 1)
    v = F.pad(v, (0, 0, 0, 0, 1, 0))
    ones = q.new_ones(*q.shape[:3], 1, dtype=wide)
    mask = F.pad(mask, (1, 0), value=True)
    return _attend(torch.cat([q.to(wide), ones], -1), k, v, scale, mask, None).to(q.dtype)
