"""The fast path: `flame::mesa_forward` and `flame::mesa_backward`, with fakes and autograd.

With x the solutions, ``o = linear_attention(x, b k, v)`` needs nothing of its own. The solve's gradient goes through
``H_t x_t = linear_attention(x, b k, k)``, read at the cotangent -dq: with ``A x = q``, ``dq = A^-1 dx`` is a second solve, and
the rest is linear attention's backward. Only x is kept for it beside the inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from flame.kernels.compile_together import compiled_together
from flame.kernels.linear_attention import triton_op as linear
from flame.kernels.mesa.problem import Problem
from flame.kernels.mesa.triton_systems import Keys, Systems, opening_states

_TENSORS = (
    "Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor beta, Tensor regularizer, Tensor? key_state, "
    "Tensor? value_state, Tensor? cu_seqlens"
)
_SCHEMAS = {
    "mesa_forward": f"({_TENSORS}, int steps, bool normalize, bool output_final_state) -> ({', '.join(['Tensor'] * 5)})",
    "mesa_backward": (
        f"({_TENSORS}, Tensor x, Tensor opening, Tensor do, Tensor? dkeys, Tensor? dvalues, int steps, bool normalize, "
        f"bool unit_eps) -> ({', '.join(['Tensor'] * 8)})"
    ),
}


def mesa_triton(p: Problem, output_final_state: bool) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """o [B, T, H, V] in v's dtype and the final states of a supported problem."""
    o, keys, values = _Mesa.apply(
        p.q,
        p.k,
        p.v,
        p.log_decay,
        p.beta,
        p.regularizer,
        p.key_state,
        p.value_state,
        p.cu_seqlens,
        p.steps,
        p.normalize,
        output_final_state,
        p.scale_gradient,
    )
    return o, (keys, values) if output_final_state else None


def _then(inputs, outputs):
    *tensors, steps, normalize, _ = inputs
    o, x, final, values, opening = outputs
    states = (y if y.numel() else None for y in (final, values))
    backward(*tensors, x, opening, o, *states, steps, normalize, True)


@compiled_together(_then)
def forward(
    q, k, v, log_decay, beta, regularizer, key_state, value_state, cu_seqlens, steps, normalize, output_final_state
) -> tuple[Tensor, ...]:
    """o [B, T, H, V]; solutions x [B, T, H, K] in v's dtype; the final states, and the value states at the openings of
    linear attention's items (each empty unless there are any)."""
    final = _final(k, cu_seqlens, output_final_state)
    keys = Keys(k, beta, v.dtype, normalize)
    systems = Systems(keys, log_decay, key_state, cu_seqlens, final if output_final_state else None)
    x = systems.solve(q, regularizer, steps, v.dtype, normalize)
    del systems
    o, values, opening = linear.forward(
        x, keys.write, v, log_decay, None, value_state, cu_seqlens, "scalar", 1.0, output_final_state
    )
    return o, x, final, values, opening


def _final(k: Tensor, cu_seqlens: Tensor | None, wanted: bool) -> Tensor:
    sequences = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (sequences, k.shape[2], k.shape[3], k.shape[3]) if wanted else (0,)
    return k.new_empty(shape, dtype=torch.float32)


def _fake_forward(
    q, k, v, log_decay, beta, regularizer, key_state, value_state, cu_seqlens, steps, normalize, output_final_state
):
    x = v.new_empty(k.shape)
    o, values, opening = linear.fake_forward(
        x, x, v, log_decay, None, value_state, cu_seqlens, "scalar", 1.0, output_final_state
    )
    return o, x, _final(k, cu_seqlens, output_final_state), values, opening


