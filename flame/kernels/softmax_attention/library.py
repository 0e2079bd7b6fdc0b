"""Exact attention on a GPU from torch's own fast kernels, without host synchronisation.

- One causal block (Tq = Tk) or one query: scaled_dot_product_attention, whose default order of backends is the fastest
  measured on Hopper (cuDNN, then FlashAttention).
- Packed documents, windows, several queries on a longer cache: torch.nn.attention.varlen, with the batch laid end to end.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def supports(q: Tensor, k: Tensor, v: Tensor, window: int | None, cu_seqlens: Tensor | None) -> bool:
    """Whether `softmax_attention` below takes these inputs; the chunked form takes all."""
    if is_plain(q, k, window, cu_seqlens):
        return True
    half = q.dtype in (torch.bfloat16, torch.float16)
    return half and max(q.shape[3], v.shape[3]) <= 256 and bool(_VARLEN_OPTIONS)


def is_plain(q: Tensor, k: Tensor, window: int | None, cu_seqlens: Tensor | None) -> bool:
    """No window that bites, one document a row, and a mask that is a square or a single row."""
    return cu_seqlens is None and (window is None or window >= k.shape[1]) and q.shape[1] in (1, k.shape[1])


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
) -> Tensor:
    """Shapes as in the reference."""
    width = v.shape[3]
    k, v = same_heads(q, k, v)
    if is_plain(q, k, window, cu_seqlens):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        causal, grouped = q.shape[2] > 1, k.shape[1] != q.shape[1]
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped).transpose(
            1, 2
        )
    q, k, v = _same_width(q, k, v)
    return _varlen(q, k, v, scale, window, cu_seqlens, max_seqlen)[..., :width]


def same_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """k and v with one number of heads."""
    if k.shape[2] == v.shape[2]:
        return k, v
    H = q.shape[2]
    return k.repeat_interleave(H // k.shape[2], 2), v.repeat_interleave(H // v.shape[2], 2)


def _same_width(*tensors: Tensor) -> tuple[Tensor, ...]:
    """All padded with zeros to one width, a multiple of 8: zeros add nothing to scores, and padded values are cut off."""
    width = -(-max(x.shape[3] for x in tensors) // 8) * 8
    return tuple(x if x.shape[3] == width else F.pad(x, (0, width - x.shape[3])) for x in tensors)


def _varlen_options() -> frozenset[str]:
    """Keyword arguments of this torch's varlen_attn; empty where it cannot do what is needed here."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    names = frozenset(inspect.signature(varlen_attn).parameters)
    return names if {"window_size", "scale"} <= names else frozenset()


_VARLEN_OPTIONS = _varlen_options()


def _varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    B, Tq, H, _ = q.shape
    Tk = k.shape[1]
    if cu_seqlens is None:
        starts_q, starts_k = (torch.arange(B + 1, device=q.device, dtype=torch.int32) * T for T in (Tq, Tk))
    else:
        starts_k = cu_seqlens.to(torch.int32)
        starts_q = (starts_k - (Tk - Tq)).clamp(min=0)
        if Tq < Tk:  # keys of documents without queries here would be left without a gradient
            used = starts_k[:-1].masked_fill(starts_q[1:] == 0, Tk).amin()
            unused = (torch.arange(Tk, device=k.device) < used)[:, None, None]
            k, v = k.masked_fill(unused, 0.0), v.masked_fill(unused, 0.0)
    options: dict[str, Any] = {"window_size": (-1 if window is None else window - 1, 0), "scale": scale}
    if k.shape[2] != H:
        if "enable_gqa" in _VARLEN_OPTIONS:
            options["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(H // x.shape[2], 2) for x in (k, v))
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    # Without a bound on documents the row's length is one, at the cost of many empty programs.
    longest = Tk if cu_seqlens is None or max_seqlen is None else max_seqlen
    o = varlen_attn(q, k, v, starts_q, starts_k, min(Tq, longest), longest, **options)
    return o.unflatten(0, (B, Tq))
