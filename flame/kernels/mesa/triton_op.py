"""The fast path: `flame::mesa_solve_forward` and `..._backward`, with fakes and autograd, around plain linear attention.

With x the solutions, ``o = linear_attention(x, b k, v)`` needs nothing of its own. The solve's gradient goes through
``H_t x_t = linear_attention(x, b k, k)``, read at the cotangent -dq: with ``A x = q``, ``dq = A^-1 dx`` is a second solve, and
the rest is linear attention's backward.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from flame.kernels import tiles
from flame.kernels.linear_attention import linear_attention
from flame.kernels.linear_attention.triton_boundary import boundary_states
from flame.kernels.linear_attention.triton_layout import (
    Items,
    Layout,
    ceil_div,
    item_settings,
    power_of_2,
    segment_bounds,
    strides,
)
from flame.kernels.linear_attention.triton_op import as_rows, make_layout
from flame.kernels.linear_attention.triton_op import backward as linear_attention_backward
from flame.kernels.linear_attention.triton_scalar_passes import BOUNDARY_ROWS, ChunkSums
from flame.kernels.mesa.problem import Problem
from flame.kernels.mesa.triton_solver import mesa_solve

CHUNK = 64

_TENSORS = "Tensor k, Tensor write, Tensor log_decay, Tensor beta, Tensor regularizer, Tensor? key_state"
_SCHEMAS = {
    "mesa_solve_forward": (
        f"(Tensor q, {_TENSORS}, Tensor? cu_seqlens, int steps, bool output_final_state)"
        " -> (Tensor, Tensor)"
    ),
    "mesa_solve_backward": (
        f"(Tensor dx, Tensor x, {_TENSORS}, Tensor? dfinal, Tensor? cu_seqlens, int steps, bool unit_eps)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
}


def mesa_triton(p: Problem, output_final_state: bool) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """o [B, T, H, V] in v's dtype and the final states of a supported problem."""
    write = (p.k * p.beta.unsqueeze(-1)).to(p.v.dtype)
    x, keys = _Solve.apply(
        p.q,
        p.k,
        write,
        p.log_decay,
        p.beta.detach(),
        p.regularizer,
        p.key_state,
        p.cu_seqlens,
        p.steps,
        p.scale_gradient,
        output_final_state,
    )
    o, values = linear_attention(
        x,
        write,
        p.v,
        scalar_decay=p.log_decay,
        scale=1.0,
        initial_state=p.value_state,
        output_final_state=output_final_state,
        cu_seqlens=p.cu_seqlens,
        backend="triton",
    )
    return o, None if values is None else (keys, values)


class _Systems:
    """The matrices of every row, as the solver reads them: keys, decays and the states before all chunks."""

    def __init__(self, k, write, log_decay, beta, key_state, cu_seqlens, final=None) -> None:
        B, T, H, K = (int(n) for n in k.shape)
        self.split = write.dtype == torch.float32
        self.k = as_rows(k if self.split else k.to(torch.float16))
        self.beta = beta.contiguous()
        self.layout = Layout("scalar", B, T, H, K, K, H, 1.0, _chunks(B, T, cu_seqlens))
        self.sums = ChunkSums(self.layout, log_decay.contiguous()).within(CHUNK)
        # The states deserve better than bf16: the solve multiplies their errors.
        write = write if self.split else (self.k * self.beta.unsqueeze(-1)).to(torch.float16)
        initial = None if key_state is None else key_state.contiguous()
        self.states = boundary_states(
            self.layout, self.k, write, self.sums, rows=CHUNK, initial=initial, final=final
        )

    def solve(self, right, regularizer, steps, unit_eps, dtype, other=None) -> tuple[Tensor, Tensor]:
        """x [B, T, H, K] in dtype with A x = right; and with `other` the gradient of the regularizer, [H, K]."""
        layout, right = self.layout, as_rows(right)
        K, packed = layout.K, layout.items.starts is not None
        x = (torch.zeros if packed else torch.empty)(right.shape, dtype=dtype, device=right.device)
        dridge = right.new_empty(layout.items.count if other is not None else 0, layout.heads, K, dtype=torch.float32)
        if packed:
            dridge.zero_()  # of the items that hold no row
        mesa_solve[(layout.items.count * layout.heads,)](
            right_ptr=right,
            k_ptr=self.k,
            beta_ptr=self.beta,
            sum_ptr=self.sums,
            state_ptr=self.states,
            ridge_ptr=regularizer.contiguous(),
            x_ptr=x,
            other_ptr=x if other is None else other,
            dridge_ptr=dridge,
            steps=steps,
            **item_settings(layout, self.sums),
            **strides(r=right, k=self.k),
            K=K,
            BK=power_of_2(K),
            BT=CHUNK,
            UNIT_EPS=unit_eps,
            RIDGE_GRADIENT=other is not None,
            SPLIT=self.split,
            **_tile(K, dtype, right.device),
        )
        return x, dridge.sum(0)


def _tile(K: int, dtype: torch.dtype, device: torch.device) -> tiles.Tile:
    default = {"CHECK": 2, "num_warps": 4, "num_stages": 1}
    return tiles.choose("mesa", tiles.key("solve", K=K, dtype=dtype), default, device)


