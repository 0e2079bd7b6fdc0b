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


def solve(operator: Operator, right: Tensor, steps: int, scale_gradient: bool = True, eps: float = EPS) -> Tensor:
    """x with operator(x) = right, differentiable in `right` and in whatever tensors `operator` reads.

    The gradient is that of the exact solution and not of the steps: with A x = b, ``dx = A^-1 (db - dA x)``. So the
    graph is built on the residual ``b - A x`` at the found x, and the backward solves once more with the same steps.

    Args:
        scale_gradient: solve for gradients of length one, so that their size does not matter.
    """
    with torch.no_grad():
        x = conjugate_gradients(operator, right, steps, eps)
    if not torch.is_grad_enabled():
        return x
    return _Implicit.apply(right - operator(x), x, operator, (steps, eps), scale_gradient)


class _Implicit(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, residual: Tensor, x: Tensor, operator: Operator, solver: tuple[int, float], scale_gradient: bool
    ) -> Tensor:
        ctx.operator, ctx.solver, ctx.scale_gradient = operator, solver, scale_gradient
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            gradient, length = gradients[0], None
            if ctx.scale_gradient:
                # eps is meant for rows of length one, which queries are. Gradients are as small as the number of tokens
                # in the loss makes them, and must not be lost in it: the solution is linear in them.
                length = gradient.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(gradient.dtype).tiny)
                gradient = gradient / length
            dresidual = conjugate_gradients(ctx.operator, gradient, *ctx.solver)
        return dresidual if length is None else length * dresidual, None, None, None, None
