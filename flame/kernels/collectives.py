"""Exchanges between ranks as plain functions, for eager and compiled code alike. They have no gradient of their own."""

from __future__ import annotations

from collections.abc import Sequence

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
