"""Registration of the losses with torch: what the compiler, autograd and checkpointing see."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flame.kernels.cross_entropy import chunked
from flame.kernels.cross_entropy.options import Terms


@torch.library.custom_op("flame::linear_cross_entropy", mutates_args=())
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    terms: list[float],
    need_hidden: bool,
    need_weight: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss sum and, made in the same pass, the gradients for an upstream gradient of one (empty where not needed)."""
    return chunked.linear_cross_entropy(hidden, weight, labels, Terms(*terms), need_hidden, need_weight)


@linear_cross_entropy.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    terms: list[float],
    need_hidden: bool,
    need_weight: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return (
        hidden.new_empty((), dtype=wide),
        torch.empty_like(hidden) if need_hidden else hidden.new_empty(0),
        torch.empty_like(weight, dtype=wide) if need_weight else hidden.new_empty(0, dtype=wide),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, hidden_grad, weight_grad = output
    ctx.save_for_backward(hidden_grad, weight_grad)
    ctx.weight_dtype = inputs[1].dtype
    ctx.needed = inputs[4], inputs[5]


def _backward(ctx: Any, loss_grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    hidden_grad, weight_grad = ctx.saved_tensors
    dh = _scaled(hidden_grad, loss_grad, hidden_grad.dtype) if ctx.needed[0] else None
    dw = _scaled(weight_grad, loss_grad, ctx.weight_dtype) if ctx.needed[1] else None
    return dh, dw, None, None, None, None, None


linear_cross_entropy.register_autograd(_backward, setup_context=_save)


def _scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """grad * factor, with the product formed in the wide dtype: a bf16 factor alone would be off by up to 0.4 %."""
    return (grad.to(factor.dtype) * factor).to(dtype)
