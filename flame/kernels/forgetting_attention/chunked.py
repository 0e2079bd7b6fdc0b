"""Forgetting attention on any device: a document at a time, a band of queries at a time, recomputed in the backward.

Memory is that of one band of scores instead of all of them. Biases are differences of cumulative sums taken relative to
the band's first query, so that long rows of strong forgetting do not lose them to rounding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flame.kernels.softmax_attention.chunked import documents

_BAND = 256  # queries a time


def forgetting_attention(
    q: Tensor, k: Tensor, v: Tensor, log_forget: Tensor, scale: float, cu_seqlens: Tensor | None
) -> Tensor:
    if cu_seqlens is None:
        return _one(q, k, v, log_forget, scale)
    if torch.compiler.is_compiling():  # one graph for all packings: documents are told apart by masks alone
        token = torch.arange(k.shape[1], device=k.device)
        return _one(q, k, v, log_forget, scale, torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True))
    pieces = documents(cu_seqlens, q, k, v, log_forget)  # read on the host, which costs nothing on a CPU
    return torch.cat([_one(dq, dk, dv, df, scale) for dq, dk, dv, df in pieces], dim=1)


def _one(q: Tensor, k: Tensor, v: Tensor, log_forget: Tensor, scale: float, document: Tensor | None = None) -> Tensor:
    """`document` [T] numbers each token's document where a row has several."""
    queries, offset = q.shape[1], k.shape[1] - q.shape[1]
    if queries == 0:
        return q.new_empty(*q.shape[:3], v.shape[3])
    parts = []
    for start in range(0, queries, _BAND):
        end = min(start + _BAND, queries)
        seen = slice(0, offset + end)
        arguments = (
            q[:, start:end],
            k[:, seen],
            v[:, seen],
            log_forget[:, seen],
            scale,
            None if document is None else document[seen],
        )
        needed = torch.is_grad_enabled() and queries > _BAND
        parts.append(checkpoint(_band, *arguments, use_reentrant=False) if needed else _band(*arguments))
    return torch.cat(parts, dim=1)


def _band(q: Tensor, k: Tensor, v: Tensor, log_forget: Tensor, scale: float, document: Tensor | None) -> Tensor:
    """Queries [B, n, H, K] against all keys up to the last of them."""
    queries, keys = q.shape[1], k.shape[1]
    forget = log_forget.transpose(1, 2).float()
    first = keys - queries
    after = forget[..., first + 1 :].cumsum(-1)  # from the band's first query on
    before = forget[..., 1 : first + 1].flip(-1).cumsum(-1).flip(-1)  # back from it
    zero = forget.new_zeros(*forget.shape[:2], 1)
    total = torch.cat([-before, zero, after], -1)  # [B, H, keys], 0 at the band's first query
    bias = total[:, :, first:, None] - total[:, :, None, :]
    j = torch.arange(keys, device=q.device)
    hidden = j > j[first:, None]
    if document is not None:
        hidden = hidden | (document != document[first:, None])
    bias = bias.masked_fill(hidden, -torch.inf)
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=scale, enable_gqa=grouped)
    return o.transpose(1, 2)
