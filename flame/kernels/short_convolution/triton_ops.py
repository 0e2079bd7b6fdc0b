"""Registration of the convolution kernels with torch: what the compiler, autograd and checkpointing see."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flame.kernels.direct import Direct
from flame.kernels.short_convolution import triton_convolution


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, cu_seqlens: Tensor | None, silu: bool
) -> Tensor:
    """y `[B, T, C]`."""
    return triton_convolution.forward(x, weight, bias, state, cu_seqlens, silu)


_convolution = torch.library.custom_op("flame::short_convolution", _forward, mutates_args=())


@_convolution.register_fake
def _(x, weight, bias, state, cu_seqlens, silu):
    return x.new_empty(x.shape)


def _gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and state."""
    return triton_convolution.backward(dy, x, weight, bias, state, cu_seqlens, silu)


_convolution_backward = torch.library.custom_op("flame::short_convolution_backward", _gradients, mutates_args=())


@_convolution_backward.register_fake
def _(dy, x, weight, bias, state, cu_seqlens, silu):
    return tuple(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in (x, weight, bias, state))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, state, cu_seqlens = ctx.saved_tensors
    dx, dweight, dbias, dstate = short_convolution_backward(dy, x, weight, bias, state, cu_seqlens, ctx.silu)
    return dx, dweight, None if bias is None else dbias, None if state is None else dstate, None, None


_convolution.register_autograd(_backward, setup_context=_save)
short_convolution_backward = Direct(_convolution_backward, _gradients)
short_convolution = Direct(_convolution, _forward, _save, _backward)
