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
    if backend == "triton":
        from flame.kernels.cross_entropy import triton_linear as form
    else:
        form = chunked  # type: ignore[assignment]
    return form.linear_cross_entropy(hidden, weight, labels, Terms(*terms), need_hidden, need_weight)


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


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, hidden_grad, weight_grad = output
    ctx.save_for_backward(hidden_grad, weight_grad)
    ctx.weight_dtype = inputs[1].dtype
    *_, need_hidden, need_weight, ctx.backend = inputs
    ctx.needed = need_hidden, need_weight


def _backward_linear(ctx: Any, loss_grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    hidden_grad, weight_grad = ctx.saved_tensors
    dh = scaled(hidden_grad, loss_grad, hidden_grad.dtype, ctx.backend) if ctx.needed[0] else None
    dw = scaled(weight_grad, loss_grad, ctx.weight_dtype, ctx.backend) if ctx.needed[1] else None
    return dh, dw, None, None, None, None, None


linear_cross_entropy.register_autograd(_backward_linear, setup_context=_save_linear)


@torch.library.custom_op("flame::scaled", mutates_args=())
def scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    """grad * factor, the product formed in the wide dtype: a bf16 factor alone would be off by up to 0.4 %."""
    if backend == "triton":
        from flame.kernels.cross_entropy.triton_rows import scaled as kernel

        return kernel(grad, factor, dtype)
    return (grad.to(torch.promote_types(grad.dtype, factor.dtype)) * factor).to(dtype)


@scaled.register_fake
def _(grad: Tensor, factor: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    return torch.empty_like(grad, dtype=dtype)


@torch.library.custom_op("flame::cross_entropy", mutates_args=())
def cross_entropy(logits: Tensor, labels: Tensor, terms: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    """Loss sum, and per row what the gradient needs: statistics `[N, 4]` and the column of the max `[N]` (Triton only)."""
    from flame.kernels.cross_entropy.triton_rows import Rows, launch

    losses = logits.new_empty(len(logits), dtype=torch.float32)
    stats = logits.new_empty(len(logits), 4, dtype=torch.float32)
    largest = torch.empty_like(labels, dtype=torch.int32)
    launch(Rows(logits, labels.contiguous(), loss=losses, stats=stats, largest=largest), Terms(*terms), scan=True)
    return losses.sum(), stats, largest


@cross_entropy.register_fake
def _(logits: Tensor, labels: Tensor, terms: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    return (
        logits.new_empty((), dtype=torch.float32),
        logits.new_empty(len(logits), 4, dtype=torch.float32),
        torch.empty_like(labels, dtype=torch.int32),
    )


@torch.library.custom_op("flame::cross_entropy_backward", mutates_args=())
def cross_entropy_backward(
    logits: Tensor, labels: Tensor, stats: Tensor, largest: Tensor, factor: Tensor, terms: list[float]
) -> Tensor:
    """Gradient of logits for an upstream gradient `factor` (a scalar on the device)."""
    from flame.kernels.cross_entropy.triton_rows import Rows, launch

    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    rows = Rows(logits, labels.contiguous(), out=grad, stats=stats, largest=largest, factor=factor)
    launch(rows, Terms(*terms), scan=False)
    return grad


@cross_entropy_backward.register_fake
def _(logits: Tensor, labels: Tensor, stats: Tensor, largest: Tensor, factor: Tensor, terms: list[float]) -> Tensor:
    return logits.new_empty(logits.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], output[1], output[2])
    ctx.terms = inputs[2]


def _backward(ctx: Any, loss_grad: Tensor, *_: Tensor) -> tuple[Tensor, None, None]:
    return cross_entropy_backward(*ctx.saved_tensors, loss_grad, ctx.terms), None, None


cross_entropy.register_autograd(_backward, setup_context=_save)
