"""Attention over chosen blocks on any device: a document at a time, a band of queries at a time.

A band either gathers the keys of its blocks, which costs `blocks * block_size` keys a query however long the document, or,
while the document is short, masks all keys. Bands are recomputed in the backward pass, so memory is that of one band.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flame.kernels.block_attention.reference import masked_softmax

_ELEMENTS = 1 << 23  # gathered or scored numbers a band may hold


def block_attention(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, block_size: int, scale: float, cu_seqlens: Tensor | None
) -> Tensor:
    parts = [_one(dq, dk, dv, di, block_size, scale) for dq, dk, dv, di in documents(cu_seqlens, q, k, v, indices)]
    return torch.cat(parts, dim=1)


def documents(cu_seqlens: Tensor | None, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """The tensors cut along time, a tuple a document. Reads cu_seqlens on the host, which costs nothing on a CPU."""
    if cu_seqlens is None:
        return [tensors]
    lengths = cu_seqlens.diff().tolist()
    return list(zip(*(x.split(lengths, dim=1) for x in tensors)))


def in_bands(queries: int, band: int, run: Callable[[int, int], Any]) -> list[Any]:
    """run(start, end) over bands of queries, recomputed in the backward pass where there are several."""
    again = torch.is_grad_enabled() and queries > band
    bounds = [(start, min(start + band, queries)) for start in range(0, queries, band)]
    return [checkpoint(run, *bound, use_reentrant=False) if again else run(*bound) for bound in bounds]


def band_size(batch: int, heads: int, chosen: int, width: int, keys: int) -> int:
    """Queries of which a band gathers or scores about _ELEMENTS numbers."""
    each = batch * heads * min(chosen * width, keys * 4)
    return max(1, min(512, _ELEMENTS // max(each, 1)))


def _one(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, block_size: int, scale: float) -> Tensor:
    B, queries, H, _ = q.shape
    if queries == 0:
        return q.new_empty(*q.shape[:3], v.shape[3])
    keys, wide = k.shape[1], torch.promote_types(q.dtype, torch.float32)
    k, v = k.to(wide), v.to(wide)  # here and not in each band, whose gradients would be rounded before they add up

    def run(start: int, end: int) -> Tensor:
        first = keys - queries + start
        return attend_band(q[:, start:end], k, v, indices[:, start:end], first, block_size, scale)

    band = band_size(B, H, indices.shape[3] * block_size, k.shape[3], keys)
    return torch.cat(in_bands(queries, band, run), dim=1)


def attend_band(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, first: int, block_size: int, scale: float) -> Tensor:
    """Queries `[B, n, H, K]` at places first .. of a document whose keys are k; indices `[B, n, Hs, S]`."""
    wide = torch.promote_types(q.dtype, torch.float32)
    k, v = k[:, : first + q.shape[1]], v[:, : first + q.shape[1]]  # later keys are seen by none of them
    place = torch.arange(first, first + q.shape[1], device=q.device)
    grouped = q.to(wide).unflatten(2, (indices.shape[2], -1))  # [B, n, Hs, G, K]
    chosen = indices.shape[3] * block_size
    form = _masked if k.shape[1] <= 4 * chosen else _gathered
    o = form(grouped * scale, k.to(wide), v.to(wide), indices.long(), place, block_size)
    return o.flatten(2, 3).to(q.dtype)


def _masked(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, place: Tensor, block_size: int) -> Tensor:
    key = torch.arange(k.shape[1], device=q.device)
    blocks = -(-k.shape[1] // block_size)
    chosen = torch.zeros(*indices.shape[:3], blocks + 1, dtype=torch.bool, device=q.device)
    # -1 and blocks that no query of the band can see yet mark the spare column.
    spare = (indices < 0) | (indices >= blocks)
    chosen.scatter_(3, torch.where(spare, blocks, indices), True)
    seen = chosen[..., key // block_size] & (key <= place[:, None])[:, None]  # [B, n, Hs, keys]
    share = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(share, 2) for x in (k, v))
    weights = masked_softmax(torch.einsum("bnhgd,bjhd->bnhgj", q, k), seen[:, :, :, None])
    return torch.einsum("bnhgj,bjhv->bnhgv", weights, v)


def _gathered(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, place: Tensor, block_size: int) -> Tensor:
    key = (indices[..., None] * block_size + torch.arange(block_size, device=q.device)).flatten(3)
    seen = (key >= 0) & (key <= place[:, None, None])  # [B, n, Hs, S * block_size]
    seen &= (indices >= 0).repeat_interleave(block_size, 3)
    key = torch.where(seen, key, 0)
    share = q.shape[2] // k.shape[2]
    batch = torch.arange(q.shape[0], device=q.device)[:, None, None, None]
    head = (torch.arange(q.shape[2], device=q.device) // share)[:, None]
    weights = masked_softmax(torch.einsum("bnhgd,bnhjd->bnhgj", q, k[batch, key, head]), seen[:, :, :, None])
    return torch.einsum("bnhgj,bnhjv->bnhgv", weights, v[batch, key, head])


def block_means(x: Tensor, size: int) -> Tensor:
    """Means over the complete blocks of a document, `[B, T, H, D]` -> `[B, T // size, H, D]`, rounded to x.dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    complete = x.shape[1] // size
    return x[:, : complete * size].to(wide).unflatten(1, (complete, size)).mean(2).to(x.dtype)
