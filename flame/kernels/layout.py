"""Small decisions that the row-wise and pointwise ops share: which form runs, and how a tensor's rows lie in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from flame.kernels.backend import select_backend


def pointwise_backend(x: Tensor, requested: str | None) -> str:
    """'triton', or the one plain form, which answers to 'chunked' and 'reference' alike. The kernels have no fp64."""
    if requested is None and x.dtype == torch.float64:
        return "chunked"
    return select_backend(x, requested)


def rows(x: Tensor) -> Tensor:
    """x `[..., C]` as `[N, C]` with adjacent columns: a view if the rows are evenly spaced, otherwise a copy."""
    if x.stride(-1) == 1 or x.shape[-1] == 1:
        try:
            return x.view(-1, x.shape[-1])
        except RuntimeError:
            pass
    return x.contiguous().view(-1, x.shape[-1])


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. Triton's own costs microseconds outside kernels, as does its next_power_of_2."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The least power of two that is at least n (n >= 1)."""
    return 1 << (n - 1).bit_length()
