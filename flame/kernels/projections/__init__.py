"""Several linear maps of one input, computed together.

Apart, every map gives the input a gradient of its own, and adding them up reads each again. Here every product of the
backward adds to the one before it, in the product's own epilogue. Maps to a few channels (gates, write strengths) are
joined into one product: alone they would leave most of the matrix unit idle while the whole input is read for each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

NARROW = 64  # maps of fewer channels are joined
MULTIPLE = 16  # of the joined channels, which keeps their rows aligned for the tensor cores


@torch.library.custom_op("flame::projections", mutates_args=())
def projections(x: Tensor, weights: list[Tensor]) -> list[Tensor]:
    """x [..., D] times every weight [N, D] transposed: [..., N] each."""
    tokens, narrow = x.flatten(0, -2), narrow_maps(weights)
    if len(narrow) < 2:
        return [torch.mm(tokens, weight.t()).view(*x.shape[:-1], -1) for weight in weights]
    joint = torch.mm(tokens, stacked([weights[index] for index in narrow]).t())
    sizes = [len(weights[index]) for index in narrow]
    parts = dict(zip(narrow, joint[:, : sum(sizes)].split(sizes, 1)))
    made = [
        parts[index].contiguous() if index in parts else torch.mm(tokens, weight.t())
        for index, weight in enumerate(weights)
    ]
    return [y.view(*x.shape[:-1], -1) for y in made]


@projections.register_fake
def _(x: Tensor, weights: list[Tensor]) -> list[Tensor]:
    return [x.new_empty(*x.shape[:-1], len(weight)) for weight in weights]


@torch.library.custom_op("flame::projections_backward", mutates_args=())
def projections_backward(x: Tensor, weights: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
    """Gradient of x, then of every weight."""
    tokens, ys = x.flatten(0, -2), [gradient.reshape(-1, gradient.shape[-1]) for gradient in gradients]
    narrow = narrow_maps(weights) if len(narrow_maps(weights)) > 1 else []
    wide = [index for index in range(len(weights)) if index not in narrow]
    pairs = [(ys[index], weights[index]) for index in wide]
    if narrow:
        joint = stacked([ys[index].t() for index in narrow])  # [channels, M]
        pairs.append((joint.t(), stacked([weights[index] for index in narrow])))
    dx = torch.mm(*pairs[0])
    for y, weight in pairs[1:]:
        dx.addmm_(y, weight)
    found = {index: torch.mm(ys[index].t(), tokens) for index in wide}
    if narrow:
        rows = torch.mm(joint, tokens)
        start = 0
        for index in narrow:
            found[index] = rows[start : start + len(weights[index])].clone()
            start += len(weights[index])
    return [dx.view_as(x), *(found[index] for index in range(len(weights)))]


@projections_backward.register_fake
def _(x: Tensor, weights: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
    return [x.new_empty(x.shape), *(torch.empty_like(weight) for weight in weights)]


def narrow_maps(weights: list[Tensor]) -> list[int]:
    return [index for index, weight in enumerate(weights) if len(weight) < NARROW]


def stacked(parts: list[Tensor]) -> Tensor:
    """Rows of all parts, and zeros up to a multiple."""
    rows = sum(len(part) for part in parts)
    missing = -rows % MULTIPLE
    return torch.cat([*parts, parts[0].new_zeros(missing, parts[0].shape[1])]) if missing else torch.cat(parts)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weights = inputs
    ctx.save_for_backward(x, *weights)


def _backward(ctx: Any, gradients: list[Tensor | None]) -> tuple[Tensor, list[Tensor]]:
    x, *weights = ctx.saved_tensors
    given = [
        x.new_zeros(*x.shape[:-1], len(weight)) if gradient is None else gradient
        for weight, gradient in zip(weights, gradients)
    ]
    dx, *dweights = projections_backward(x, weights, given)
    return dx, dweights


projections.register_autograd(_backward, setup_context=_setup)


@register_flop_formula(torch.ops.flame.projections)
def _flops(x: list[int], weights: list[list[int]], *_: Any, **__: Any) -> int:
    tokens = 1
    for size in x[:-1]:
        tokens *= size
    return sum(2 * tokens * width * depth for width, depth in weights)


@register_flop_formula(torch.ops.flame.projections_backward)
def _backward_flops(x: list[int], weights: list[list[int]], *_: Any, **__: Any) -> int:
    return 2 * _flops(x, weights)
