"""Registration of the losses with torch: what the compiler, autograd and checkpointing see."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from flame.kernels.cross_entropy import chunked
from flame.kernels.cross_entropy.linear import default_chunking, padded_logits, through_logits
from flame.kernels.cross_entropy.options import IGNORED, Statistics, Terms


def row_functions(backend: str) -> ModuleType:
    """The module whose cross_entropy_rows, statistics and gradient to use."""
    if backend != "triton":
        return chunked
    from flame.kernels.cross_entropy import triton_rows  # imports triton, which a CPU does not need

    return triton_rows


@torch.library.custom_op("flame::linear_cross_entropy", mutates_args=())
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    terms: list[float],
    needed: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss sum and, made in the same pass, the gradients for an upstream gradient of one (empty where not needed)."""
    labels, write = labels.contiguous(), any(needed)
    losses = hidden.new_empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))
    form = row_functions(backend)

    def make_gradient(logits: Tensor, rows: slice) -> None:
        losses[rows] = form.cross_entropy_rows(logits, labels[rows], Terms(*terms), write)

    grads = through_logits(hidden, weight, make_gradient, needed[0], needed[1], default_chunking(hidden))
    return losses.sum(), *grads


@linear_cross_entropy.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    terms: list[float],
    needed: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_gradients(hidden, weight, *needed)


def _fake_gradients(
    hidden: Tensor, weight: Tensor, need_hidden: bool, need_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return (
        hidden.new_empty((), dtype=wide),
        torch.empty_like(hidden) if need_hidden else hidden.new_empty(0),
        hidden.new_empty(weight.shape if need_weight else (0,), dtype=wide),
    )


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, hidden_grad, weight_grad = output
    ctx.set_materialize_grads(False)  # else zeros as large as both gradients, for outputs that are nobody's business
    ctx.save_for_backward(hidden_grad, weight_grad)
    ctx.weight_dtype = inputs[1].dtype
    *_, ctx.needed, ctx.backend = inputs
    ctx.others = len(inputs) - 2


def _backward_linear(ctx: Any, loss_grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    hidden_grad, weight_grad = ctx.saved_tensors
    dh = scaled(hidden_grad, loss_grad, hidden_grad.dtype, ctx.backend) if ctx.needed[0] else None
    dw = scaled(weight_grad, loss_grad, ctx.weight_dtype, ctx.backend) if ctx.needed[1] else None
    return dh, dw, *(None,) * ctx.others


linear_cross_entropy.register_autograd(_backward_linear, setup_context=_save_linear)


@register_flop_formula(torch.ops.flame.linear_cross_entropy)
def _flops(
    hidden: list[int], weight: list[int], labels: Any, terms: Any, needed: list[bool], *_: Any, **__: Any
) -> int:
    """Logits, and one product of the same size for each gradient."""
    return 2 * hidden[0] * hidden[1] * weight[0] * (1 + sum(needed))


@torch.library.custom_op("flame::linear_kl", mutates_args=())
def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor,
    temperature: float,
    needed: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum over valid tokens of KL(teacher || student), and the student's gradients (empty where not needed)."""
    if backend == "triton":
        from flame.kernels.cross_entropy.triton_kl import kl_rows
    else:
        kl_rows = chunked.kl_rows
    losses = hidden.new_empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))
    chunking, V = default_chunking(hidden), len(weight)
    teacher_logits = padded_logits(chunking.size(len(hidden), V * hidden.element_size()), V, teacher_hidden)

    def make_gradient(logits: Tensor, rows: slice) -> None:
        teacher = teacher_logits[: len(logits)]
        torch.mm(teacher_hidden[rows], teacher_weight.t(), out=teacher)
        losses[rows] = kl_rows(logits, teacher, labels[rows] != IGNORED, temperature, any(needed))

    grads = through_logits(hidden, weight, make_gradient, needed[0], needed[1], chunking)
    return losses.sum(), *grads


@linear_kl.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor,
    temperature: float,
    needed: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_gradients(hidden, weight, *needed)


linear_kl.register_autograd(_backward_linear, setup_context=_save_linear)


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
    """Loss sum, and per row what the gradient needs: logsumexp and max `[N, 2]`, and the column of the max `[N]`."""
    labels, V = labels.contiguous(), logits.shape[1]
    of = row_functions("triton").statistics(logits, labels, Terms(*terms))
    loss = of.loss(labels, Terms(*terms), V).sum()
    return loss, torch.stack([of.lse, of.largest], dim=1), of.largest_at


@cross_entropy.register_fake
def _(logits: Tensor, labels: Tensor, terms: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    return (
        logits.new_empty((), dtype=torch.float32),
        logits.new_empty(len(logits), 2, dtype=torch.float32),
        torch.empty_like(labels, dtype=torch.int32),
    )


@torch.library.custom_op("flame::cross_entropy_backward", mutates_args=())
def cross_entropy_backward(
    logits: Tensor, labels: Tensor, stats: Tensor, largest_at: Tensor, factor: Tensor, terms: list[float]
) -> Tensor:
    """Gradient of logits for an upstream gradient `factor` (a scalar on the device)."""
    lse, largest = stats.unbind(1)
    of = Statistics(lse, lse, lse, largest, largest_at)  # the gradient does not ask for the other two
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    return row_functions("triton").gradient_from(logits, labels.contiguous(), of, Terms(*terms), out, factor)


@cross_entropy_backward.register_fake
def _(logits: Tensor, labels: Tensor, stats: Tensor, largest_at: Tensor, factor: Tensor, terms: list[float]) -> Tensor:
    return logits.new_empty(logits.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0], inputs[1], output[1], output[2])
    ctx.terms = inputs[2]


def _backward(ctx: Any, loss_grad: Tensor, *_: Tensor) -> tuple[Tensor, None, None]:
    return cross_entropy_backward(*ctx.saved_tensors, loss_grad, ctx.terms), None, None


cross_entropy.register_autograd(_backward, setup_context=_save)
