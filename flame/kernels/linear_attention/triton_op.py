"""The fast path as operators of torch: `flame::linear_attention_forward` and `..._backward`, with fakes and autograd."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from flame.kernels import tiles
from flame.kernels.linear_attention.problem import Problem
from flame.kernels.linear_attention.triton_passes import (
    DecayGradient,
    Layout,
    boundary_states,
    cut_items,
    default_tile,
    sweep,
)

_TENSORS = "Tensor q, Tensor k, Tensor v, Tensor? decay, Tensor? bonus, Tensor? initial_state, Tensor? cu_seqlens"


def linear_attention_triton(p: Problem, output_final_state: bool) -> tuple[Tensor, Tensor | None]:
    """o [B, T, H, V] and the final state [N, H, K, V] of a validated problem."""
    o, final, _ = torch.ops.flame.linear_attention_forward(
        p.q, p.k, p.v, p.decay, p.bonus, p.initial_state, p.cu_seqlens, p.kind, p.scale, output_final_state
    )
    return o, final if output_final_state else None


def make_layout(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, cu_seqlens: Tensor | None, kind: str, scale: float
) -> Layout:
    batch, tokens, _, K = q.shape
    V = v.shape[-1]
    decay_heads = 1 if decay is None else decay.shape[0] if kind == "head" else decay.shape[2]
    heads = max(q.shape[2], k.shape[2], v.shape[2], decay_heads)
    width = default_tile("forward", kind, K, V, q.dtype)["BE"]
    items = cut_items(batch, tokens, heads * -(-V // width), cu_seqlens, tiles.multiprocessors(q.device))
    return Layout(kind, batch, tokens, heads, K, V, decay_heads, scale, items)


def as_rows(x: Tensor) -> Tensor:
    """x [B, T, H, D] such that batch and time are one axis and D is dense; a copy only where they are not."""
    rows = x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1)
    return x if rows and x.stride(-1) == 1 and x.stride(1) > 0 else x.contiguous()


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


@torch.library.custom_op(
    "flame::linear_attention_forward",
    mutates_args=(),
    schema=f"({_TENSORS}, str kind, float scale, bool output_final_state) -> (Tensor, Tensor, Tensor)",
)
def forward(q, k, v, decay, bonus, initial_state, cu_seqlens, kind, scale, output_final_state):
    """o, final state (empty unless asked for), opening states of the items (empty unless time was cut)."""
    q, k, v = (as_rows(x) for x in (q, k, v))
    decay, bonus, initial_state = (_contiguous(x) for x in (decay, bonus, initial_state))
    layout = make_layout(q, k, v, decay, cu_seqlens, kind, scale)
    shape = (layout.sequences, layout.heads, layout.K, layout.V)
    final = q.new_empty(shape if output_final_state else 0, dtype=torch.float32)
    wanted = final if output_final_state else None
    if not layout.items.cut:
        o = sweep("forward", layout, (q, k, v), decay, bonus, initial=initial_state, final=wanted)
        return o, final, q.new_empty(0, dtype=torch.float32)
    opening = boundary_states(
        layout, k, v, decay, reverse=False, bonus=bonus is not None, initial=initial_state, final=wanted
    )
    return sweep("forward", layout, (q, k, v), decay, bonus, initial=opening), final, opening


@forward.register_fake
def _(q, k, v, decay, bonus, initial_state, cu_seqlens, kind, scale, output_final_state):
    layout = make_layout(q, k, v, decay, cu_seqlens, kind, scale)
    states = (layout.heads, layout.K, layout.V)
    o = v.new_empty(layout.batch, layout.tokens, layout.heads, layout.V)
    final = q.new_empty((layout.sequences, *states) if output_final_state else (0,), dtype=torch.float32)
    opening = q.new_empty((layout.items.count, *states) if layout.items.cut else (0,), dtype=torch.float32)
    return o, final, opening


@torch.library.custom_op(
    "flame::linear_attention_backward",
    mutates_args=(),
    schema=(
        f"({_TENSORS}, Tensor opening, Tensor do, Tensor? dfinal, str kind, float scale, bool decay_gradient) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
)
def backward(q, k, v, decay, bonus, initial_state, cu_seqlens, opening, do, dfinal, kind, scale, decay_gradient):
    """Gradients of q, k, v, decay, bonus and initial_state; empty where there is none."""
    q, k, v, do = (as_rows(x) for x in (q, k, v, do.to(v.dtype)))
    decay, bonus, initial_state, dfinal = (_contiguous(x) for x in (decay, bonus, initial_state, dfinal))
    layout = make_layout(q, k, v, decay, cu_seqlens, kind, scale)
    cut = layout.items.cut
    before = opening if cut else initial_state
    dinitial = q.new_empty(0, dtype=torch.float32)
    wanted = None
    if initial_state is not None:
        dinitial = wanted = torch.empty_like(initial_state)
    after = dfinal
    if cut:
        after = boundary_states(
            layout, q, do, decay, reverse=True, bonus=bonus is not None, initial=dfinal, final=wanted
        )
    gradient = _gradient_buffers(layout, decay, bonus, q.dtype) if decay_gradient and decay is not None else None
    of_values = gradient if kind == "value" else None
    of_keys = gradient if kind != "value" else None
    if of_values is not None:
        sweep("forward", layout, (q, k, v), decay, bonus, initial=before, gradient=gradient, other=do, store=False)
    dq = sweep("dq", layout, (do, v, k), decay, bonus, transposed=True, initial=before, gradient=of_keys, other=q)
    if of_keys is not None and kind != "key":
        gradient = _sum_tiles(gradient)
        of_keys = gradient
    dk = sweep("dk", layout, (v, do, q), decay, bonus, transposed=True, initial=after, gradient=of_keys, other=k)
    dv = sweep(
        "dv",
        layout,
        (k, q, do),
        decay,
        bonus,
        initial=after,
        final=None if cut else wanted,
        gradient=of_values,
        other=v,
    )
    ddecay, dbonus = _decay_gradient(layout, gradient, decay, bonus)
    dq, dk, dv = (_sum_groups(d, x) for d, x in ((dq, q), (dk, k), (dv, v)))
    return dq, dk, dv, ddecay, dbonus, dinitial


@backward.register_fake
def _(q, k, v, decay, bonus, initial_state, cu_seqlens, opening, do, dfinal, kind, scale, decay_gradient):
    nothing = q.new_empty(0, dtype=torch.float32)
    ddecay = torch.empty_like(decay) if decay_gradient and decay is not None else nothing
    dbonus = torch.empty_like(bonus) if decay_gradient and bonus is not None else nothing
    dinitial = nothing if initial_state is None else torch.empty_like(initial_state)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    return dq, dk, dv, ddecay, dbonus, dinitial


def _gradient_buffers(layout: Layout, decay: Tensor, bonus: Tensor | None, dtype: torch.dtype) -> DecayGradient:
    rows, H = layout.batch * layout.tokens, layout.heads
    fp32 = {"dtype": torch.float32}
    anchors = decay.new_empty(
        layout.items.anchors, H, layout.K, layout.V, dtype=torch.float32 if dtype == torch.float32 else torch.bfloat16
    )
    if layout.kind in ("key", "value"):
        width = decay.shape[-1]
        own = {"dtype": decay.dtype} if layout.decay_heads == H else fp32
        dbonus = None if bonus is None else decay.new_empty(layout.items.count, H, width, **fp32)
        product = decay.new_empty(rows, H, width, **fp32)
        return DecayGradient(product, anchors, decay.new_empty(rows, H, width, **own), dbonus)
    # dq and dk are tiled over K; no tile is narrower than 16.
    most = -(-layout.K // 16)
    return DecayGradient(decay.new_zeros(most, rows, H, **fp32), anchors, decay.new_zeros(most, rows, H, **fp32), None)


def _sum_tiles(gradient: DecayGradient) -> DecayGradient:
    return DecayGradient(gradient.product.sum(0), gradient.anchors, gradient.ddecay, None)


def _decay_gradient(
    layout: Layout, gradient: DecayGradient | None, decay: Tensor | None, bonus: Tensor | None
) -> tuple[Tensor, Tensor]:
    """ddecay in decay's shape and dtype, dbonus in bonus's; empty where not wanted."""
    nothing = torch.empty(0) if decay is None else decay.new_empty(0, dtype=torch.float32)
    if gradient is None or decay is None:
        return nothing, nothing.clone()
    if layout.kind in ("key", "value"):
        ddecay = gradient.ddecay.view(layout.batch, layout.tokens, layout.heads, -1)
        ddecay = _sum_groups(ddecay, decay).to(decay.dtype)
        if gradient.dbonus is None:
            return ddecay, nothing
        return ddecay, gradient.dbonus.sum(0).to(bonus.dtype)
    ddecay = gradient.ddecay.sum(0).view(layout.batch, layout.tokens, layout.decay_heads, -1).sum(-1)
    if layout.kind == "head":
        ddecay = ddecay.sum((0, 1))
    return ddecay.to(decay.dtype), nothing


def _sum_groups(gradient: Tensor, x: Tensor) -> Tensor:
    """[B, T, H, D] to x's heads."""
    if gradient.shape[2] == x.shape[2]:
        return gradient
    return gradient.unflatten(2, (x.shape[2], -1)).sum(3)


