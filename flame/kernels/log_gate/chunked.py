"""The running log-normaliser as a parallel scan in plain torch: logaddexp doubling, restarted at document boundaries."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn.functional import pad

from flame.kernels.elementwise_scan.chunked import expand_starts, reverse_linear_scan, working_dtype
from flame.kernels.elementwise_scan.segments import (
    add_at_ends,
    document_ids,
    gather_starts,
    start_mask,
)

CHUNK = 32


def logcumsumexp(x: Tensor, ids: Tensor) -> Tensor:
    """`z_t = logaddexp(z_{t-1}, x_t)` along dimension 1 of `[B, T, F]`, restarted wherever `ids [T]` changes."""
    batch, length, features = x.shape
    chunk = min(CHUNK, length)
    tail = -length % chunk
    if tail:
        x = pad(x, (0, 0, 0, tail), value=float("-inf"))
        ids = torch.cat((ids, ids[-1:].expand(tail)))
    z = x.reshape(batch, -1, chunk, features)
    ids = ids.view(1, -1, chunk, 1)
    step = 1
    while step < chunk:
        same = ids[:, :, step:] == ids[:, :, :-step]
        shifted = z[:, :, :-step].masked_fill(~same, float("-inf"))
        z = torch.cat((z[:, :, :step], torch.logaddexp(z[:, :, step:], shifted)), dim=2)
        step *= 2
    if z.shape[1] > 1:
        last_ids = ids[0, :, -1, 0]
        carry = logcumsumexp(z[:, :, -1], last_ids)[:, :-1, None]
        same = ids[:, 1:] == last_ids[:-1].view(1, -1, 1, 1)
        carried = carry.expand(-1, -1, chunk, -1).masked_fill(~same, float("-inf"))
        z = torch.cat((z[:, :1], torch.logaddexp(z[:, 1:], carried)), dim=1)
    return z.reshape(batch, -1, features)[:, :length]


def _previous(z: Tensor, start: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """`z_{t-1}` at every position: -inf, or the initial state, where a sequence starts."""
    before = torch.cat((z[:, :1], z[:, :-1]), dim=1).masked_fill(start, float("-inf"))
    if initial is None:
        return before
    # Only starts take the initial state; spread zeros elsewhere would be harmless but for -inf * 0.
    at_start = _spread(initial, z.shape[1], cu_seqlens)
    return torch.where(start, at_start, before)


def _spread(initial: Tensor, length: int, cu_seqlens: Tensor | None) -> Tensor:
    if cu_seqlens is None:
        return initial[:, None]
    return initial[document_ids(cu_seqlens, length).long()][None]


class LogGate(torch.autograd.Function):
    """Over `[B, T, F]`. Saves the inputs and the normaliser; the backward is one reverse linear scan."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = working_dtype(x)
        length = x.shape[1]
        ids = torch.zeros(length, device=x.device) if cu_seqlens is None else document_ids(cu_seqlens, length)
        start = expand_starts(start_mask(length, cu_seqlens, x.device), x)
        initial = None if initial_state is None else initial_state.to(dtype)
        source = x.to(dtype)
        if initial is not None:
            source = torch.where(start, torch.logaddexp(source, _spread(initial, length, cu_seqlens)), source)
        z = logcumsumexp(source, ids)
        before = _previous(z, start, initial, cu_seqlens)
        weight = (x.to(dtype) - z).exp()
        log_decay = torch.where(before > float("-inf"), before - z, 0.0)
        ctx.save_for_backward(x, z, initial, cu_seqlens)
        return weight.to(x.dtype), log_decay, _final(z, initial, cu_seqlens)

    @staticmethod
    def backward(
        ctx: FunctionCtx, grad_weight: Tensor, grad_decay: Tensor, grad_final: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, z, initial, cu_seqlens = ctx.saved_tensors
        start = expand_starts(start_mask(x.shape[1], cu_seqlens, x.device), x)
        before = _previous(z, start, initial, cu_seqlens)
        seen = before > float("-inf")
        decay = torch.where(seen, before - z, float("-inf")).exp()
        weight = (x.to(z.dtype) - z).exp()
        grad_weight, grad_decay = grad_weight.to(z.dtype), torch.where(seen, grad_decay, 0.0)
        # Adjoint of z_t: its own weight and gate, the next gate, and the next normaliser with factor exp(z_t - z_{t+1}).
        inner = grad_decay.masked_fill(start, 0.0)
        following = torch.cat((inner[:, 1:], torch.zeros_like(inner[:, :1])), dim=1)
        source = add_at_ends(following - grad_decay - grad_weight * weight, grad_final, cu_seqlens)
        adjoint = reverse_linear_scan(decay.masked_fill(start, 0.0), source)
        grad_initial = None
        if initial is not None:
            grad_initial = gather_starts(grad_decay + decay * adjoint, grad_final, cu_seqlens)
        return (weight * (grad_weight + adjoint)).to(x.dtype), grad_initial, None


def _final(z: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    if cu_seqlens is None:
        return z[:, -1].clone()
    last = z[0, (cu_seqlens[1:] - 1).clamp(min=0).long()]
    empty = (cu_seqlens[1:] == cu_seqlens[:-1])[:, None]
    return torch.where(empty, float("-inf") if initial is None else initial, last)


def log_gate_chunked(
    x: Tensor, initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """See `flame.kernels.log_gate.log_gate`; always returns the final normaliser too."""
    shape = x.shape
    flat = None if initial_state is None else initial_state.flatten(1)
    weight, log_decay, final = LogGate.apply(x.flatten(2), flat, cu_seqlens)
    return weight.view(shape), log_decay.view(shape), final.view(-1, *shape[2:])
