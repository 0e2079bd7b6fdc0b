"""Mamba's selective scan in plain torch: parallel inside a chunk of tokens, sequential over chunks.

States `[B, C, E, S]` exist for one chunk at a time. The forward keeps the state before each chunk; the backward
recomputes a chunk's states from it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn.functional import silu, softplus

from flame.kernels.elementwise_scan.chunked import linear_scan, reverse_linear_scan, working_dtype
from flame.kernels.elementwise_scan.segments import document_ids, start_mask
from flame.kernels.selective_scan.inputs import ScanInputs

CHUNK = 32


class _Chunk:
    """One chunk's slice of the inputs and the quantities that forward and backward both need."""

    def __init__(self, saved: tuple[Tensor | None, ...], begin: int, end: int, before: Tensor) -> None:
        x, dt, a, b, c, initial, cu_seqlens, start, ids = saved
        self.x, self.dt = x[:, begin:end], dt[:, begin:end]  # type: ignore[index]
        self.a, self.b, self.c = a, b[:, begin:end], c[:, begin:end]  # type: ignore[index]
        self.start = start[None, begin:end, None, None]  # type: ignore[index]
        self.raw_decay = (self.dt[..., None] * a).exp()  # [B, C, E, S]
        self.decay = self.raw_decay.masked_fill(self.start, 0.0)
        source = (self.dt * self.x)[..., None] * self.b[:, :, None]
        source[:, 0] += self.decay[:, 0] * before
        self.at_start: Tensor | None = None
        if initial is not None:
            # Dense rows start at position 0 only; packed documents start anywhere.
            rows = initial[:, None] if ids is None else initial[ids[begin:end].long()][None]
            self.at_start = torch.where(self.start, rows, 0.0)
            source = source + self.raw_decay * self.at_start
        self.h = linear_scan(self.decay, source)
        self.before = before

    def previous(self) -> Tensor:
        """`h_{t-1}` of every token: the initial state where a sequence starts."""
        shifted = torch.cat((self.before[:, None], self.h[:, :-1]), dim=1).masked_fill(self.start, 0.0)
        return shifted if self.at_start is None else shifted + self.at_start


class SelectiveScan(torch.autograd.Function):
    """`y_t = h_t C_t` for fp32 (or fp64) inputs with `dt` already positive; no skip, no gate."""

    @staticmethod
    def forward(  # noqa: PLR0913
        ctx: FunctionCtx,
        x: Tensor,
        dt: Tensor,
        a: Tensor,
        b: Tensor,
        c: Tensor,
        initial: Tensor | None,
        cu_seqlens: Tensor | None,
        want_final: bool,
    ) -> tuple[Tensor, Tensor]:
        batch, length, channels = x.shape
        start = start_mask(length, cu_seqlens, x.device)
        ids = None if cu_seqlens is None else document_ids(cu_seqlens, length)
        saved = (x, dt, a, b, c, initial, cu_seqlens, start, ids)
        rows = batch if cu_seqlens is None else cu_seqlens.numel() - 1
        final = x.new_zeros(rows, channels, a.shape[1]) if initial is None else initial.clone()
        before = x.new_zeros(batch, channels, a.shape[1])
        outputs, boundaries = [], []
        for begin in range(0, length, CHUNK):
            boundaries.append(before)
            chunk = _Chunk(saved, begin, min(begin + CHUNK, length), before)
            outputs.append(torch.einsum("bces,bcs->bce", chunk.h, chunk.c))
            if want_final and cu_seqlens is not None:
                final = _collect_final(final, chunk.h[0], cu_seqlens, begin)
            before = chunk.h[:, -1]
        if cu_seqlens is None:
            final = before.clone()
        ctx.save_for_backward(*saved, torch.stack(boundaries))
        return torch.cat(outputs, dim=1), final

    @staticmethod
    def backward(ctx: FunctionCtx, grad_output: Tensor, grad_final: Tensor) -> tuple[Tensor | None, ...]:
        *saved, boundaries = ctx.saved_tensors
        x, dt, a, b, c, initial, cu_seqlens, _, ids = saved
        grad_x, grad_dt, grad_b, grad_c = (torch.empty_like(t) for t in (x, dt, b, c))
        grad_a = torch.zeros_like(a)
        grad_initial = None if initial is None else torch.zeros_like(initial)
        if initial is not None and cu_seqlens is not None:
            empty = (cu_seqlens[1:] == cu_seqlens[:-1])[:, None, None]
            grad_initial = torch.where(empty, grad_final, 0.0)
        carry = torch.zeros_like(boundaries[0]) if cu_seqlens is not None else grad_final
        for index in reversed(range(boundaries.shape[0])):
            begin = index * CHUNK
            end = min(begin + CHUNK, x.shape[1])
            chunk = _Chunk(tuple(saved), begin, end, boundaries[index])
            source = grad_output[:, begin:end, :, None] * chunk.c[:, :, None]
            source[:, -1] += carry
            if cu_seqlens is not None:
                _add_final_grads(source[0], grad_final, cu_seqlens, begin)
            g = reverse_linear_scan(chunk.decay, source)  # adjoint of h, [B, C, E, S]
            carry = chunk.decay[:, 0] * g[:, 0]
            decayed = g * chunk.raw_decay
            grad_log = decayed * chunk.previous()  # adjoint of dt_t A
            into = torch.einsum("bces,bcs->bce", g, chunk.b)  # adjoint of dt_t x_t
            grad_x[:, begin:end] = into * chunk.dt
            grad_dt[:, begin:end] = into * chunk.x + torch.einsum("bces,es->bce", grad_log, a)
            grad_a += torch.einsum("bces,bce->es", grad_log, chunk.dt)
            grad_b[:, begin:end] = torch.einsum("bces,bce->bcs", g, chunk.dt * chunk.x)
            grad_c[:, begin:end] = torch.einsum("bces,bce->bcs", chunk.h, grad_output[:, begin:end])
            if grad_initial is not None:
                _add_initial_grads(grad_initial, decayed, chunk.start, ids, begin)
        return grad_x, grad_dt, grad_a, grad_b, grad_c, grad_initial, None, None


