"""The losses as defined, through autograd: any dtype, all logits in memory. In fp64 the oracle."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flame.kernels.cross_entropy.options import IGNORED, Terms


def cross_entropy(logits: Tensor, labels: Tensor, terms: Terms) -> Tensor:
    """Sum over valid tokens of the loss of logits `[N, V]`, in at least fp32."""
    valid = labels != IGNORED
    s = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if terms.soft_cap:
        s = terms.soft_cap * torch.tanh(s / terms.soft_cap)
    lse = torch.logsumexp(s, dim=-1)
    target = s.gather(1, labels.clamp(min=0).long()[:, None])[:, 0]
    loss = lse - (1 - terms.label_smoothing) * target - terms.label_smoothing * s.mean(-1)
    loss = loss + terms.z_loss * lse.square()
    if terms.l2_warp:
        warp = 0.5 * terms.l2_warp * s.amax(-1).square()
        loss = loss + (warp - warp.detach())
    return torch.where(valid, loss, 0.0).sum()


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, terms: Terms) -> Tensor:
    """`cross_entropy` of `hidden @ weight.T`."""
    return cross_entropy(F.linear(hidden, weight), labels, terms)


def linear_kl(
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, labels: Tensor, temperature: float
) -> Tensor:
    """Sum over valid tokens of KL(teacher || student) of both projections' distributions at `temperature`."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    student = F.log_softmax(F.linear(hidden, weight).to(wide) / temperature, dim=-1)
    teacher = F.log_softmax(F.linear(teacher_hidden, teacher_weight).to(wide) / temperature, dim=-1)
    each = (teacher.exp() * (teacher - student)).sum(-1)
    return torch.where(labels != IGNORED, each, 0.0).sum()
