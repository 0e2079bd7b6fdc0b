"""What the sparse attention kernels share: how rows are gathered, and the shapes of a launch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from flame.kernels.layout import power_of_2

LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class Sizes:
    """Numbers of a call. H query heads, Hk key heads, Hs choosing heads; K and V channels."""

    H: int
    Hk: int
    Hs: int
    K: int
    V: int
    scale: float

    @property
    def rows(self) -> int:
        """Query heads that share a choice."""
        return self.H // self.Hs

    def constants(self) -> dict[str, int]:
        """Compile-time arguments that most kernels take: GP pads the rows of an entry to a power of two."""
        return {
            **{"H": self.H, "Hk": self.Hk, "Hs": self.Hs, "K": self.K, "V": self.V},
            **{"GR": self.rows, "GP": power_of_2(self.rows)},
            **{"BK": max(16, power_of_2(self.K)), "BV": max(16, power_of_2(self.V))},
        }

    def queries(self, rows: int) -> int:
        """Entries in a tile of `rows` rows."""
        return max(1, rows // power_of_2(self.rows))


def precision(x: Tensor) -> str:
    """fp32 operands keep fp32 accuracy (three tf32 products); the setting is without effect on 16-bit ones."""
    return "tf32x3" if x.dtype == torch.float32 else "ieee"


@triton.jit
def load_rows(at, row, ok, D: tl.constexpr, BD: tl.constexpr):
    """Rows `row` [R] of a matrix [., D] as [R, BD], zero where not `ok`."""
    d = tl.arange(0, BD)
    pointers = at + row.to(tl.int64)[:, None] * D + d[None, :]
    if D == BD:
        return tl.load(pointers, mask=ok[:, None], other=0.0)
    return tl.load(pointers, mask=ok[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def store_rows(at, row, ok, x, D: tl.constexpr, BD: tl.constexpr):
    """The inverse of `load_rows`, rounded to the matrix's dtype."""
    d = tl.arange(0, BD)
    pointers = at + row.to(tl.int64)[:, None] * D + d[None, :]
    x = x.to(at.dtype.element_ty)
    if D == BD:
        tl.store(pointers, x, mask=ok[:, None])
    else:
        tl.store(pointers, x, mask=ok[:, None] & (d < D)[None, :])


@triton.jit
def gathered_entries(
    order, begin, end, first, S, Hs: tl.constexpr, GR: tl.constexpr, GP: tl.constexpr, R: tl.constexpr
):
    """The R / GP entries from `begin` on: (entry, query, query head, whether there is one), a row for each query head."""
    r = tl.arange(0, R)
    g = r % GP
    ok = (begin + r // GP < end) & (g < GR)
    entry = tl.load(order + begin + r // GP, mask=ok, other=0)
    pair = entry // S
    return entry * GR + g, first + pair // Hs, (pair % Hs) * GR + g, ok
