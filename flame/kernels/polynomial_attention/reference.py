"""Quadratic-score attention with all pairs formed at once."""

from __future__ import annotations

import torch
from torch import Tensor

from flame.kernels.elementwise_scan.segments import document_ids


def polynomial_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    coefficients: tuple[float, float, float],
    eps: float,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """See `flame.kernels.polynomial_attention.polynomial_attention`; O(T^2) time and memory."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("bihd,bjhd->bhij", q.to(dtype), k.to(dtype)) * q.shape[-1] ** -0.5
    weights = (coefficients[0] + coefficients[1] * scores + coefficients[2] * scores.square()).tril()
    if cu_seqlens is not None:
        ids = document_ids(cu_seqlens, q.shape[1])
        weights = weights.masked_fill(ids[:, None] != ids[None, :], 0.0)
    o = torch.einsum("bhij,bjhv->bihv", weights, v.to(dtype))
    return (o / (weights.sum(-1).transpose(1, 2)[..., None] + eps)).to(v.dtype)