def _collect_final(final: Tensor, h: Tensor, cu_seqlens: Tensor, begin: int) -> Tensor:
    """`final [N, E, S]` with the states of documents that end inside this chunk's `h [C, E, S]`."""
    last = cu_seqlens[1:] - 1 - begin
    inside = (last >= 0) & (last < h.shape[0]) & (cu_seqlens[1:] > cu_seqlens[:-1])
    return torch.where(inside[:, None, None], h[last.clamp(0, h.shape[0] - 1).long()], final)


def _add_final_grads(source: Tensor, grad_final: Tensor, cu_seqlens: Tensor, begin: int) -> None:
    last = cu_seqlens[1:] - 1 - begin
    inside = (last >= 0) & (last < source.shape[0]) & (cu_seqlens[1:] > cu_seqlens[:-1])
    rows = torch.where(inside[:, None, None], grad_final, 0.0)
    source.index_add_(0, last.clamp(0, source.shape[0] - 1).long(), rows)


def _add_initial_grads(grad: Tensor, decayed: Tensor, start: Tensor, ids: Tensor | None, begin: int) -> None:
    """Adds `exp(dt A) g` of the starting tokens of one chunk to their sequences' rows of `grad [N, E, S]`, in place."""
    masked = torch.where(start, decayed, 0.0)
    if ids is None:
        grad += masked[:, 0]
    else:
        grad.index_add_(0, ids[begin : begin + masked.shape[1]].long(), masked[0])


def selective_scan_chunked(inputs: ScanInputs, want_final: bool = True) -> tuple[Tensor, Tensor]:
    """See `flame.kernels.selective_scan.selective_scan`."""
    dtype = working_dtype(inputs.x)
    x = inputs.x.to(dtype)
    dt = inputs.dt.to(dtype)
    dt = softplus(dt if inputs.dt_bias is None else dt + inputs.dt_bias.to(dtype))
    initial = None if inputs.initial_state is None else inputs.initial_state.to(dtype)
    a, b, c = inputs.A.to(dtype), inputs.B.to(dtype), inputs.C.to(dtype)
    y, final = SelectiveScan.apply(x, dt, a, b, c, initial, inputs.cu_seqlens, want_final)
    if inputs.D is not None:
        y = y + inputs.D.to(dtype) * x
    if inputs.z is not None:
        y = y * silu(inputs.z.to(dtype))
    return y.to(inputs.x.dtype), final
