"""The running log-normaliser of LightNet and ABC, one token at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from flame.kernels.elementwise_scan.segments import document_ids


def log_gate_reference(
    x: Tensor, initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`z_t = logaddexp(z_{t-1}, x_t)`, `w_t = exp(x_t - z_t)`, `a_t = z_{t-1} - z_t` (0 after an empty prefix)."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    length = x.shape[1]
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    empty = torch.full((rows, *x.shape[2:]), float("-inf"), dtype=dtype, device=x.device)
    states = list((empty if initial_state is None else initial_state.to(dtype)).unbind(0))
    ids = None if cu_seqlens is None else document_ids(cu_seqlens, length)
    weights, decays = [], []
    for b in range(x.shape[0]):
        for t in range(length):
            n = b if ids is None else int(ids[t])
            before, now = states[n], x[b, t].to(dtype)
            seen = before > float("-inf")
            # logaddexp(-inf, x) is x, but its gradient through -inf is NaN: take the branch apart.
            states[n] = torch.where(seen, torch.logaddexp(torch.where(seen, before, now), now), now)
            weights.append((now - states[n]).exp())
            decays.append(torch.where(seen, torch.where(seen, before, now) - states[n], 0.0))
    weight = torch.stack(weights).view(x.shape).to(x.dtype)
    return weight, torch.stack(decays).view(x.shape), torch.stack(states)
