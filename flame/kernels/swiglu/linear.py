"""SwiGLU and the product that follows it: the backward makes silu(gate) * up again, so that it is not kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from flame.kernels.swiglu import reference


@torch.library.custom_op("flame::swiglu_linear", mutates_args=())
def swiglu_linear(gate: Tensor, up: Tensor, weight: Tensor, backend: str) -> Tensor:
    """(silu(gate) * up) @ weight.T for gate, up [..., C] and weight [D, C]: [..., D]."""
    if backend == "triton":
        from flame.kernels.swiglu import triton_swiglu  # imports triton, which a CPU does not need

        hidden = triton_swiglu.forward(gate, up)
    else:
        hidden = reference.swiglu(gate, up)
    return torch.mm(hidden.flatten(0, -2), weight.t()).view(*gate.shape[:-1], len(weight))


@swiglu_linear.register_fake
def _(gate: Tensor, up: Tensor, weight: Tensor, backend: str) -> Tensor:
    return gate.new_empty(*gate.shape[:-1], len(weight))


@torch.library.custom_op("flame::swiglu_linear_backward", mutates_args=())
def swiglu_linear_backward(
    dy: Tensor, gate: Tensor, up: Tensor, weight: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of gate, up and weight."""
    rows = dy.reshape(-1, dy.shape[-1])
    hidden = torch.mm(rows, weight).view(gate.shape)  # its gradient, at first
    if backend == "triton":
        from flame.kernels.swiglu import triton_swiglu

        dgate, dup = triton_swiglu.backward_over(hidden, gate, up, value=True)
    else:
        dgate, dup = reference.swiglu_backward(hidden, gate, up)
        hidden = reference.swiglu(gate, up)
    return dgate, dup, torch.mm(rows.t(), hidden.flatten(0, -2))


@swiglu_linear_backward.register_fake
def _(dy: Tensor, gate: Tensor, up: Tensor, weight: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return *swiglu_linear_backward(dy, *ctx.saved_tensors, ctx.backend), None


swiglu_linear.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.flame.swiglu_linear)
def _flops(gate: list[int], up: list[int], weight: list[int], *_: Any, **__: Any) -> int:
    tokens = 1
    for size in gate[:-1]:
        tokens *= size
    return 2 * tokens * weight[0] * weight[1]


@register_flop_formula(torch.ops.flame.swiglu_linear_backward)
def _backward_flops(dy: list[int], gate: list[int], up: list[int], weight: list[int], *_: Any, **__: Any) -> int:
    return 2 * _flops(gate, up, weight)
