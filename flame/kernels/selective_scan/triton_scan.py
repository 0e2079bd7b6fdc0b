"""Selective scan on a GPU.

A warp owns 32 channels of one row, one a lane, with all their states in registers, and walks the tokens: no shuffles
and one exponential a state and token, which is what bounds the kernel. Rows and channels that cannot fill the GPU are
cut into segments as in the elementwise scan, at the price of computing the states once more.

The forward keeps the state every CHECKPOINT tokens. The backward goes through these stretches from the last: it redoes
a stretch, laying its states aside every GROUP tokens, then redoes each group in registers and walks it backwards.
Sums over channels (the gradients of B and C) go to one buffer a channel block and are added in a fixed order, so that
gradients repeat bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flame.kernels.compile_together import compiled_together
from flame.kernels.elementwise_scan.segments import document_ids
from flame.kernels.elementwise_scan.triton_scan import Segments, both, chain_segments, document_at, plan_segments
from flame.kernels.selective_scan.inputs import ScanInputs

BLOCK_E = 32
CHECKPOINT = 64
GROUP = 4
WARPS = 4096  # that hide each other's latency; fewer rows and channels are cut in time


@triton.jit
def _softplus(x):
    return tl.where(x > 20.0, x, tl.log(1.0 + tl.exp(x)))


@triton.jit
def _step_size(dt, bias, at, mask):
    """softplus(dt + bias) of one token; 0 where masked, so that the token leaves the state as it is."""
    return tl.where(mask, _softplus(tl.load(dt + at, mask=mask, other=0.0).to(tl.float32) + bias), 0.0)


@triton.jit
def _forward_kernel(
    x, dt, A, B, C, D, z, dt_bias, ids, initial, carries, y, checkpoints, final, factors, ends, T, E, NS, SEGMENT,
    STATES: tl.constexpr, S: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_IDS: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_CARRY: tl.constexpr, SUMMARY: tl.constexpr,
    BE: tl.constexpr, GROUP: tl.constexpr, CHECKPOINT: tl.constexpr,
):  # fmt: skip
    LOG2E: tl.constexpr = 1.4426950408889634
    e = tl.program_id(0) * BE + tl.arange(0, BE)
    b = (tl.program_id(1) // NS).to(tl.int64)
    segment = tl.program_id(1) % NS
    s = tl.arange(0, S)
    e_mask, s_mask = e < E, s < STATES
    state_mask = s_mask[:, None] & e_mask[None, :]
    by_channel = e[None, :] * STATES + s[:, None]  # [E, S] in memory
    by_state = s[:, None] * E + e[None, :]  # [S, E]
    rate = tl.load(A + by_channel, mask=state_mask, other=0.0) * LOG2E
    bias = tl.zeros([BE], tl.float32)
    if HAS_BIAS:
        bias = tl.load(dt_bias + e, mask=e_mask, other=0.0).to(tl.float32)
    skip = tl.zeros([BE], tl.float32)
    if HAS_D:
        skip = tl.load(D + e, mask=e_mask, other=0.0).to(tl.float32)
    h = tl.zeros([S, BE], tl.float32)
    at_segment = (b * NS + segment) * STATES * E + by_state
    if HAS_CARRY:
        h = tl.load(carries + at_segment, mask=state_mask, other=0.0)
    elapsed = tl.zeros([BE], tl.float32)
    alive = 1.0
    rows = tl.arange(0, GROUP)
    first = segment * SEGMENT
    for offset in range(0, tl.minimum(SEGMENT, T - first), GROUP):
        begin = first + offset
        if (not SUMMARY) & (begin % CHECKPOINT == 0):
            stretch = b * tl.cdiv(T, CHECKPOINT) + begin // CHECKPOINT
            at_checkpoint = stretch * STATES * E + by_state
            tl.store(checkpoints + at_checkpoint, h, mask=state_mask)
        read = tl.zeros([GROUP, BE], tl.float32)
        for i in tl.static_range(GROUP):
            t = begin + i
            mask = both(e_mask, t < T)
            at = (b * T + t) * E + e
            at_s = (b * T + t) * STATES + s
            step = _step_size(dt, bias, at, mask)
            u = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
            write = tl.load(B + at_s, mask=both(s_mask, t < T), other=0.0).to(tl.float32)
            doc, start, ending = document_at(ids, t, T, b, HAS_IDS)
            if HAS_INITIAL:
                opened = tl.load(initial + doc * E * STATES + by_channel, mask=both(state_mask, start), other=0.0)
                h = tl.where(start, opened, h)
            elif HAS_IDS:
                h = tl.where(start, 0.0, h)
            h = tl.exp2(step[None, :] * rate) * h + (step * u)[None, :] * write[:, None]
            if SUMMARY:
                elapsed += step
                alive = tl.where(start, 0.0, alive)
            else:
                c = tl.load(C + at_s, mask=both(s_mask, t < T), other=0.0).to(tl.float32)
                out = tl.sum(h * c[:, None], 0) + skip * u
                read = tl.where(rows[:, None] == i, out[None, :], read)
                tl.store(final + doc * E * STATES + by_channel, h, mask=both(state_mask, ending))
        if not SUMMARY:
            t = begin + rows
            at = (b * T + t[:, None]) * E + e[None, :]
            tile_mask = (t < T)[:, None] & e_mask[None, :]
            if HAS_Z:
                gate = tl.load(z + at, mask=tile_mask, other=0.0).to(tl.float32)
                read = read * gate * tl.sigmoid(gate)
            tl.store(y + at, read.to(y.dtype.element_ty), mask=tile_mask)
    if SUMMARY:
        tl.store(factors + at_segment, tl.exp2(elapsed[None, :] * rate) * alive, mask=state_mask)
        tl.store(ends + at_segment, h, mask=state_mask)


@triton.jit
def _adjoint_summary_kernel(
    dt, A, C, z, dt_bias, ids, grad_y, grad_final, factors, ends, T, E, NS, SEGMENT,
    STATES: tl.constexpr, S: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_IDS: tl.constexpr,
    BE: tl.constexpr,
):  # fmt: skip
    """The map of the adjoint over a segment, from its end to its begin. Segments are written last first."""
    LOG2E: tl.constexpr = 1.4426950408889634
    e = tl.program_id(0) * BE + tl.arange(0, BE)
    b = (tl.program_id(1) // NS).to(tl.int64)
    segment = tl.program_id(1) % NS
    s = tl.arange(0, S)
    e_mask, s_mask = e < E, s < STATES
    state_mask = s_mask[:, None] & e_mask[None, :]
    by_channel = e[None, :] * STATES + s[:, None]
    rate = tl.load(A + by_channel, mask=state_mask, other=0.0) * LOG2E
    bias = tl.zeros([BE], tl.float32)
    if HAS_BIAS:
        bias = tl.load(dt_bias + e, mask=e_mask, other=0.0).to(tl.float32)
    carry = tl.zeros([S, BE], tl.float32)
    elapsed = tl.zeros([BE], tl.float32)
    alive = 1.0
    first = segment * SEGMENT
    count = tl.minimum(SEGMENT, T - first)
    for back in range(0, count):
        t = first + count - 1 - back
        at = (b * T + t) * E + e
        step = _step_size(dt, bias, at, e_mask)
        grad = tl.load(grad_y + at, mask=e_mask, other=0.0).to(tl.float32)
        if HAS_Z:
            gate = tl.load(z + at, mask=e_mask, other=0.0).to(tl.float32)
            grad = grad * gate * tl.sigmoid(gate)
        c = tl.load(C + (b * T + t) * STATES + s, mask=s_mask, other=0.0).to(tl.float32)
        doc, start, ending = document_at(ids, t, T, b, HAS_IDS)
        g = carry + c[:, None] * grad[None, :]
        g += tl.load(grad_final + doc * E * STATES + by_channel, mask=both(state_mask, ending), other=0.0)
        carry = tl.where(start, 0.0, g * tl.exp2(step[None, :] * rate))
        elapsed += step
        alive = tl.where(start, 0.0, alive)
    at_segment = (b * NS + NS - 1 - segment) * STATES * E + s[:, None] * E + e[None, :]
    tl.store(factors + at_segment, tl.exp2(elapsed[None, :] * rate) * alive, mask=state_mask)
    tl.store(ends + at_segment, carry, mask=state_mask)


@triton.jit
def _backward_kernel(
    x, dt, A, B, C, D, z, dt_bias, ids, initial, checkpoints, carries, scratch, grad_y, grad_final,
    grad_x, grad_dt, grad_A, grad_B, grad_C, grad_D, grad_z, grad_initial, T, E, NS, SEGMENT, ROWS,
    STATES: tl.constexpr, S: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_IDS: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_CARRY: tl.constexpr,
    BE: tl.constexpr, GROUP: tl.constexpr, CHECKPOINT: tl.constexpr,
):  # fmt: skip
    LOG2E: tl.constexpr = 1.4426950408889634
    LN2: tl.constexpr = 0.6931471805599453
    GROUPS: tl.constexpr = CHECKPOINT // GROUP
    block = tl.program_id(0)
    e = block * BE + tl.arange(0, BE)
    b = (tl.program_id(1) // NS).to(tl.int64)
    segment = tl.program_id(1) % NS
    s = tl.arange(0, S)
    e_mask, s_mask = e < E, s < STATES
    state_mask = s_mask[:, None] & e_mask[None, :]
    by_channel = e[None, :] * STATES + s[:, None]
    by_state = s[:, None] * E + e[None, :]
    aside = (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + block) * GROUPS * S * BE
    in_block = s[:, None] * BE + tl.arange(0, BE)[None, :]
    rate = tl.load(A + by_channel, mask=state_mask, other=0.0) * LOG2E
    bias = tl.zeros([BE], tl.float32)
    if HAS_BIAS:
        bias = tl.load(dt_bias + e, mask=e_mask, other=0.0).to(tl.float32)
    skip = tl.zeros([BE], tl.float32)
    if HAS_D:
        skip = tl.load(D + e, mask=e_mask, other=0.0).to(tl.float32)
    carry = tl.zeros([S, BE], tl.float32)
    if HAS_CARRY:
        at_segment = (b * NS + NS - 1 - segment) * STATES * E + by_state
        carry = tl.load(carries + at_segment, mask=state_mask, other=0.0)
    grad_rate = tl.zeros([S, BE], tl.float32)
    grad_skip = tl.zeros([BE], tl.float32)
    first = segment * SEGMENT
    stretches = tl.cdiv(tl.minimum(SEGMENT, T - first), CHECKPOINT)
    for back in range(0, stretches):
        begin = first + (stretches - 1 - back) * CHECKPOINT
        stretch = b * tl.cdiv(T, CHECKPOINT) + begin // CHECKPOINT
        h = tl.load(checkpoints + stretch * STATES * E + by_state, mask=state_mask, other=0.0)
        for group in range(0, GROUPS):
            tl.store(scratch + aside + group * S * BE + in_block, h)
            for i in tl.static_range(GROUP):
                t = begin + group * GROUP + i
                mask = both(e_mask, t < T)
                at = (b * T + t) * E + e
                step = _step_size(dt, bias, at, mask)
                u = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
                write = tl.load(B + (b * T + t) * STATES + s, mask=both(s_mask, t < T), other=0.0).to(tl.float32)
                doc, start, ending = document_at(ids, t, T, b, HAS_IDS)
                if HAS_INITIAL:
                    opened = tl.load(initial + doc * E * STATES + by_channel, mask=both(state_mask, start), other=0.0)
                    h = tl.where(start, opened, h)
                elif HAS_IDS:
                    h = tl.where(start, 0.0, h)
                h = tl.exp2(step[None, :] * rate) * h + (step * u)[None, :] * write[:, None]
        tl.debug_barrier()
        for back_group in range(0, GROUPS):
            group = GROUPS - 1 - back_group
            h = tl.load(scratch + aside + group * S * BE + in_block)
            before = ()
            for i in tl.static_range(GROUP):
                t = begin + group * GROUP + i
                mask = both(e_mask, t < T)
                at = (b * T + t) * E + e
                step = _step_size(dt, bias, at, mask)
                u = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
                write = tl.load(B + (b * T + t) * STATES + s, mask=both(s_mask, t < T), other=0.0).to(tl.float32)
                doc, start, ending = document_at(ids, t, T, b, HAS_IDS)
                before = before + (h,)
                if HAS_INITIAL:
                    opened = tl.load(initial + doc * E * STATES + by_channel, mask=both(state_mask, start), other=0.0)
                    h = tl.where(start, opened, h)
                elif HAS_IDS:
                    h = tl.where(start, 0.0, h)
                h = tl.exp2(step[None, :] * rate) * h + (step * u)[None, :] * write[:, None]
            for j in tl.static_range(GROUP):
                t = begin + group * GROUP + GROUP - 1 - j
                mask = both(e_mask, t < T)
                at = (b * T + t) * E + e
                at_s = (b * T + t) * STATES + s
                raw = tl.load(dt + at, mask=mask, other=0.0).to(tl.float32) + bias
                step = tl.where(mask, _softplus(raw), 0.0)
                u = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
                write = tl.load(B + at_s, mask=both(s_mask, t < T), other=0.0).to(tl.float32)
                c = tl.load(C + at_s, mask=both(s_mask, t < T), other=0.0).to(tl.float32)
                grad = tl.load(grad_y + at, mask=mask, other=0.0).to(tl.float32)
                doc, start, ending = document_at(ids, t, T, b, HAS_IDS)
                # What the token before left, and what this one starts from: not the same where a document starts.
                left = before[GROUP - 1 - j]
                previous = left
                if HAS_INITIAL:
                    opened = tl.load(initial + doc * E * STATES + by_channel, mask=both(state_mask, start), other=0.0)
                    previous = tl.where(start, opened, left)
                elif HAS_IDS:
                    previous = tl.where(start, 0.0, left)
                if HAS_Z:
                    gate = tl.load(z + at, mask=mask, other=0.0).to(tl.float32)
                    sigmoid = tl.sigmoid(gate)
                    out = tl.sum(h * c[:, None], 0) + skip * u
                    gate_grad = grad * out * sigmoid * (1.0 + gate * (1.0 - sigmoid))
                    tl.store(grad_z + at, gate_grad.to(grad_z.dtype.element_ty), mask=mask)
                    grad = grad * gate * sigmoid
                at_partial = (block.to(tl.int64) * ROWS + b * T + t) * STATES + s
                tl.store(grad_C + at_partial, tl.sum(h * grad[None, :], 1), mask=both(s_mask, t < T))
                g = carry + c[:, None] * grad[None, :]
                g += tl.load(grad_final + doc * E * STATES + by_channel, mask=both(state_mask, ending), other=0.0)
                tl.store(grad_B + at_partial, tl.sum(g * (step * u)[None, :], 1), mask=both(s_mask, t < T))
                into = tl.sum(g * write[:, None], 0)
                g = g * tl.exp2(step[None, :] * rate)
                grad_log = g * previous
                grad_step = into * u + tl.sum(grad_log * rate, 0) * LN2
                grad_rate += grad_log * step[None, :]
                grad_skip += grad * u
                tl.store(grad_x + at, (into * step + skip * grad).to(grad_x.dtype.element_ty), mask=mask)
                slope = tl.where(raw > 20.0, 1.0, tl.sigmoid(raw))
                tl.store(grad_dt + at, (grad_step * slope).to(grad_dt.dtype.element_ty), mask=mask)
                if HAS_INITIAL:
                    tl.store(grad_initial + doc * E * STATES + by_channel, g, mask=both(state_mask, start))
                carry = tl.where(start, 0.0, g)
                h = left
        tl.debug_barrier()
    at_program = tl.program_id(1).to(tl.int64)
    tl.store(grad_A + at_program * E * STATES + by_channel, grad_rate, mask=state_mask)
    tl.store(grad_D + at_program * E + e, grad_skip, mask=e_mask)


def _plan(batch: int, length: int, channels: int) -> tuple[Segments, tuple[int, int]]:
    blocks = triton.cdiv(channels, BLOCK_E)
    plan = plan_segments(batch * blocks, length, CHECKPOINT, WARPS)
    return plan, (blocks, batch * plan.count)


def _flags(states: int, d, z, dt_bias, cu_seqlens) -> dict:
    return {
        "STATES": states,
        "S": triton.next_power_of_2(states),
        "HAS_D": d is not None,
        "HAS_Z": z is not None,
        "HAS_BIAS": dt_bias is not None,
        "HAS_IDS": cu_seqlens is not None,
        "BE": BLOCK_E,
        "num_warps": 1,
    }


def _then(inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor, Tensor]) -> None:
    y, final, checkpoints = outputs
    _gradients(*inputs, checkpoints, y, final)


@torch.library.custom_op("flame::selective_scan", mutates_args=())
@compiled_together(_then)
def _scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, final states [N, E, S], and the states every CHECKPOINT tokens [B, T / CHECKPOINT, S, E]."""
    x, dt, A, B, C = (t.contiguous() for t in (x, dt, A, B, C))
    z = None if z is None else z.contiguous()
    batch, length, channels = x.shape
    states = A.shape[1]
    ids = None if cu_seqlens is None else document_ids(cu_seqlens, length)
    rows = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    y = torch.empty_like(x)
    fp32 = {"dtype": torch.float32, "device": x.device}
    final = torch.zeros(rows, channels, states, **fp32) if initial is None else initial.contiguous().clone()
    initial = None if initial is None else initial.contiguous()
    checkpoints = torch.empty(batch, triton.cdiv(length, CHECKPOINT), states, channels, **fp32)
    plan, grid = _plan(batch, length, channels)
    flags = _flags(states, D, z, dt_bias, cu_seqlens)
    flags |= {"HAS_INITIAL": initial is not None, "GROUP": GROUP, "CHECKPOINT": CHECKPOINT}
    factors = ends = carries = final
    inputs = (x, dt, A, B, C, D, z, dt_bias, ids, initial)
    if plan.count > 1:
        factors = torch.empty(batch, plan.count, states * channels, **fp32)
        ends = torch.empty_like(factors)
        _forward_kernel[grid](
            *inputs, carries, y, checkpoints, final, factors, ends, length, channels, plan.count, plan.length,
            HAS_CARRY=False, SUMMARY=True, **flags,
        )  # fmt: skip
        carries = chain_segments(factors, ends)
    _forward_kernel[grid](
        *inputs, carries, y, checkpoints, final, factors, ends, length, channels, plan.count, plan.length,
        HAS_CARRY=plan.count > 1, SUMMARY=False, **flags,
    )  # fmt: skip
    return y, final, checkpoints


