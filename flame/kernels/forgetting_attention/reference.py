"""The forgetting attention as defined: all scores, all biases, a softmax. Any dtype; fp64 is the oracle."""

from __future__ import annotations

import torch
from torch import Tensor


def forgetting_attention(
    q: Tensor, k: Tensor, v: Tensor, log_forget: Tensor, scale: float, cu_seqlens: Tensor | None
) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    H, queries, keys = q.shape[2], q.shape[1], k.shape[1]
    k, v = k.repeat_interleave(H // k.shape[2], 2), v.repeat_interleave(H // v.shape[2], 2)
    total = log_forget.double().cumsum(1).transpose(1, 2)  # [B, H, Tk]; fp64, or long rows cancel badly
    bias = (total[:, :, keys - queries :, None] - total[:, :, None, :]).to(wide)
    scores = torch.einsum("bihd,bjhd->bhij", q.to(wide), k.to(wide)) * scale + bias
    i, j = torch.arange(keys - queries, keys, device=q.device)[:, None], torch.arange(keys, device=q.device)
    mask = j <= i
    if cu_seqlens is not None:
        document = torch.searchsorted(cu_seqlens[1:].contiguous(), j, right=True)
        mask = mask & (document[keys - queries :, None] == document)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return torch.einsum("bhij,bjhv->bihv", weights, v.to(wide)).to(q.dtype)
