"""Linear attention of scaled values, which are made again in the backward, so that a state-space layer does not keep its input
twice (Mamba-2: Dao and Gu, arXiv 2405.21060)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from flame.kernels.direct import Direct
from flame.kernels.linear_attention import triton_head_scale, triton_op, triton_wide
from flame.kernels.linear_attention.problem import Problem

_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor factor, Tensor? decay, Tensor? initial_state, Tensor? cu_seqlens"


def fits(p: Problem) -> bool:
    """Whether one call of the kernels serves: no bonus, heads that need not be cut."""
    return p.bonus is None and triton_wide.parts(p.k.shape[-1]) == triton_wide.parts(p.v.shape[-1]) == 1


def scaled_linear_attention(p: Problem, factor: Tensor, output_final_state: bool) -> tuple[Tensor, Tensor | None]:
    """`linear_attention_triton` of a problem whose values are yet to be multiplied with factor [B, T, Hv]."""
    o, final, _ = _apply(
        p.q, p.k, p.v, factor, p.decay, p.initial_state, p.cu_seqlens, p.kind, p.scale, output_final_state
    )
    return o, final if output_final_state else None


def _forward(q, k, v, factor, decay, initial_state, cu_seqlens, kind, scale, output_final_state):
    scaled = triton_head_scale.multiply(v, factor)
    return triton_op.forward(q, k, scaled, decay, None, initial_state, cu_seqlens, kind, scale, output_final_state)


def _fake_forward(q, k, v, factor, decay, initial_state, cu_seqlens, kind, scale, output_final_state):
    return triton_op.fake_forward(q, k, v, decay, None, initial_state, cu_seqlens, kind, scale, output_final_state)


def _gradients(q, k, v, factor, decay, initial_state, cu_seqlens, opening, do, dfinal, kind, scale):
    """Of q, k, v, factor, decay and initial_state; empty where there is none."""
    scaled = triton_head_scale.multiply(v, factor)
    dq, dk, dscaled, ddecay, _, dinitial = triton_op.backward(
        q, k, scaled, decay, None, initial_state, cu_seqlens, opening, do, dfinal, kind, scale, decay is not None
    )
    del scaled
    return dq, dk, *triton_head_scale.gradients(v, factor, dscaled), ddecay, dinitial


def _fake_gradients(q, k, v, factor, decay, initial_state, cu_seqlens, opening, do, dfinal, kind, scale):
    nothing = q.new_empty(0, dtype=torch.float32)
    dfactor = factor.new_empty(factor.shape, dtype=torch.float32)
    ddecay, dinitial = (nothing if x is None else torch.empty_like(x) for x in (decay, initial_state))
    return *(x.new_empty(x.shape) for x in (q, k, v)), dfactor, ddecay, dinitial


def _save(ctx, inputs, output):
    *tensors, ctx.kind, ctx.scale, _ = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.shape = output[0].shape
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx, do, dfinal, _):
    *tensors, opening = ctx.saved_tensors
    _, _, v, factor, decay, initial_state, _ = tensors
    if do is None:
        do = v.new_zeros(ctx.shape)
    dfinal = None if dfinal is None or dfinal.numel() == 0 else dfinal
    dq, dk, dv, dfactor, ddecay, dinitial = _apply_gradients(*tensors, opening, do, dfinal, ctx.kind, ctx.scale)
    ddecay = None if decay is None else ddecay
    dinitial = None if initial_state is None else dinitial
    return dq, dk, dv, dfactor.to(factor.dtype), ddecay, dinitial, None, None, None, None


_library = torch.library.Library("flame", "FRAGMENT")
for _name, _arguments, _run, _fake in (
    (
        "scaled_linear_attention",
        "str kind, float scale, bool output_final_state) -> (Tensor, Tensor, Tensor)",
        _forward,
        _fake_forward,
    ),
    (
        "scaled_linear_attention_backward",
        "Tensor opening, Tensor do, Tensor? dfinal, str kind, float scale) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        _gradients,
        _fake_gradients,
    ),
):
    _library.define(f"{_name}({_INPUTS}, {_arguments}", tags=(torch.Tag.pt2_compliant_tag,))
    for _device in ("CUDA", "CPU"):
        _library.impl(_name, _run, _device)
    torch.library.register_fake(f"flame::{_name}", _fake)
torch.library.register_autograd("flame::scaled_linear_attention", _backward, setup_context=_save)
_apply_gradients = Direct(torch.ops.flame.scaled_linear_attention_backward, _gradients)
_apply = Direct(torch.ops.flame.scaled_linear_attention, _forward, _save, _backward)
register_flop_formula(torch.ops.flame.scaled_linear_attention)(triton_op.forward_flops)
register_flop_formula(torch.ops.flame.scaled_linear_attention_backward)(triton_op.backward_flops)
