"""Conjugate gradients with a fixed number of steps, and their implicit gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Operator = Callable[[Tensor], Tensor]  # applies a symmetric positive matrix to every row [..., K]

# Part of the definition of the layer: it also ends the iteration softly once the residual is small.
EPS = 1e-5


def conjugate_gradients(operator: Operator, right: Tensor, steps: int, eps: float = EPS) -> Tensor:
    """`steps` steps towards operator^-1 right, from zero, for every row of right [..., K]."""
    x, residual, direction = torch.zeros_like(right), right, right
    delta = residual.square().sum(-1, keepdim=True)
    for _ in range(steps):
        image = operator(direction)
        rate = delta / ((direction * image).sum(-1, keepdim=True) + eps)
        x, residual = x + rate * direction, residual - rate * image
        previous, delta = delta, residual.square().sum(-1, keepdim=True)
        direction = residual + delta / (previous + eps) * direction
    return x


def solve(operator: Operator, right: Tensor, steps: int, eps: float = EPS) -> Tensor:
    """x with operator(x) = right, differentiable in `right` and in whatever tensors `operator` reads.

    The gradient is that of the exact solution and not of the steps: with A x = b, ``dx = A^-1 (db - dA x)``. So the
    graph is built on the residual ``b - A x`` at the found x, and the backward solves once more with the same steps.
    """
    with torch.no_grad():
        x = conjugate_gradients(operator, right, steps, eps)
    if not torch.is_grad_enabled():
        return x
    return _Implicit.apply(right - operator(x), x, operator, steps, eps)


class _Implicit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, residual: Tensor, x: Tensor, operator: Operator, steps: int, eps: float) -> Tensor:
        ctx.operator, ctx.steps, ctx.eps = operator, steps, eps
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            dresidual = conjugate_gradients(ctx.operator, gradients[0], ctx.steps, ctx.eps)
        return dresidual, None, None, None, None
