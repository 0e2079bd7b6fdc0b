"""Losses a few rows at a time, gradients made in the forward, in plain torch: the form for a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from flame.kernels.cross_entropy.options import IGNORED, Terms

_CHUNK_ELEMENTS = 1 << 23  # logits alive at a time


def rows_per_chunk(vocabulary: int) -> int:
    """How many rows of logits are made at a time."""
    return max(1, _CHUNK_ELEMENTS // vocabulary)


def loss_and_gradient(logits: Tensor, labels: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    """Loss sum (at least fp32) of logits `[n, V]` and its gradient in the same wide dtype."""
    raw = logits.to(torch.promote_types(logits.dtype, torch.float32))
    s = terms.soft_cap * torch.tanh(raw / terms.soft_cap) if terms.soft_cap else raw
    valid, target = labels != IGNORED, labels.clamp(min=0).long()[:, None]
    lse = torch.logsumexp(s, dim=-1, keepdim=True)
    smoothing = terms.label_smoothing
    loss = (
        lse - (1 - smoothing) * s.gather(1, target) - smoothing * s.mean(-1, keepdim=True) + terms.z_loss * lse.square()
    )
    grad = torch.exp(s - lse) * (1 + 2 * terms.z_loss * lse) - smoothing / s.shape[1]
    grad.scatter_add_(1, target, grad.new_full(target.shape, smoothing - 1))
    if terms.l2_warp:
        largest, where = s.max(dim=-1, keepdim=True)
        grad.scatter_add_(1, where, terms.l2_warp * largest)
    if terms.soft_cap:
        grad = grad * (1 - (s / terms.soft_cap).square())
    return torch.where(valid, loss[:, 0], 0.0).sum(), torch.where(valid[:, None], grad, 0.0)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, terms: Terms, need_hidden: bool, need_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss sum, gradient of hidden in hidden.dtype and of weight in at least fp32 (empty where not needed)."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    loss = hidden.new_zeros((), dtype=wide)
    hidden_grad = torch.empty_like(hidden) if need_hidden else hidden.new_empty(0)
    weight_grad = torch.zeros_like(weight, dtype=wide) if need_weight else hidden.new_empty(0, dtype=wide)
    size = rows_per_chunk(weight.shape[0])
    for start in range(0, len(hidden), size):
        rows = slice(start, start + size)
        part, grad = loss_and_gradient(hidden[rows] @ weight.t(), labels[rows], terms)
        loss += part
        grad = grad.to(hidden.dtype)
        if need_hidden:
            torch.mm(grad, weight, out=hidden_grad[rows])
        if need_weight:
            weight_grad += grad.t() @ hidden[rows]
    return loss, hidden_grad, weight_grad
