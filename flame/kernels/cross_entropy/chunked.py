"""Row functions of the losses in plain torch: statistics and gradients of some rows of logits, on any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flame.kernels.cross_entropy.options import IGNORED, Statistics, Terms


def _wide(logits: Tensor, terms: Terms) -> Tensor:
    s = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return terms.soft_cap * torch.tanh(s / terms.soft_cap) if terms.soft_cap else s


def statistics(logits: Tensor, labels: Tensor, terms: Terms, first_column: int = 0) -> Statistics:
    """Of logits `[n, V]`, whose columns begin at `first_column` of the vocabulary."""
    s = _wide(logits, terms)
    local = labels.long() - first_column
    here = (labels != IGNORED) & (local >= 0) & (local < s.shape[1])
    target = s.gather(1, local.clamp(0, s.shape[1] - 1)[:, None])[:, 0]
    largest, at = s.max(dim=-1)
    return Statistics(torch.logsumexp(s, -1), torch.where(here, target, 0.0), s.sum(-1), largest, at)


def gradient(
    logits: Tensor, labels: Tensor, of: Statistics, terms: Terms, vocabulary: int, first_column: int
) -> Tensor:
    """d loss / d logits `[n, V]` in at least fp32, given the statistics of the whole rows."""
    s = _wide(logits, terms)
    column = torch.arange(s.shape[1], device=s.device)
    grad = (
        torch.exp(s - of.lse[:, None]) * (1 + 2 * terms.z_loss * of.lse)[:, None] - terms.label_smoothing / vocabulary
    )
    grad = grad - (1 - terms.label_smoothing) * (column == (labels - first_column)[:, None])
    if terms.l2_warp:
        grad = grad + terms.l2_warp * torch.where(column == of.largest_at[:, None], of.largest[:, None], 0.0)
    if terms.soft_cap:
        grad = grad * (1 - (s / terms.soft_cap).square())
    return torch.where((labels != IGNORED)[:, None], grad, 0.0)


def cross_entropy_rows(logits: Tensor, labels: Tensor, terms: Terms, write: bool) -> Tensor:
    """Loss of each row, and with `write` their gradients in place of the logits."""
    of = statistics(logits, labels, terms)
    loss = of.loss(labels, terms, logits.shape[1])
    if write:
        logits.copy_(gradient(logits, labels, of, terms, logits.shape[1], 0))
    return loss


def kl_rows(logits: Tensor, teacher: Tensor, valid: Tensor, temperature: float, write: bool) -> Tensor:
    """KL(teacher || student) of each valid row, and with `write` its gradient in place of the student's logits."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    student, target = (F.log_softmax(x.to(wide) / temperature, dim=-1) for x in (logits, teacher))
    loss = torch.where(valid, (target.exp() * (target - student)).sum(-1), 0.0)
    if write:
        logits.copy_(torch.where(valid[:, None], (student.exp() - target.exp()) / temperature, 0.0))
    return loss
