"""Mamba's selective scan, one token at a time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from flame.kernels.elementwise_scan.segments import document_ids
from flame.kernels.selective_scan.inputs import ScanInputs


def selective_scan_reference(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """`h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T`, `y_t = (h_t C_t + D x_t) silu(z_t)`; `y [B, T, E]`, `h_T [N, E, S]`."""
    x, cu_seqlens = inputs.x, inputs.cu_seqlens
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    batch, length, channels = x.shape
    dt, b, c, a = (t.to(dtype) for t in (inputs.dt, inputs.B, inputs.C, inputs.A))
    dt = softplus(dt if inputs.dt_bias is None else dt + inputs.dt_bias.to(dtype))
    rows = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    zeros = torch.zeros(rows, channels, a.shape[1], dtype=dtype, device=x.device)
    states = list((zeros if inputs.initial_state is None else inputs.initial_state.to(dtype)).unbind(0))
    ids = None if cu_seqlens is None else document_ids(cu_seqlens, length)
    outputs = []
    for row in range(batch):
        for t in range(length):
            n = row if ids is None else int(ids[t])
            step = dt[row, t, :, None]
            states[n] = (step * a).exp() * states[n] + step * x[row, t].to(dtype)[:, None] * b[row, t]
            outputs.append((states[n] * c[row, t]).sum(-1))
    y = torch.stack(outputs).view(x.shape)
    if inputs.D is not None:
        y = y + inputs.D.to(dtype) * x.to(dtype)
    if inputs.z is not None:
        y = y * silu(inputs.z.to(dtype))
    return y.to(x.dtype), torch.stack(states)
