"""Registration of the norm kernels with torch: what the compiler, autograd and checkpointing see."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flame.kernels.direct import Direct
from flame.kernels.normalization import triton_norm
from flame.kernels.normalization.triton_norm import Kind


def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    norm: str,
    gating: str,
    eps: float,
    groups: int,
) -> tuple[Tensor, Tensor]:
    """y and the rounded sum x + residual (empty without a residual)."""
    return triton_norm.forward(x, weight, bias, residual, gate, Kind(norm, gating, eps, groups))


_norm = torch.library.custom_op("flame::norm", _forward, mutates_args=())


@_norm.register_fake
def _(x, weight, bias, residual, gate, norm, gating, eps, groups):
    total = x.new_empty(0) if residual is None else x.new_empty(x.shape, dtype=residual.dtype)
    return x.new_empty(x.shape), total


def _gradients(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    norm: str,
    gating: str,
    eps: float,
    groups: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x (the sum, with a residual), gate, weight and bias."""
    return triton_norm.backward(dy, dtotal, x, weight, bias, gate, Kind(norm, gating, eps, groups))


_norm_backward = torch.library.custom_op("flame::norm_backward", _gradients, mutates_args=())


@_norm_backward.register_fake
def _(dy, dtotal, x, weight, bias, gate, norm, gating, eps, groups):
    return tuple(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in (x, gate, weight, bias))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, residual, gate, *ctx.kind = inputs
    # With a residual the rounded sum, alive anyway as the next residual, stands for the exact one in backward.
    ctx.save_for_backward(x if residual is None else output[1], weight, bias, gate)
    ctx.x_dtype = x.dtype
    ctx.residual = residual is not None
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, dtotal: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, bias, gate = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros(x.shape, dtype=ctx.x_dtype, device=x.device)
    dtotal = dtotal if ctx.residual else None
    dx, dgate, dweight, dbias = norm_backward(dy, dtotal, x, weight, bias, gate, *ctx.kind)
    return (
        dx.to(ctx.x_dtype),
        None if weight is None else dweight,
        None if bias is None else dbias,
        dx if ctx.residual else None,
        None if gate is None else dgate,
        *(None,) * 4,
    )


_norm.register_autograd(_backward, setup_context=_save)
norm_backward = Direct(_norm_backward, _gradients)
norm = Direct(_norm, _forward, _save, _backward)