def _chunks(batch: int, tokens: int, cu_seqlens: Tensor | None) -> Items:
    """Every chunk an item of its own."""
    if cu_seqlens is None:
        per_row = ceil_div(tokens, CHUNK)
        return Items(batch * per_row, CHUNK, per_row)
    bounds = cu_seqlens.to(torch.int32)
    starts, ends, first = segment_bounds(bounds, CHUNK, tokens // CHUNK + bounds.numel() - 1)
    return Items(starts.numel(), CHUNK, 1, starts, ends, first)


def forward(
    q, k, write, log_decay, beta, regularizer, key_state, cu_seqlens, steps, output_final_state
) -> tuple[Tensor, Tensor]:
    """Solutions x [B, T, H, K] in write's dtype, and the final key states (empty unless asked for)."""
    final = _final(k, cu_seqlens, output_final_state)
    wanted = final if output_final_state else None
    systems = _Systems(k, write, log_decay, beta, key_state, cu_seqlens, wanted)
    x, _ = systems.solve(q, regularizer, steps, False, write.dtype)
    return x, final


def _final(k: Tensor, cu_seqlens: Tensor | None, wanted: bool) -> Tensor:
    sequences = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (sequences, k.shape[2], k.shape[3], k.shape[3]) if wanted else (0,)
    return k.new_empty(shape, dtype=torch.float32)


def _fake_forward(q, k, write, log_decay, beta, regularizer, key_state, cu_seqlens, steps, output_final_state):
    return write.new_empty(write.shape), _final(k, cu_seqlens, output_final_state)


def backward(
    dx, x, k, write, log_decay, beta, regularizer, key_state, dfinal, cu_seqlens, steps, unit_eps
) -> tuple[Tensor, ...]:
    """Gradients of q, k, write, log_decay, regularizer and key_state (empty where there is none)."""
    x = as_rows(x)
    systems = _Systems(k, write, log_decay, beta, key_state, cu_seqlens)
    dq, dridge = systems.solve(dx, regularizer, steps, unit_eps, write.dtype, other=x)
    del systems
    # x reads the states at the cotangent -dq: the sign goes into the scale. The states are symmetric, their gradients not:
    # linear attention reads S^T x where the systems are H x.
    dfinal = None if dfinal is None else dfinal.mT
    values, scale = k.to(write.dtype), -1.0
    opening = _opening(x, write, values, log_decay, key_state, cu_seqlens, scale)
    _, dwrite, dk, ddecay, _, dstate = linear_attention_backward(
        x, write, values, log_decay, None, key_state, cu_seqlens, opening, dq, dfinal, "scalar", scale, True
    )
    dstate = dstate if key_state is None else dstate.mT.contiguous()
    return dq, dk, dwrite, ddecay, dridge.to(regularizer.dtype), dstate


def _opening(x, write, values, log_decay, key_state, cu_seqlens, scale) -> Tensor:
    """States at the openings of linear attention's own items."""
    layout = make_layout(x, write, values, log_decay, cu_seqlens, "scalar", scale)
    if not layout.items.cut:
        return x.new_empty(0, dtype=torch.float32)
    sums = ChunkSums(layout, log_decay.contiguous()).within(BOUNDARY_ROWS)
    initial = None if key_state is None else key_state.contiguous()
    return boundary_states(layout, as_rows(write), as_rows(values), sums, rows=BOUNDARY_ROWS, initial=initial)


def _fake_backward(dx, x, k, write, log_decay, beta, regularizer, key_state, dfinal, cu_seqlens, steps, unit_eps):
    dstate = k.new_empty(0, dtype=torch.float32) if key_state is None else torch.empty_like(key_state)
    rows = [write.new_empty(write.shape) for _ in range(3)]
    return *rows, torch.empty_like(log_decay), torch.empty_like(regularizer), dstate


class _Solve(torch.autograd.Function):
    """Autograd around the two operators, as for linear attention."""

    @staticmethod
    def forward(ctx, *inputs):
        q, *tensors, cu_seqlens, steps, scale_gradient, output_final_state = inputs
        x, final = torch.ops.flame.mesa_solve_forward(q, *tensors, cu_seqlens, steps, output_final_state)
        ctx.save_for_backward(x, *tensors, cu_seqlens)
        ctx.steps, ctx.unit_eps, ctx.dtype = steps, scale_gradient, q.dtype
        ctx.set_materialize_grads(False)
        return x, final

    @staticmethod
    def backward(ctx, dx, dfinal):
        x, *tensors, cu_seqlens = ctx.saved_tensors
        dx = torch.zeros_like(x) if dx is None else dx
        dfinal = None if dfinal is None or dfinal.numel() == 0 else dfinal
        dq, dk, dwrite, ddecay, dridge, dstate = torch.ops.flame.mesa_solve_backward(
            dx, x, *tensors, dfinal, cu_seqlens, ctx.steps, ctx.unit_eps
        )
        k, key_state = tensors[0], tensors[-1]
        dstate = None if key_state is None else dstate
        return dq.to(ctx.dtype), dk.to(k.dtype), dwrite, ddecay, None, dridge, dstate, None, None, None, None


def _forward_flops(q_shape, k_shape, *args, out_shape=None, **kwargs) -> int:
    """Write of H and one product with it a step."""
    B, T, H, K = k_shape
    return 2 * B * T * H * K * K * (1 + args[7])


def _backward_flops(dx_shape, x_shape, *args, out_shape=None, **kwargs) -> int:
    B, T, H, K = x_shape
    return 2 * B * T * H * K * K * (5 + args[8])


_library = torch.library.Library("flame", "FRAGMENT")
for _name, _run, _fake in (
    ("mesa_solve_forward", forward, _fake_forward),
    ("mesa_solve_backward", backward, _fake_backward),
):
    _library.define(_name + _SCHEMAS[_name], tags=(torch.Tag.pt2_compliant_tag,))
    for _device in ("CUDA", "CPU"):
        _library.impl(_name, _run, _device)
    torch.library.register_fake(f"flame::{_name}", _fake)
register_flop_formula(torch.ops.flame.mesa_solve_forward)(_forward_flops)
register_flop_formula(torch.ops.flame.mesa_solve_backward)(_backward_flops)
