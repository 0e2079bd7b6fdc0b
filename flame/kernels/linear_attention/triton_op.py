"""The fast path as operators of torch: `flame::linear_attention_forward` and `..._backward`, with fakes and autograd."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from flame.kernels import tiles
from flame.kernels.compile_together import compiled_together
from flame.kernels.direct import Direct
from flame.kernels.linear_attention import triton_scalar_passes, triton_vector_passes, triton_wide
from flame.kernels.linear_attention.problem import Problem
from flame.kernels.linear_attention.triton_layout import Layout, dense_items, packed_items


def _returns(count: int) -> str:
    return " -> (" + ", ".join(["Tensor"] * count) + ")"


_TENSORS = "Tensor q, Tensor k, Tensor v, Tensor? decay, Tensor? bonus, Tensor? initial_state, Tensor? cu_seqlens"

_SCHEMAS = {
    "linear_attention_forward": f"({_TENSORS}, str kind, float scale, bool output_final_state)" + _returns(3),
    "linear_attention_backward": (
        f"({_TENSORS}, Tensor opening, Tensor do, Tensor? dfinal, str kind, float scale, bool decay_gradient)"
        + _returns(6)
    ),
}


def linear_attention_triton(p: Problem, output_final_state: bool) -> tuple[Tensor, Tensor | None]:
    """o [B, T, H, V] and the final state [N, H, K, V] of a validated problem."""
    values, keys = triton_wide.parts(p.v.shape[-1]), triton_wide.parts(p.k.shape[-1])
    if values > 1:
        o, final = linear_attention_triton(triton_wide.split_values(p, values), output_final_state)
        return triton_wide.join_values(o, final, values)
    if keys > 1:
        o, final = linear_attention_triton(triton_wide.split_keys(p, keys), output_final_state)
        return triton_wide.join_keys(o, final, keys)
    o, final, _ = _sweeps(
        p.q, p.k, p.v, p.decay, p.bonus, p.initial_state, p.cu_seqlens, p.kind, p.scale, output_final_state
    )
    return o, final if output_final_state else None


def make_layout(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, cu_seqlens: Tensor | None, kind: str, scale: float
) -> Layout:
    # Plain numbers: under torch.compile a length is part of the plan, so another length compiles anew.
    batch, tokens, K, V = int(q.shape[0]), int(q.shape[1]), int(q.shape[3]), int(v.shape[3])
    decay_heads = 1 if decay is None else decay.shape[0] if kind == "head" else decay.shape[2]
    heads = max(q.shape[2], k.shape[2], v.shape[2], decay_heads)
    programs = heads * -(-min(K, V) // 64)
    units = tiles.multiprocessors(q.device)
    items = (
        dense_items(batch, tokens, programs, units)
        if cu_seqlens is None
        else packed_items(tokens, programs, cu_seqlens.to(torch.int32), units)
    )
    return Layout(kind, batch, tokens, heads, K, V, decay_heads, scale, items)


def as_rows(x: Tensor) -> Tensor:
    """x [B, T, H, D] such that batch and time are one axis and D is dense; a copy only where they are not."""
    rows = x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1)
    return x if rows and x.stride(-1) == 1 and x.stride(1) > 0 else x.contiguous()


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _then(inputs, outputs):
    *tensors, kind, scale, _ = inputs
    o, final, opening = outputs
    backward(*tensors, opening, o, final if final.numel() else None, kind, scale, True)


@compiled_together(_then)
def forward(q, k, v, decay, bonus, initial_state, cu_seqlens, kind, scale, output_final_state):
    """o, final state (empty unless asked for), opening states of the items (empty unless time was cut)."""
    q, k, v = (as_rows(x) for x in (q, k, v))
    decay, bonus, initial_state = (_contiguous(x) for x in (decay, bonus, initial_state))
    layout = make_layout(q, k, v, decay, cu_seqlens, kind, scale)
    shape = (layout.sequences, layout.heads, layout.K, layout.V)
    final = q.new_empty(shape if output_final_state else 0, dtype=torch.float32)
    wanted = final if output_final_state else None
    if kind in ("key", "value"):
        o, opening = triton_vector_passes.forward(layout, q, k, v, decay, bonus, initial_state, wanted)
    else:
        o, opening = triton_scalar_passes.forward(layout, q, k, v, decay, initial_state, wanted)
    return o, final, q.new_empty(0, dtype=torch.float32) if opening is None else opening


def fake_forward(q, k, v, decay, bonus, initial_state, cu_seqlens, kind, scale, output_final_state):
    layout = make_layout(q, k, v, decay, cu_seqlens, kind, scale)
    states = (layout.heads, layout.K, layout.V)
    o = v.new_empty(layout.batch, layout.tokens, layout.heads, layout.V)
    final = q.new_empty((layout.sequences, *states) if output_final_state else (0,), dtype=torch.float32)
    if kind == "value":
        states = (layout.heads, layout.V, layout.K)
    opening = q.new_empty((layout.items.count, *states) if layout.items.cut else (0,), dtype=torch.float32)
    return o, final, opening


def backward(q, k, v, decay, bonus, initial_state, cu_seqlens, opening, do, dfinal, kind, scale, decay_gradient):
    """Gradients of q, k, v, decay, bonus and initial_state; empty where there is none."""
    tensors = tuple(as_rows(x) for x in (q, k, v, do.to(v.dtype)))
    decay, bonus, initial_state, dfinal = (_contiguous(x) for x in (decay, bonus, initial_state, dfinal))
    layout = make_layout(q, k, v, decay, cu_seqlens, kind, scale)
    before = opening if layout.items.cut else initial_state
    dinitial = None if initial_state is None else torch.empty_like(initial_state)
    if kind in ("key", "value"):
        *gradients, dbonus = triton_vector_passes.backward(
            layout, tensors, decay, bonus, before, dfinal, dinitial, decay_gradient
        )
    else:
        gradients = triton_scalar_passes.backward(layout, tensors, decay, before, dfinal, dinitial, decay_gradient)
        dbonus = None
    results = (*gradients, dbonus, dinitial)
    return tuple(q.new_empty(0, dtype=torch.float32) if x is None else x for x in results)


def _fake_backward(q, k, v, decay, bonus, initial_state, cu_seqlens, opening, do, dfinal, kind, scale, decay_gradient):
    nothing = q.new_empty(0, dtype=torch.float32)
    ddecay = torch.empty_like(decay) if decay_gradient and decay is not None else nothing
    dbonus = nothing if bonus is None else torch.empty_like(bonus)
    dinitial = nothing if initial_state is None else torch.empty_like(initial_state)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    return dq, dk, dv, ddecay, dbonus, dinitial


def _setup_context(ctx, inputs, output):
    *tensors, ctx.kind, ctx.scale, _ = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _autograd(ctx, do, dfinal, _):
    *tensors, opening = ctx.saved_tensors
    if do is None:
        q, v = tensors[0], tensors[2]
        heads = max(x.shape[2] for x in tensors[:3])
        do = v.new_zeros(*q.shape[:2], heads, v.shape[-1])
    dfinal = None if dfinal is None or dfinal.numel() == 0 else dfinal
    wanted = ctx.needs_input_grad
    gradients = _backward(*tensors, opening, do, dfinal, ctx.kind, ctx.scale, wanted[3] or wanted[4])
    return *(g if need else None for g, need in zip(gradients, wanted)), None, None, None, None


def _flops(tokens: int, heads: int, K: int, V: int) -> int:
    """Multiply-adds, counted twice, of one sweep: the recurrence's own (write and read), whatever the chunking."""
    return 4 * tokens * heads * K * V


