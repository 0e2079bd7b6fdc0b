"""Log-normaliser gate on a GPU.

The forward walks the tokens with the normaliser of 64 channels in a warp's registers: a scan over a tile would take an
exponential and a logarithm for each of its log2 steps, a walk takes one of each a token. The backward is the linear
reverse scan of the elementwise scan, from the saved outputs alone. Both are cut into segments as there. Inside, logarithms
are base 2.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flame.kernels.compile_together import compiled_together
from flame.kernels.elementwise_scan.segments import document_ids
from flame.kernels.elementwise_scan.triton_scan import (
    FULL_GPU,
    Segments,
    both,
    chain_segments,
    document_at,
    last_row,
    linear_combine,
    plan_segments,
)

GROUP, WALK_F = 8, 64  # forward: tokens stored together, channels of a warp
WALKERS = 4096  # warps that hide each other's dependent exponentials and logarithms
BLOCK_T, BLOCK_F = 64, 32  # backward


@triton.jit
def _logaddexp(x, y):
    """Base 2: the GPU's own exponential and logarithm. -inf with -inf is -inf."""
    top, low = tl.maximum(x, y), tl.minimum(x, y)
    return top + tl.log2(1.0 + tl.where(low == float("-inf"), 0.0, tl.exp2(low - top)))


@triton.jit
def _carry_kernel(restarts, ends, carries, F, NS, BF: tl.constexpr):
    """Chains segment summaries `[B, NS, F]` of the restarted logaddexp scan."""
    f = tl.program_id(0) * BF + tl.arange(0, BF)
    base = tl.program_id(1).to(tl.int64) * NS * F
    mask = f < F
    state = tl.full([BF], float("-inf"), tl.float32)
    for s in range(NS):
        at = base + s * F + f
        tl.store(carries + at, state, mask=mask)
        end = tl.load(ends + at, mask=mask, other=0.0)
        state = tl.where(tl.load(restarts + at, mask=mask, other=0.0) > 0, end, _logaddexp(state, end))