def _setup_context(ctx, inputs, output):
    *tensors, kind, scale, _ = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.kind, ctx.scale = kind, scale


def _autograd(ctx, do, dfinal, _):
    *tensors, opening = ctx.saved_tensors
    q, v = tensors[0], tensors[2]
    if do is None:
        heads = max(x.shape[2] for x in tensors[:3])
        do = q.new_zeros(*q.shape[:2], heads, v.shape[-1])
    dfinal = None if dfinal is None or dfinal.numel() == 0 else dfinal
    wanted = ctx.needs_input_grad
    gradients = torch.ops.flame.linear_attention_backward(
        *tensors, opening, do, dfinal, ctx.kind, ctx.scale, wanted[3] or wanted[4]
    )
    return *(g if need else None for g, need in zip(gradients, wanted)), None, None, None, None


forward.register_autograd(_autograd, setup_context=_setup_context)


def _flops(tokens: int, heads: int, K: int, V: int) -> int:
    """Multiply-adds, counted twice, of one sweep: the recurrence's own (write and read), whatever the chunking."""
    return 4 * tokens * heads * K * V


@register_flop_formula(torch.ops.flame.linear_attention_forward)
def _forward_flops(q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
    heads = max(q_shape[2], k_shape[2], v_shape[2])
    return _flops(q_shape[0] * q_shape[1], heads, q_shape[3], v_shape[3])


@register_flop_formula(torch.ops.flame.linear_attention_backward)
def _backward_flops(q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
    heads = max(q_shape[2], k_shape[2], v_shape[2])
    return 2 * _flops(q_shape[0] * q_shape[1], heads, q_shape[3], v_shape[3])
