"""Elementwise scan on a GPU.

One program owns a block of channels and a run of tokens of one row, and carries the state through tiles of tokens, each
scanned in registers. When rows and channels alone cannot fill the GPU, the run is cut into segments: a summary pass
gives every segment's map of the state (a factor and an offset), a tiny kernel chains them, and the main pass starts
each segment from its carry. Document boundaries are a factor of zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flame.kernels.compile_together import compiled_together
from flame.kernels.elementwise_scan.segments import document_ids

BLOCK_T, BLOCK_E = 128, 32
FULL_GPU = 1024  # programs that keep an H200's 132 multiprocessors busy on a streaming kernel
SHORTEST_SEGMENT = 256  # tokens; shorter ones spend more on the summary pass than they win


@dataclass
class Segments:
    """How a row is cut: `count` segments of `length` tokens (the last may be shorter)."""

    count: int
    length: int


def plan_segments(programs: int, length: int, tile: int, full: int = FULL_GPU) -> Segments:
    """Segments so that `programs` (rows x channel blocks) times their number is about `full`; one if half of it is there."""
    wanted = min(triton.cdiv(full, programs), triton.cdiv(length, SHORTEST_SEGMENT))
    if 2 * programs >= full or wanted <= 1:
        return Segments(1, length)
    span = triton.cdiv(triton.cdiv(length, wanted), tile) * tile
    return Segments(triton.cdiv(length, span), span)


@triton.jit
def linear_combine(d1, h1, d2, h2):
    """Composition of two maps `h -> d h + x`, the second applied after the first."""
    return d1 * d2, d2 * h1 + h2


@triton.jit
def last_row(x, ROWS: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, ROWS)[:, None] == ROWS - 1, x, 0.0), 0)


@triton.jit
def both(mask, flag):
    """`mask & flag` for a block mask and a scalar flag, as a comparison of blocks (the interpreter mixes no shapes)."""
    return (mask.to(tl.int32) * flag.to(tl.int32)) > 0


@triton.jit
def document_at(ids, t, T, b, HAS_IDS: tl.constexpr):
    """(document, whether it starts at t, whether it ends at t); a dense row is one document."""
    if HAS_IDS:
        doc = tl.load(ids + t, mask=t < T, other=-1).to(tl.int64)
        before = tl.load(ids + t - 1, mask=(t > 0) & (t < T), other=-2).to(tl.int64)
        after = tl.load(ids + t + 1, mask=t + 1 < T, other=-2).to(tl.int64)
        return doc, (t < T) & (doc != before), (t < T) & (doc != after)
    return b, t == 0, t == T - 1


@triton.jit
def carry_kernel(factors, ends, carries, E, NS, BE: tl.constexpr):
    """Chains segment summaries `[B, NS, E]`: `carries[s]` is the state that enters segment s."""
    e = tl.program_id(0) * BE + tl.arange(0, BE)
    base = tl.program_id(1).to(tl.int64) * NS * E
    mask = e < E
    state = tl.zeros([BE], tl.float32)
    for s in range(NS):
        at = base + s * E + e
        tl.store(carries + at, state, mask=mask)
        state = tl.load(factors + at, mask=mask, other=0.0) * state + tl.load(ends + at, mask=mask, other=0.0)


@triton.jit
def _forward_kernel(
    x, log_decay, ids, initial, carries, h_out, final, factors, ends, T, E, NS, SEGMENT,
    HAS_IDS: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_CARRY: tl.constexpr, SUMMARY: tl.constexpr,
    BT: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    e = tl.program_id(0) * BE + tl.arange(0, BE)
    b = (tl.program_id(1) // NS).to(tl.int64)
    segment = tl.program_id(1) % NS
    e_mask = e < E
    row = b * T * E
    state = tl.zeros([BE], tl.float32)
    factor = tl.full([BE], 1.0, tl.float32)
    if HAS_CARRY:
        state = tl.load(carries + (b * NS + segment) * E + e, mask=e_mask, other=0.0)
    for begin in range(segment * SEGMENT, tl.minimum(segment * SEGMENT + SEGMENT, T), BT):
        t = begin + tl.arange(0, BT)
        mask = (t < T)[:, None] & e_mask[None, :]
        at = row + t[:, None].to(tl.int64) * E + e[None, :]
        u = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        # Rows past the end have factor 1 and add nothing: the state after them is the final state.
        d = tl.exp(tl.load(log_decay + at, mask=mask, other=0.0).to(tl.float32))
        start = t == 0
        doc = tl.zeros([BT], tl.int64) + b
        if HAS_IDS:
            doc = tl.load(ids + t, mask=t < T, other=0).to(tl.int64)
            start = start | ((doc != tl.load(ids + t - 1, mask=(t < T) & (t > 0), other=0)) & (t < T))
        if HAS_INITIAL:
            at_start = start[:, None] & mask
            u += d * tl.load(initial + doc[:, None] * E + e[None, :], mask=at_start, other=0.0)
        d = tl.where(start[:, None], 0.0, d)
        product, h = tl.associative_scan((d, u), 0, linear_combine)
        h += product * state[None, :]
        state = last_row(h, BT)
        if SUMMARY:
            factor *= last_row(product, BT)
        else:
            tl.store(h_out + at, h.to(h_out.dtype.element_ty), mask=mask)
            if HAS_IDS:
                following = tl.load(ids + t + 1, mask=t < T - 1, other=-1).to(tl.int64)
                ending = ((t < T) & (doc != following))[:, None] & mask
                tl.store(final + doc[:, None] * E + e[None, :], h, mask=ending)
    if SUMMARY:
        at_segment = (b * NS + segment) * E + e
        tl.store(factors + at_segment, factor, mask=e_mask)
        tl.store(ends + at_segment, state, mask=e_mask)
    else:
        if (not HAS_IDS) & (segment == NS - 1):
            tl.store(final + b * E + e, state, mask=e_mask)


@triton.jit
def _backward_kernel(
    log_decay, ids, initial, h, grad_h, grad_final, carries, grad_x, grad_decay, grad_initial, factors, ends,
    T, E, NS, SEGMENT,
    HAS_IDS: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_CARRY: tl.constexpr, SUMMARY: tl.constexpr,
    BT: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """The adjoint recurrence, walking time backwards: position p of a segment is token T - 1 - p."""
    e = tl.program_id(0) * BE + tl.arange(0, BE)
    b = (tl.program_id(1) // NS).to(tl.int64)
    segment = tl.program_id(1) % NS
    e_mask = e < E
    row = b * T * E
    state = tl.zeros([BE], tl.float32)
    factor = tl.full([BE], 1.0, tl.float32)
    if HAS_CARRY:
        state = tl.load(carries + (b * NS + segment) * E + e, mask=e_mask, other=0.0)
    for begin in range(segment * SEGMENT, tl.minimum(segment * SEGMENT + SEGMENT, T), BT):
        t = T - 1 - begin - tl.arange(0, BT)
        inside = t >= 0
        mask = inside[:, None] & e_mask[None, :]
        at = row + t[:, None].to(tl.int64) * E + e[None, :]
        g = tl.load(grad_h + at, mask=mask, other=0.0).to(tl.float32)
        start, ending = t == 0, t == T - 1
        doc = tl.zeros([BT], tl.int64) + b
        if HAS_IDS:
            doc = tl.load(ids + t, mask=inside, other=0).to(tl.int64)
            start = start | (doc != tl.load(ids + t - 1, mask=t > 0, other=0))
            ending = ending | (doc != tl.load(ids + t + 1, mask=inside & (t < T - 1), other=0))
        at_state = doc[:, None] * E + e[None, :]
        g += tl.load(grad_final + at_state, mask=ending[:, None] & mask, other=0.0)
        # The state after token t reaches the loss through token t + 1, unless the document ends here.
        following = tl.load(log_decay + at + E, mask=mask & (t < T - 1)[:, None], other=0.0).to(tl.float32)
        d = tl.where((ending & inside)[:, None], 0.0, tl.exp(following))
        product, g = tl.associative_scan((d, g), 0, linear_combine)
        g += product * state[None, :]
        state = last_row(g, BT)
        if SUMMARY:
            factor *= last_row(product, BT)
        else:
            tl.store(grad_x + at, g.to(grad_x.dtype.element_ty), mask=mask)
            g *= tl.exp(tl.load(log_decay + at, mask=mask, other=0.0).to(tl.float32))
            before = tl.load(h + at - E, mask=mask & (~start)[:, None], other=0.0).to(tl.float32)
            if HAS_INITIAL:
                at_start = start[:, None] & mask
                before += tl.load(initial + at_state, mask=at_start, other=0.0)
                tl.store(grad_initial + at_state, g, mask=at_start)
            tl.store(grad_decay + at, (g * before).to(grad_decay.dtype.element_ty), mask=mask)
    if SUMMARY:
        at_segment = (b * NS + segment) * E + e
        tl.store(factors + at_segment, factor, mask=e_mask)
        tl.store(ends + at_segment, state, mask=e_mask)


def chain_segments(factors: Tensor, ends: Tensor) -> Tensor:
    """State entering every segment from the summaries `[B, NS, E]`, starting from zero."""
    batch, count, channels = factors.shape
    carries = torch.empty_like(ends)
    carry_kernel[(triton.cdiv(channels, 128), batch)](factors, ends, carries, channels, count, BE=128, num_warps=2)
    return carries


def _then(inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
    _, *rest = inputs
    h, final = outputs
    _gradients(*rest, h, h, final)


@torch.library.custom_op("flame::elementwise_scan", mutates_args=())
@compiled_together(_then)
def _scan(x: Tensor, log_decay: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    x, log_decay = x.contiguous(), log_decay.contiguous()
    batch, length, channels = x.shape
    ids = None if cu_seqlens is None else document_ids(cu_seqlens, length)
    rows = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    h = torch.empty_like(x)
    if initial is None:
        final = torch.zeros(rows, channels, dtype=torch.float32, device=x.device)
    else:
        initial = initial.contiguous()
        final = initial.clone()
    plan = plan_segments(batch * triton.cdiv(channels, BLOCK_E), length, BLOCK_T)
    grid = (triton.cdiv(channels, BLOCK_E), batch * plan.count)
    factors = ends = carries = final
    flags = {"HAS_IDS": ids is not None, "HAS_INITIAL": initial is not None, "BT": BLOCK_T, "BE": BLOCK_E}
    if plan.count > 1:
        factors = torch.empty(batch, plan.count, channels, dtype=torch.float32, device=x.device)
        ends = torch.empty_like(factors)
        _forward_kernel[grid](
            x, log_decay, ids, initial, carries, h, final, factors, ends, length, channels, plan.count, plan.length,
            HAS_CARRY=False, SUMMARY=True, num_warps=2, **flags,
        )  # fmt: skip
        carries = chain_segments(factors, ends)
    _forward_kernel[grid](
        x, log_decay, ids, initial, carries, h, final, factors, ends, length, channels, plan.count, plan.length,
        HAS_CARRY=plan.count > 1, SUMMARY=False, num_warps=2, **flags,
    )  # fmt: skip
    return h, final


@_scan.register_fake
def _(x: Tensor, log_decay: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return torch.empty_like(x).contiguous(), x.new_empty(rows, x.shape[2], dtype=torch.float32)


def _gradients(
    log_decay: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    h: Tensor,
    grad_h: Tensor,
    grad_final: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    log_decay, grad_h, grad_final = log_decay.contiguous(), grad_h.contiguous(), grad_final.contiguous()
    batch, length, channels = h.shape
    ids = None if cu_seqlens is None else document_ids(cu_seqlens, length)
    grad_x, grad_decay = torch.empty_like(h), torch.empty_like(log_decay)
    # Of an empty document the final state is the initial state, so that is its gradient.
    grad_initial = grad_final.clone()
    plan = plan_segments(batch * triton.cdiv(channels, BLOCK_E), length, BLOCK_T)
    grid = (triton.cdiv(channels, BLOCK_E), batch * plan.count)
    factors = ends = carries = grad_final
    flags = {"HAS_IDS": ids is not None, "HAS_INITIAL": initial is not None, "BT": BLOCK_T, "BE": BLOCK_E}
    if plan.count > 1:
        factors = torch.empty(batch, plan.count, channels, dtype=torch.float32, device=h.device)
        ends = torch.empty_like(factors)
        _backward_kernel[grid](
            log_decay, ids, initial, h, grad_h, grad_final, carries, grad_x, grad_decay, grad_initial, factors, ends,
            length, channels, plan.count, plan.length, HAS_CARRY=False, SUMMARY=True, num_warps=2, **flags,
        )  # fmt: skip
        carries = chain_segments(factors, ends)
    _backward_kernel[grid](
        log_decay, ids, initial, h, grad_h, grad_final, carries, grad_x, grad_decay, grad_initial, factors, ends,
        length, channels, plan.count, plan.length, HAS_CARRY=plan.count > 1, SUMMARY=False, num_warps=2, **flags,
    )  # fmt: skip
    return grad_x, grad_decay, grad_initial


_scan_backward = torch.library.custom_op("flame::elementwise_scan_backward", _gradients, mutates_args=())


@_scan_backward.register_fake
def _(
    log_decay: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    h: Tensor,
    grad_h: Tensor,
    grad_final: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_decay = torch.empty_like(log_decay, memory_format=torch.contiguous_format)
    return torch.empty_like(h), grad_decay, torch.empty_like(grad_final, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output) -> None:
    _, log_decay, initial, cu_seqlens = inputs
    ctx.save_for_backward(log_decay, initial, cu_seqlens, output[0])


def _backward(ctx, grad_h, grad_final):
    log_decay, initial, cu_seqlens, h = ctx.saved_tensors
    grads = _scan_backward(log_decay, initial, cu_seqlens, h, grad_h, grad_final)
    return grads[0], grads[1], None if initial is None else grads[2], None


_scan.register_autograd(_backward, setup_context=_setup_context)


def elementwise_scan_triton(
    x: Tensor, log_decay: Tensor, initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See `flame.kernels.elementwise_scan.elementwise_scan`; always returns the final states too."""
    initial = None if initial_state is None else initial_state.float()
    return _scan(x, log_decay, initial, cu_seqlens)
