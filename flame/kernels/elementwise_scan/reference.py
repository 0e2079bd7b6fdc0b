"""The elementwise gated recurrence, one token at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from flame.kernels.elementwise_scan.segments import document_ids


def elementwise_scan_reference(
    x: Tensor, log_decay: Tensor, initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`h_t = exp(a_t) h_{t-1} + x_t` for `x`, `log_decay` `[B, T, E]`; returns `h [B, T, E]` and the final states."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    length = x.shape[1]
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    zeros = torch.zeros(rows, x.shape[2], dtype=dtype, device=x.device)
    states = list((zeros if initial_state is None else initial_state.to(dtype)).unbind(0))
    ids = None if cu_seqlens is None else document_ids(cu_seqlens, length)
    outputs = []
    for b in range(x.shape[0]):
        row = []
        for t in range(length):
            n = b if ids is None else int(ids[t])
            states[n] = log_decay[b, t].to(dtype).exp() * states[n] + x[b, t].to(dtype)
            row.append(states[n])
        outputs.append(torch.stack(row))
    return torch.stack(outputs).to(x.dtype), torch.stack(states)