@_scan.register_fake
def _(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, channels = x.shape
    rows = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final = x.new_empty(rows, channels, A.shape[1], dtype=torch.float32)
    stretches = (length + CHECKPOINT - 1) // CHECKPOINT
    checkpoints = x.new_empty(batch, stretches, A.shape[1], channels, dtype=torch.float32)
    return torch.empty_like(x, memory_format=torch.contiguous_format), final, checkpoints


def _gradients(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    checkpoints: Tensor,
    grad_y: Tensor,
    grad_final: Tensor,
) -> list[Tensor]:
    """Gradients of x, dt, A, B, C, D, z and the initial state; empty tensors for what was not given."""
    x, dt, A, B, C, grad_y, grad_final = (t.contiguous() for t in (x, dt, A, B, C, grad_y, grad_final))
    z = None if z is None else z.contiguous()
    initial = None if initial is None else initial.contiguous()
    batch, length, channels = x.shape
    states = A.shape[1]
    ids = None if cu_seqlens is None else document_ids(cu_seqlens, length)
    plan, grid = _plan(batch, length, channels)
    flags = _flags(states, D, z, dt_bias, cu_seqlens)
    fp32 = {"dtype": torch.float32, "device": x.device}
    carries = grad_final
    if plan.count > 1:
        factors = torch.empty(batch, plan.count, states * channels, **fp32)
        ends = torch.empty_like(factors)
        summary_flags = {key: value for key, value in flags.items() if key != "HAS_D"}
        _adjoint_summary_kernel[grid](
            dt, A, C, z, dt_bias, ids, grad_y, grad_final, factors, ends, length, channels, plan.count, plan.length,
            **summary_flags,
        )  # fmt: skip
        carries = chain_segments(factors, ends)
    grad_x, grad_dt = torch.empty_like(x), torch.empty_like(dt)
    grad_z = x.new_empty(0) if z is None else torch.empty_like(z)
    grad_A = torch.empty(grid[1], channels, states, **fp32)
    grad_D = torch.empty(grid[1], channels, **fp32)
    grad_B = torch.empty(grid[0], batch * length, states, **fp32)
    grad_C = torch.empty_like(grad_B)
    # Of an empty document the final state is the initial state, so that is its gradient.
    grad_initial = grad_final.clone()
    scratch = torch.empty(grid[0] * grid[1] * (CHECKPOINT // GROUP) * flags["S"] * BLOCK_E, **fp32)
    _backward_kernel[grid](
        x, dt, A, B, C, D, z, dt_bias, ids, initial, checkpoints, carries, scratch, grad_y, grad_final,
        grad_x, grad_dt, grad_A, grad_B, grad_C, grad_D, grad_z, grad_initial,
        length, channels, plan.count, plan.length, batch * length,
        HAS_INITIAL=initial is not None, HAS_CARRY=plan.count > 1, GROUP=GROUP, CHECKPOINT=CHECKPOINT, **flags,
    )  # fmt: skip
    grad_B, grad_C = (g.sum(0).view(batch, length, states) for g in (grad_B, grad_C))
    return [grad_x, grad_dt, grad_A.sum(0), grad_B.to(B.dtype), grad_C.to(C.dtype), grad_D.sum(0), grad_z, grad_initial]


_scan_backward = torch.library.custom_op("flame::selective_scan_backward", _gradients, mutates_args=())


@_scan_backward.register_fake
def _(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    checkpoints: Tensor,
    grad_y: Tensor,
    grad_final: Tensor,
) -> list[Tensor]:
    dense = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, dt, A, B, C)]
    grad_z = x.new_empty(0) if z is None else torch.empty_like(z, memory_format=torch.contiguous_format)
    grad_D = x.new_empty(x.shape[2], dtype=torch.float32)
    return [*dense, grad_D, grad_z, torch.empty_like(grad_final, memory_format=torch.contiguous_format)]


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, output[2])
    ctx.mark_non_differentiable(output[2])


def _backward(ctx, grad_y, grad_final, _):
    *inputs, checkpoints = ctx.saved_tensors
    _, dt, _, _, _, D, z, dt_bias, initial, _ = inputs
    grads = _scan_backward(*inputs, checkpoints, grad_y, grad_final)
    grad_D = None if D is None else grads[5].to(D.dtype)
    grad_bias = None if dt_bias is None else grads[1].sum((0, 1), dtype=torch.float32).to(dt_bias.dtype)
    return (*grads[:5], grad_D, None if z is None else grads[6], grad_bias, None if initial is None else grads[7], None)


_scan.register_autograd(_backward, setup_context=_setup_context)


def selective_scan_triton(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """See `flame.kernels.selective_scan.selective_scan`; always returns the final states too."""
    i = inputs
    initial = None if i.initial_state is None else i.initial_state.float()
    y, final, _ = _scan(i.x, i.dt, i.A.float(), i.B, i.C, i.D, i.z, i.dt_bias, initial, i.cu_seqlens)
    return y, final
