"""Exchanges between ranks as plain functions, for eager and compiled code alike.

`gather_rows`, `scatter_rows` and `sum_ranks` are differentiable; the others have no gradient of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# What both eager and compiled code run. The names of these operators outlive those of their wrappers.
COLLECTIVES = torch.ops._c10d_functional


def all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Rows of all ranks below one another."""
    return COLLECTIVES.wait_tensor(COLLECTIVES.all_gather_into_tensor(x.contiguous(), group.size(), group.group_name))


def reduce_scatter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """One's own rows of the sum over ranks."""
    total = COLLECTIVES.reduce_scatter_tensor(x.contiguous(), "sum", group.size(), group.group_name)
    return COLLECTIVES.wait_tensor(total)


def all_reduce(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    return COLLECTIVES.wait_tensor(COLLECTIVES.all_reduce(x.contiguous(), "sum", group.group_name))


def all_to_all(x: Tensor, received: Sequence[int], sent: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """Rows from every rank below one another, `received` and `sent` of them from and to each."""
    exchanged = COLLECTIVES.all_to_all_single(x.contiguous(), list(received), list(sent), group.group_name)
    return COLLECTIVES.wait_tensor(exchanged)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return all_gather(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return reduce_scatter(grads[0], ctx.group), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return reduce_scatter(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return all_gather(grads[0], ctx.group), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return all_reduce(grads[0], ctx.group), None


def gather_rows(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Rows of all ranks below one another; backwards, the sum over ranks of the gradients of one's own rows."""
    return _Gather.apply(x, group)


def scatter_rows(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """One's own rows of the sum over ranks; backwards, every rank gets the gradients of all rows."""
    return _Scatter.apply(x, group)


def sum_ranks(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over ranks; backwards too, since each rank uses the sum for a part of the work only."""
    return _Sum.apply(x, group)
