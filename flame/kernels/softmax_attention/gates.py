"""What the tiled kernels must know of the gates and documents: running sums, their gradient, boundaries."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def running_sums(log_forget: Tensor) -> Tensor:
    """`[2, B, H, T]` fp32 of log_forget `[B, T, H]`: base-2 sums along a row, as what fp32 holds and what it drops.

    Over a long row they grow without bound while only differences count; two halves keep those exact to fp32.
    """
    total = (log_forget.detach().transpose(1, 2).double() * math.log2(math.e)).cumsum(-1)
    high = total.float()
    return torch.stack([high, (total - high.double()).float()])


def gate_gradient(dtotal: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """d log_forget `[B, T, H]` from the gradient of the natural running sums `[B, H, T]`: suffix sums in each document."""
    suffix = dtotal.double().flip(-1).cumsum(-1).flip(-1)
    if cu_seqlens is not None:
        after = torch.cat([suffix, suffix.new_zeros(*suffix.shape[:2], 1)], -1)
        _, end = boundaries(cu_seqlens, suffix.shape[-1])
        suffix = suffix - after[..., end.long()]
    return suffix.float().transpose(1, 2).contiguous()


def boundaries(cu_seqlens: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Begin and end of every token's document, `[T]` int32 each."""
    bounds = cu_seqlens.to(torch.int32)
    token = torch.arange(tokens, device=bounds.device, dtype=torch.int32)
    document = torch.searchsorted(bounds[1:].contiguous(), token, right=True).clamp_max(bounds.shape[0] - 2)
    return bounds[document], bounds[document + 1]