@triton.jit
def _forward_kernel(
    x, ids, initial, carries, weight, log_decay, final, restarts, ends, T, F, NS, SEGMENT,
    HAS_IDS: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_CARRY: tl.constexpr, SUMMARY: tl.constexpr,
    GROUP: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    LOG2E: tl.constexpr = 1.4426950408889634
    LN2: tl.constexpr = 0.6931471805599453
    f = tl.program_id(0) * BF + tl.arange(0, BF)
    b = (tl.program_id(1) // NS).to(tl.int64)
    segment = tl.program_id(1) % NS
    f_mask = f < F
    rows = tl.arange(0, GROUP)
    at_segment = (b * NS + segment) * F + f
    z = tl.full([BF], float("-inf"), tl.float32)
    restarted = tl.zeros([BF], tl.float32)
    if HAS_CARRY:
        z = tl.load(carries + at_segment, mask=f_mask, other=0.0)
    first = segment * SEGMENT
    for offset in range(0, tl.minimum(SEGMENT, T - first), GROUP):
        begin = first + offset
        weights = tl.zeros([GROUP, BF], tl.float32)
        gates = tl.zeros([GROUP, BF], tl.float32)
        for i in tl.static_range(GROUP):
            t = begin + i
            mask = both(f_mask, t < T)
            # Tokens past the end are -inf: they leave the normaliser as it is.
            logits = tl.load(x + (b * T + t) * F + f, mask=mask, other=float("-inf")).to(tl.float32) * LOG2E
            doc, start, ending = document_at(ids, t, T, b, HAS_IDS)
            if HAS_INITIAL:
                opened = tl.load(initial + doc * F + f, mask=both(f_mask, start), other=float("-inf")) * LOG2E
                z = tl.where(start, opened, z)
            elif HAS_IDS:
                z = tl.where(start, float("-inf"), z)
            after = _logaddexp(z, logits)
            if SUMMARY:
                restarted = tl.where(start, 1.0, restarted)
            else:
                gate = tl.where(z == float("-inf"), 0.0, (z - after) * LN2)
                weights = tl.where(rows[:, None] == i, tl.exp2(logits - after)[None, :], weights)
                gates = tl.where(rows[:, None] == i, gate[None, :], gates)
                tl.store(final + doc * F + f, after * LN2, mask=both(f_mask, ending))
            z = after
        if not SUMMARY:
            t = begin + rows
            at = (b * T + t[:, None]) * F + f[None, :]
            tile_mask = (t < T)[:, None] & f_mask[None, :]
            tl.store(weight + at, weights.to(weight.dtype.element_ty), mask=tile_mask)
            tl.store(log_decay + at, gates, mask=tile_mask)
    if SUMMARY:
        tl.store(restarts + at_segment, restarted, mask=f_mask)
        tl.store(ends + at_segment, z, mask=f_mask)


@triton.jit
def _backward_kernel(
    weight, log_decay, ids, initial, grad_weight, grad_decay, grad_final, carries, grad_x, grad_initial, factors, ends,
    T, F, NS, SEGMENT,
    HAS_IDS: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_CARRY: tl.constexpr, SUMMARY: tl.constexpr,
    BT: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """Adjoint of the normaliser, walking time backwards: position p of a segment is token T - 1 - p."""
    f = tl.program_id(0) * BF + tl.arange(0, BF)
    b = (tl.program_id(1) // NS).to(tl.int64)
    segment = tl.program_id(1) % NS
    f_mask = f < F
    row = b * T * F
    state = tl.zeros([BF], tl.float32)
    factor = tl.full([BF], 1.0, tl.float32)
    if HAS_CARRY:
        state = tl.load(carries + (b * NS + segment) * F + f, mask=f_mask, other=0.0)
    for begin in range(segment * SEGMENT, tl.minimum(segment * SEGMENT + SEGMENT, T), BT):
        t = T - 1 - begin - tl.arange(0, BT)
        inside = t >= 0
        mask = inside[:, None] & f_mask[None, :]
        at = row + t[:, None].to(tl.int64) * F + f[None, :]
        start, ending = t == 0, t == T - 1
        doc = tl.zeros([BT], tl.int64) + b
        if HAS_IDS:
            doc = tl.load(ids + t, mask=inside, other=0).to(tl.int64)
            start = start | (doc != tl.load(ids + t - 1, mask=t > 0, other=0))
            ending = ending | (doc != tl.load(ids + t + 1, mask=inside & (t < T - 1), other=0))
        at_state = doc[:, None] * F + f[None, :]
        # The gate after an empty prefix is the constant 0: no gradient, nothing before it to reach.
        counts = mask & (~start)[:, None]
        if HAS_INITIAL:
            at_start = mask & start[:, None]
            opened = tl.load(initial + at_state, mask=at_start, other=float("-inf"))
            counts = counts | (at_start & (opened > float("-inf")))
        gate_grad = tl.load(grad_decay + at, mask=counts, other=0.0)
        weights = tl.load(weight + at, mask=mask, other=0.0).to(tl.float32)
        weight_grad = tl.load(grad_weight + at, mask=mask, other=0.0).to(tl.float32)
        open_end = mask & (~ending)[:, None]
        p = tl.load(grad_decay + at + F, mask=open_end, other=0.0) - gate_grad - weight_grad * weights
        p += tl.load(grad_final + at_state, mask=mask & ending[:, None], other=0.0)
        following = tl.exp(tl.load(log_decay + at + F, mask=open_end, other=0.0))
        d = tl.where((ending & inside)[:, None], 0.0, following)
        product, p = tl.associative_scan((d, p), 0, linear_combine)
        p += product * state[None, :]
        state = last_row(p, BT)
        if SUMMARY:
            factor *= last_row(product, BT)
        else:
            tl.store(grad_x + at, (weights * (weight_grad + p)).to(grad_x.dtype.element_ty), mask=mask)
            if HAS_INITIAL:
                reach = gate_grad + tl.exp(tl.load(log_decay + at, mask=counts, other=0.0)) * p
                tl.store(grad_initial + at_state, tl.where(counts, reach, 0.0), mask=at_start)
    if SUMMARY:
        at_segment = (b * NS + segment) * F + f
        tl.store(factors + at_segment, factor, mask=f_mask)
        tl.store(ends + at_segment, state, mask=f_mask)


def _grid(batch: int, length: int, features: int, block: int, tile: int, full: int) -> tuple[Segments, tuple[int, int]]:
    blocks = triton.cdiv(features, block)
    plan = plan_segments(batch * blocks, length, tile, full)
    return plan, (blocks, batch * plan.count)


def _then(inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor, Tensor]) -> None:
    _gradients(*outputs[:2], *inputs[1:], *outputs)


@torch.library.custom_op("flame::log_gate", mutates_args=())
@compiled_together(_then)
def _gate(x: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    x = x.contiguous()
    batch, length, features = x.shape
    ids = None if cu_seqlens is None else document_ids(cu_seqlens, length)
    rows = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    weight, log_decay = torch.empty_like(x), torch.empty_like(x, dtype=torch.float32)
    if initial is None:
        final = torch.full((rows, features), float("-inf"), dtype=torch.float32, device=x.device)
    else:
        initial = initial.contiguous()
        final = initial.clone()
    plan, grid = _grid(batch, length, features, WALK_F, GROUP, WALKERS)
    restarts = ends = carries = final
    flags = {"HAS_IDS": ids is not None, "HAS_INITIAL": initial is not None, "GROUP": GROUP, "BF": WALK_F}
    if plan.count > 1:
        restarts = torch.empty(batch, plan.count, features, dtype=torch.float32, device=x.device)
        ends, carries = torch.empty_like(restarts), torch.empty_like(restarts)
        _forward_kernel[grid](
            x, ids, initial, carries, weight, log_decay, final, restarts, ends, length, features, plan.count,
            plan.length, HAS_CARRY=False, SUMMARY=True, num_warps=1, **flags,
        )  # fmt: skip
        _carry_kernel[(triton.cdiv(features, 128), batch)](
            restarts, ends, carries, features, plan.count, BF=128, num_warps=2
        )
    _forward_kernel[grid](
        x, ids, initial, carries, weight, log_decay, final, restarts, ends, length, features, plan.count,
        plan.length, HAS_CARRY=plan.count > 1, SUMMARY=False, num_warps=1, **flags,
    )  # fmt: skip
    return weight, log_decay, final


@_gate.register_fake
def _(x: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    weight = torch.empty_like(x, memory_format=torch.contiguous_format)
    return weight, torch.empty_like(weight, dtype=torch.float32), x.new_empty(rows, x.shape[2], dtype=torch.float32)


def _gradients(
    weight: Tensor,
    log_decay: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    grad_weight: Tensor,
    grad_decay: Tensor,
    grad_final: Tensor,
) -> tuple[Tensor, Tensor]:
    grad_weight, grad_decay, grad_final = grad_weight.contiguous(), grad_decay.contiguous(), grad_final.contiguous()
    batch, length, features = weight.shape
    ids = None if cu_seqlens is None else document_ids(cu_seqlens, length)
    grad_x = torch.empty_like(weight)
    # Of an empty document the final normaliser is the initial one, so that is its gradient.
    grad_initial = grad_final.clone()
    plan, grid = _grid(batch, length, features, BLOCK_F, BLOCK_T, FULL_GPU)
    factors = ends = carries = grad_final
    flags = {"HAS_IDS": ids is not None, "HAS_INITIAL": initial is not None, "BT": BLOCK_T, "BF": BLOCK_F}
    if plan.count > 1:
        factors = torch.empty(batch, plan.count, features, dtype=torch.float32, device=weight.device)
        ends = torch.empty_like(factors)
        _backward_kernel[grid](
            weight, log_decay, ids, initial, grad_weight, grad_decay, grad_final, carries, grad_x, grad_initial,
            factors, ends, length, features, plan.count, plan.length,
            HAS_CARRY=False, SUMMARY=True, num_warps=2, **flags,
        )  # fmt: skip
        carries = chain_segments(factors, ends)
    _backward_kernel[grid](
        weight, log_decay, ids, initial, grad_weight, grad_decay, grad_final, carries, grad_x, grad_initial,
        factors, ends, length, features, plan.count, plan.length,
        HAS_CARRY=plan.count > 1, SUMMARY=False, num_warps=2, **flags,
    )  # fmt: skip
    return grad_x, grad_initial


_gate_backward = torch.library.custom_op("flame::log_gate_backward", _gradients, mutates_args=())


@_gate_backward.register_fake
def _(
    weight: Tensor,
    log_decay: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    grad_weight: Tensor,
    grad_decay: Tensor,
    grad_final: Tensor,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weight), torch.empty_like(grad_final, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output) -> None:
    _, initial, cu_seqlens = inputs
    ctx.save_for_backward(output[0], output[1], initial, cu_seqlens)


def _backward(ctx, grad_weight, grad_decay, grad_final):
    weight, log_decay, initial, cu_seqlens = ctx.saved_tensors
    grads = _gate_backward(weight, log_decay, initial, cu_seqlens, grad_weight, grad_decay, grad_final)
    return grads[0], None if initial is None else grads[1], None


_gate.register_autograd(_backward, setup_context=_setup_context)


def log_gate_triton(
    x: Tensor, initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """See `flame.kernels.log_gate.log_gate`; always returns the final normaliser too."""
    shape = x.shape
    initial = None if initial_state is None else initial_state.float().flatten(1)
    weight, log_decay, final = _gate(x.flatten(2), initial, cu_seqlens)
    return weight.view(shape), log_decay.view(shape), final.view(-1, *shape[2:])
