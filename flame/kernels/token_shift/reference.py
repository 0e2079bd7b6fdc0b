"""Difference to the previous token, in plain torch. No host synchronisation; any dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def token_shift(x: Tensor, state: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """`x_{t-1} - x_t` `[B, T, C]`, with `x_{-1}` the state of the sequence or zero."""
    previous = F.pad(x, (0, 0, 1, 0))[:, :-1]
    first = torch.zeros(x.shape[1], dtype=torch.bool, device=x.device)
    if cu_seqlens is None:
        first[:1] = True
        before = None if state is None else state[:, None].to(x.dtype)  # [B, 1, C]
    else:
        token = torch.arange(x.shape[1], device=x.device)
        sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True).clamp(max=len(cu_seqlens) - 2)
        first = token == cu_seqlens[sequence]
        before = None if state is None else state[sequence][None].to(x.dtype)  # [1, T, C]
    before = x.new_zeros(()) if before is None else before
    return torch.where(first[:, None], before, previous) - x


def final_state(x: Tensor, state: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """The last token of every sequence, `[N, C]`; an empty sequence keeps its state."""
    if cu_seqlens is None:
        return x[:, -1].clone()  # not a view, which would keep all of x alive
    last = x[0][(cu_seqlens[1:] - 1).clamp(min=0)]
    before = x.new_zeros(()) if state is None else state.to(x.dtype)
    return torch.where((cu_seqlens.diff() > 0)[:, None], last, before)
