"""Attention of a set of queries to a whole set of keys, no mask: what PaTH's tree of blocks adds up, in plain torch.

A part is shaped q `[N, Tq, K]`, k `[N, Tk, K]`, v `[N, Tk, V]`, bias `[N, Tk]` in base 2 on each key's score, or None.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from flame.kernels.path_attention.base import unit_inverse

LOG2E = math.log2(math.e)
Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


class Parts(Protocol):
    """How parts are computed. lse is the base-2 log of a query's softmax sum `[N, Tq]`."""

    def inverse(self, system: Tensor) -> Tensor:
        """(I + strictly_lower(system))^-1 of `[n, C, C]`."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
        """o `[N, Tq, V]` and lse."""

    def merge(self, o: Tensor, lse: Tensor, seen: Tensor, seen_lse: Tensor) -> None:
        """Take what queries saw elsewhere into o `[.., V]` wide and lse, in place."""

    def differentiate(
        self, rows: tuple[Tensor, Tensor, Tensor, Tensor], k: Tensor, v: Tensor, bias: Tensor | None, scale: float
    ) -> Gradients:
        """dq, dk, dv and, with a bias, the sums of dS over queries `[N, Tk]` and over keys `[N, Tq]`.

        rows: q, the whole output, its gradient, and the whole lse (less what the query's own gates add to these scores).
        """


class PlainParts:
    def inverse(self, system: Tensor) -> Tensor:
        return unit_inverse(system)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
        scores = _scores(q, k, bias, scale)
        lse = torch.logsumexp(scores * math.log(2), -1) * LOG2E
        return torch.exp2(scores - lse.unsqueeze(-1)).to(v.dtype) @ v, lse

    def merge(self, o: Tensor, lse: Tensor, seen: Tensor, seen_lse: Tensor) -> None:
        total = torch.logaddexp2(lse, seen_lse)
        o.mul_(torch.exp2(lse - total).unsqueeze(-1)).addcmul_(torch.exp2(seen_lse - total).unsqueeze(-1), seen)
        lse.copy_(total)

    def differentiate(
        self, rows: tuple[Tensor, Tensor, Tensor, Tensor], k: Tensor, v: Tensor, bias: Tensor | None, scale: float
    ) -> Gradients:
        q, o, do, lse = rows
        p = torch.exp2(_scores(q, k, bias, scale) - lse.unsqueeze(-1))
        ds = p * (do @ v.mT - (o * do).sum(-1, keepdim=True))
        sums = (None, None) if bias is None else (ds.sum(-2), ds.sum(-1))
        return ds @ k * scale, ds.mT @ q * scale, p.mT @ do, *sums


def _scores(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    scores = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) * (scale * LOG2E)
    return scores if bias is None else scores + bias.unsqueeze(-2)
