"""The elementwise gated recurrence as a parallel scan in plain torch.

Decays enter only as factors in [0, 1], multiplied together, so that a decay of any strength underflows to a clean
zero; a document boundary is a factor of zero.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn.functional import pad

from flame.kernels.elementwise_scan.segments import (
    add_at_ends,
    gather_last,
    gather_starts,
    spread_to_starts,
    start_mask,
)

CHUNK = 32


def linear_scan(decay: Tensor, x: Tensor) -> Tensor:
    """`h_t = decay_t h_{t-1} + x_t`, `h_{-1} = 0`, along dimension 1 of `[B, T, ...]`; factors in [0, 1].

    Doubling steps inside chunks, then the same function over the chunks' last rows.
    """
    batch, length = x.shape[:2]
    rest = x.shape[2:]
    chunk = min(CHUNK, length)
    tail = -length % chunk
    if tail:
        widths = (0, 0) * len(rest) + (0, tail)
        decay, x = pad(decay, widths), pad(x, widths)
    d = decay.reshape(batch, -1, chunk, *rest)
    h = x.reshape(batch, -1, chunk, *rest)
    step = 1
    while step < chunk:
        h = torch.cat((h[:, :, :step], torch.addcmul(h[:, :, step:], d[:, :, step:], h[:, :, :-step])), dim=2)
        d = torch.cat((d[:, :, :step], d[:, :, step:] * d[:, :, :-step]), dim=2)
        step *= 2
    if h.shape[1] > 1:
        carry = linear_scan(d[:, :, -1], h[:, :, -1])
        h = torch.cat((h[:, :1], torch.addcmul(h[:, 1:], d[:, 1:], carry[:, :-1, None])), dim=1)
    return h.reshape(batch, -1, *rest)[:, :length]


def reverse_linear_scan(decay: Tensor, x: Tensor) -> Tensor:
    """Adjoint of `linear_scan`: `g_t = x_t + decay_{t+1} g_{t+1}`, with `g_T = 0`, along dimension 1."""
    following = torch.cat((decay[:, 1:], torch.zeros_like(decay[:, :1])), dim=1)
    return linear_scan(following.flip(1), x.flip(1)).flip(1)


def working_dtype(x: Tensor) -> torch.dtype:
    """fp32, or fp64 for fp64 inputs."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def expand_starts(start: Tensor, x: Tensor) -> Tensor:
    """`start [T]` as a mask that broadcasts with `x [B, T, ...]`."""
    return start.view(1, -1, *([1] * (x.dim() - 2)))


class ElementwiseScan(torch.autograd.Function):
    """Saves the decays and the outputs; the backward is one reverse scan."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, log_decay: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        dtype = working_dtype(x)
        decay, source = log_decay.to(dtype).exp(), x.to(dtype)
        start = start_mask(x.shape[1], cu_seqlens, x.device)
        if initial_state is not None:
            source = source + decay * spread_to_starts(initial_state.to(dtype), x.shape[1], cu_seqlens)
        h = linear_scan(decay.masked_fill(expand_starts(start, decay), 0.0), source)
        final = gather_last(h, initial_state, cu_seqlens).clone()
        output = h.to(x.dtype)
        ctx.save_for_backward(log_decay, output, initial_state, cu_seqlens)
        return output, final

    @staticmethod
    def backward(ctx: FunctionCtx, grad_output: Tensor, grad_final: Tensor) -> tuple[Tensor | None, ...]:
        log_decay, h, initial_state, cu_seqlens = ctx.saved_tensors
        dtype = working_dtype(h)
        decay = log_decay.to(dtype).exp()
        start = expand_starts(start_mask(h.shape[1], cu_seqlens, h.device), decay)
        source = add_at_ends(grad_output.to(dtype, copy=True), grad_final, cu_seqlens)
        grad_x = reverse_linear_scan(decay.masked_fill(start, 0.0), source)
        previous = torch.cat((torch.zeros_like(h[:, :1]), h[:, :-1]), dim=1).to(dtype).masked_fill(start, 0.0)
        grad_initial = None
        if initial_state is not None:
            previous = previous + spread_to_starts(initial_state.to(dtype), h.shape[1], cu_seqlens)
            grad_initial = gather_starts(decay * grad_x, grad_final, cu_seqlens).to(initial_state.dtype)
        grad_decay = grad_x * decay * previous
        return grad_x.to(h.dtype), grad_decay.to(log_decay.dtype), grad_initial, None


def elementwise_scan_chunked(
    x: Tensor, log_decay: Tensor, initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See `flame.kernels.elementwise_scan.elementwise_scan`; always returns the final states too."""
    return ElementwiseScan.apply(x, log_decay, initial_state, cu_seqlens)
