"""The lowest level of the tree: what blocks of tokens do to their queries and keys, and its gradient.

The WY form of `flame.kernels.path_attention.blocks`, with the inverse in hand, because the gradient needs it too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Inverse = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Base:
    """n blocks of C tokens, wide. q, k, w `[n, C, K]` and beta `[n, C, 1]` as given.

    inverse: of ``I + strictly_lower(beta w w^T)``, [n, C, C], as are gram = strictly_lower(w w^T), below =
    strictly_lower(w k^T), read = lower(q w^T), reach = inverse (beta below), and local, the scores inside the block.
    y = inverse (beta w) [n, C, K]. q_before, k_end: queries moved to before the block, keys to its end. e = w^T y [n, K, K]:
    the block moves a row by ``q - q e``.
    """

    q: Tensor
    k: Tensor
    w: Tensor
    beta: Tensor
    inverse: Tensor
    gram: Tensor
    below: Tensor
    read: Tensor
    reach: Tensor
    y: Tensor
    local: Tensor
    q_before: Tensor
    k_end: Tensor
    e: Tensor


def unit_inverse(system: Tensor) -> Tensor:
    """(I + strictly_lower(system))^-1 by substitution."""
    eye = torch.eye(system.shape[-1], dtype=system.dtype, device=system.device).expand_as(system)
    return torch.linalg.solve_triangular(system, eye, upper=False, unitriangular=True)


def make_base(q: Tensor, k: Tensor, w: Tensor, beta: Tensor, inverse: Inverse) -> Base:
    """q, k, w `[n, C, K]`, beta `[n, C]`, all wide."""
    beta = beta.unsqueeze(-1)
    gram, below = (w @ w.mT).tril_(-1), (w @ k.mT).tril_(-1)
    inv = inverse(beta * gram)
    y, reach, read = inv @ (beta * w), inv @ (beta * below), (q @ w.mT).tril_()
    local = torch.baddbmm((q @ k.mT).tril_(), read, reach, alpha=-1)
    q_before, k_end = torch.baddbmm(q, read, y, alpha=-1), torch.baddbmm(k, reach.mT, w, alpha=-1)
    return Base(q, k, w, beta, inv, gram, below, read, reach, y, local, q_before, k_end, w.mT @ y)


def base_gradients(
    b: Base, dlocal: Tensor, dq_before: Tensor, dk_end: Tensor, de: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, w and beta `[n, C]`; dlocal is zero above the diagonal."""
    dread = torch.baddbmm(dlocal @ b.reach.mT, dq_before, b.y.mT).tril_().neg_()
    dreach = torch.baddbmm(b.read.mT @ dlocal, b.w, dk_end.mT).neg_()
    dy = torch.baddbmm(b.w @ de, b.read.mT, dq_before, alpha=-1)
    dq = torch.baddbmm(torch.baddbmm(dq_before, dlocal, b.k), dread, b.w)
    dscaled, dmet = b.inverse.mT @ dy, b.inverse.mT @ dreach  # of beta w and of beta below
    dsystem = torch.baddbmm(dscaled @ b.y.mT, dmet, b.reach.mT).tril_(-1).neg_()
    dbelow = (b.beta * dmet).tril_(-1)
    dk = torch.baddbmm(torch.baddbmm(dk_end, dlocal.mT, b.q), dbelow.mT, b.w)
    dw = torch.baddbmm(dread.mT @ b.q, b.reach, dk_end, alpha=-1)
    dgram = b.beta * dsystem
    dw = dw.baddbmm_(b.y, de.mT).baddbmm_(dbelow, b.k).baddbmm_(dgram + dgram.mT, b.w).addcmul_(b.beta, dscaled)
    dbeta = (dscaled * b.w).sum(-1) + (dmet * b.below).sum(-1) + (dsystem * b.gram).sum(-1)
    return dq, dk, dw, dbeta