def forward_flops(q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
    heads = max(q_shape[2], k_shape[2], v_shape[2])
    return _flops(q_shape[0] * q_shape[1], heads, q_shape[3], v_shape[3])


def backward_flops(q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
    heads = max(q_shape[2], k_shape[2], v_shape[2])
    return 2 * _flops(q_shape[0] * q_shape[1], heads, q_shape[3], v_shape[3])


_library = torch.library.Library("flame", "FRAGMENT")
for _name, _run, _fake in (
    ("linear_attention_forward", forward, fake_forward),
    ("linear_attention_backward", backward, _fake_backward),
):
    _library.define(_name + _SCHEMAS[_name], tags=(torch.Tag.pt2_compliant_tag,))
    for _device in ("CUDA", "CPU"):
        _library.impl(_name, _run, _device)
    torch.library.register_fake(f"flame::{_name}", _fake)
torch.library.register_autograd("flame::linear_attention_forward", _autograd, setup_context=_setup_context)
_backward = Direct(torch.ops.flame.linear_attention_backward, backward)
_sweeps = Direct(torch.ops.flame.linear_attention_forward, forward, _setup_context, _autograd)
register_flop_formula(torch.ops.flame.linear_attention_forward)(forward_flops)
register_flop_formula(torch.ops.flame.linear_attention_backward)(backward_flops)
