"""What a block of tokens does to queries and keys, as small matrices: the WY form of its product of reflections.

With rows w_1 .. w_C and ``S = I + strictly_lower(beta W W^T)``, the product H_1 ... H_C equals ``I - Y^T W`` where
``Y = S^-1 (beta W)``. A query row is moved to before the block by ``q - (q W^T) Y`` and a key row to its end by
``k - (k Y^T) W``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Blocks:
    """Every tensor has leading axes [B, Hk, G, N] (G is 1 for those that query heads of a group share).

    local: scores inside the block, [.., C, C], zero above the diagonal. q: queries moved to before the block, [.., C, K].
    k: keys moved to the end of the block. w, y: the block's product is ``I - y^T w``.
    """

    local: Tensor
    q: Tensor
    k: Tensor
    w: Tensor
    y: Tensor


def make_blocks(q: Tensor, k: Tensor, w: Tensor, beta: Tensor) -> Blocks:
    """q [B, Hk, G, N, C, K]; k, w [B, Hk, 1, N, C, K]; beta [B, Hk, 1, N, C]."""
    scaled = beta.unsqueeze(-1)
    below = (w @ k.transpose(-1, -2)).tril(-1)  # [m, j] = w_m . k_j, m > j
    solved = solve(scaled * (w @ w.transpose(-1, -2)), torch.cat([scaled * w, scaled * below], -1))
    y, reach = solved.split([w.shape[-1], k.shape[-2]], -1)
    read = (q @ w.transpose(-1, -2)).tril()
    local = (q @ k.transpose(-1, -2)).tril() - read @ reach
    return Blocks(local, q - read @ y, k - reach.transpose(-1, -2) @ w, w, y)


def solve(system: Tensor, right: Tensor) -> Tensor:
    """(I + strictly_lower(system))^-1 right, by substitution: its inverse is well scaled, powers of it are not."""
    return torch.linalg.solve_triangular(system.tril(-1), right, upper=False, unitriangular=True)