def backward(
    q, k, v, log_decay, beta, regularizer, key_state, value_state, cu_seqlens,
    x, opening, do, dkeys, dvalues, steps, normalize, unit_eps,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of the eight tensors before cu_seqlens; of the states empty where there is none."""
    keys = Keys(k, beta, v.dtype, normalize)
    dx, dwrite, dv, ddecay, _, dvalue_state = linear.backward(
        x, keys.write, v, log_decay, None, value_state, cu_seqlens, opening, do, dvalues, "scalar", 1.0, True
    )
    systems = Systems(keys, log_decay, key_state, cu_seqlens)
    dq_unit, dq, dregularizer = systems.solve_gradient(dx, x, q, regularizer, steps, normalize, unit_eps)
    del systems, dx
    # The cotangent is -dq: the sign goes into the scale. The states are symmetric but their gradients are not, and linear
    # attention reads S^T x where the systems are H x.
    values, scale = keys.into_values(), -1.0
    opening = opening_states(keys.write, values, log_decay, key_state, cu_seqlens)
    dkeys = None if dkeys is None else dkeys.mT
    _, dwrite_keys, dunit, ddecay_keys, _, dkey_state = linear.backward(
        x, keys.write, values, log_decay, None, key_state, cu_seqlens, opening, dq_unit, dkeys, "scalar", scale, True
    )
    dk, dbeta = keys.gradient(dunit, dwrite, dwrite_keys)
    if key_state is not None:
        dkey_state = dkey_state.mT.contiguous()
    return dq.to(q.dtype), dk, dv, ddecay + ddecay_keys, dbeta, dregularizer, dkey_state, dvalue_state


def _fake_backward(
    q, k, v, log_decay, beta, regularizer, key_state, value_state, cu_seqlens,
    x, opening, do, dkeys, dvalues, steps, normalize, unit_eps,
):  # fmt: skip
    rows = [y.new_empty(y.shape) for y in (q, k, v)]
    states = [k.new_empty(0 if y is None else y.shape, dtype=torch.float32) for y in (key_state, value_state)]
    return *rows, *(torch.empty_like(y) for y in (log_decay, beta, regularizer)), *states


class _Mesa(torch.autograd.Function):
    """Autograd around the two operators, as for linear attention."""

    @staticmethod
    def forward(ctx, *inputs):
        *inputs, scale_gradient = inputs
        *tensors, steps, normalize, _ = inputs
        o, x, keys, values, opening = torch.ops.flame.mesa_forward(*inputs)
        ctx.save_for_backward(*tensors, x, opening)
        ctx.settings = steps, normalize, scale_gradient
        ctx.set_materialize_grads(False)
        return o, keys, values

    @staticmethod
    def backward(ctx, do, dkeys, dvalues):
        saved = ctx.saved_tensors
        do = torch.zeros_like(saved[2]) if do is None else do
        dkeys, dvalues = (None if d is None or d.numel() == 0 else d for d in (dkeys, dvalues))
        gradients = torch.ops.flame.mesa_backward(*saved, do, dkeys, dvalues, *ctx.settings)
        wanted = ctx.needs_input_grad
        return *(g if need else None for g, need in zip(gradients, wanted)), None, None, None, None, None


def _forward_flops(q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
    """Writes of both states, one product with H a step, one read of G."""
    B, T, H, K = k_shape
    return 2 * B * T * H * K * (K * (1 + args[6]) + 2 * v_shape[3])


def _backward_flops(q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
    """The second solve, and linear attention's backward for both states."""
    B, T, H, K = k_shape
    return 2 * B * T * H * K * (K * (4 + args[11]) + 4 * v_shape[3])


_library = torch.library.Library("flame", "FRAGMENT")
for _name, _run, _fake in (
    ("mesa_forward", forward, _fake_forward),
    ("mesa_backward", backward, _fake_backward),
):
    _library.define(_name + _SCHEMAS[_name], tags=(torch.Tag.pt2_compliant_tag,))
    for _device in ("CUDA", "CPU"):
        _library.impl(_name, _run, _device)
    torch.library.register_fake(f"flame::{_name}", _fake)
register_flop_formula(torch.ops.flame.mesa_forward)(_forward_flops)
register_flop_formula(torch.ops.flame.mesa_backward)(_backward_flops)
