"""Where packed documents start and end, as masks and indices on the device (no host synchronisation)."""

from __future__ import annotations

import torch
from torch import Tensor


def document_ids(cu_seqlens: Tensor, length: int) -> Tensor:
    """The document of every position, `[T]` int32; empty documents own no position."""
    positions = torch.arange(length, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    ids = torch.searchsorted(cu_seqlens[1:].contiguous(), positions, right=True)
    return ids.clamp_(max=cu_seqlens.numel() - 2).to(torch.int32)


def start_mask(length: int, cu_seqlens: Tensor | None, device: torch.device) -> Tensor:
    """True at the first position of every sequence, `[T]`. Without `cu_seqlens` every row is one sequence."""
    start = torch.zeros(length, dtype=torch.bool, device=device)
    if cu_seqlens is None:
        start[:1] = True
        return start
    ids = document_ids(cu_seqlens, length)
    start[:1] = True
    start[1:] = ids[1:] != ids[:-1]
    return start


def gather_last(h: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """State after each sequence, `[N, ...]`, from states of every position `h [B, T, ...]`; empty ones keep `initial`."""
    if cu_seqlens is None:
        return h[:, -1]
    last = h[0, (cu_seqlens[1:] - 1).clamp(min=0).long()]
    empty = (cu_seqlens[1:] == cu_seqlens[:-1]).view(-1, *([1] * (h.dim() - 2)))
    return torch.where(empty, 0.0 if initial is None else initial.to(h.dtype), last)


def add_at_ends(source: Tensor, grad: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Adds `grad [N, ...]` to the last position of every sequence of `source [B, T, ...]`, in place."""
    if cu_seqlens is None:
        source[:, -1] += grad
        return source
    full = (cu_seqlens[1:] > cu_seqlens[:-1]).view(-1, *([1] * (grad.dim() - 1)))
    source[0].index_add_(0, (cu_seqlens[1:] - 1).clamp(min=0).long(), torch.where(full, grad, 0.0).to(source.dtype))
    return source


def spread_to_starts(state: Tensor, length: int, cu_seqlens: Tensor | None) -> Tensor:
    """`[B, T, ...]` holding `state [N, ...]` at the first position of its sequence and zero elsewhere."""
    if cu_seqlens is None:
        out = state.new_zeros(state.shape[0], length, *state.shape[1:])
        out[:, 0] = state
        return out
    out = state.new_zeros(1, length, *state.shape[1:])
    full = (cu_seqlens[1:] > cu_seqlens[:-1]).view(-1, *([1] * (state.dim() - 1)))
    starts = cu_seqlens[:-1].clamp(max=max(length - 1, 0)).long()
    out[0].index_add_(0, starts, torch.where(full, state, 0.0))
    return out


def gather_starts(x: Tensor, empty_value: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The first position of every sequence of `x [B, T, ...]`, `[N, ...]`; `empty_value [N, ...]` for empty ones."""
    if cu_seqlens is None:
        return x[:, 0]
    first = x[0, cu_seqlens[:-1].clamp(max=x.shape[1] - 1).long()]
    empty = (cu_seqlens[1:] == cu_seqlens[:-1]).view(-1, *([1] * (x.dim() - 2)))
    return torch.where(empty, empty_value.to(first.dtype), first)
