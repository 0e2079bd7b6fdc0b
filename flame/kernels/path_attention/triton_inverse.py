"""The inverse of a block's unit lower triangular system, held by one program in pieces of 16 rows."""

from __future__ import annotations

import triton
import triton.language as tl

PIECE = tl.constexpr(16)  # rows inverted by substitution before pieces are merged


@triton.jit
def invert_diagonal(d0, d1, d2, d3):
    """(I + d)^-1 of four strictly lower triangular fp32 [PIECE, PIECE], side by side, by substitution.

    Once row m is solved its multiples are taken off the rows below; what is picked never has to change its layout."""
    system = tl.join(tl.join(d0, d1), tl.join(d2, d3))
    index = tl.arange(0, PIECE)
    row = index[:, None, None, None]
    column = index[None, :, None, None]
    inverse = tl.where(row == column, 1.0, 0.0) + tl.zeros_like(system)
    for m in range(PIECE - 1):
        factor = tl.sum(tl.where(column == m, system, 0.0), 1)
        solved = tl.sum(tl.where(row == m, inverse, 0.0), 0)
        inverse -= factor[:, None, :, :] * solved[None, :, :, :]
    left, right = tl.split(inverse)
    d0, d1 = tl.split(left)
    d2, d3 = tl.split(right)
    return d0, d1, d2, d3


@triton.jit
def product(x, y, PRECISION: tl.constexpr):
    return tl.dot(x, y, input_precision=PRECISION)


@triton.jit
def invert(system, PRECISION: tl.constexpr):
    """(I + system)^-1, both as the ten blocks of a lower triangle, row by row; system's diagonal blocks strictly lower.

    Substitution throughout: the inverse is well scaled, but powers of the system are not (64 equal keys, beta near 2)."""
    l00, l10, l11, l20, l21, l22, l30, l31, l32, l33 = system
    t00, t11, t22, t33 = invert_diagonal(l00, l11, l22, l33)
    t10 = -product(t11, product(l10, t00, PRECISION), PRECISION)
    t21 = -product(t22, product(l21, t11, PRECISION), PRECISION)
    t32 = -product(t33, product(l32, t22, PRECISION), PRECISION)
    t20 = -product(t22, product(l20, t00, PRECISION) + product(l21, t10, PRECISION), PRECISION)
    t31 = -product(t33, product(l31, t11, PRECISION) + product(l32, t21, PRECISION), PRECISION)
    rest = product(l30, t00, PRECISION) + product(l31, t10, PRECISION) + product(l32, t20, PRECISION)
    t30 = -product(t33, rest, PRECISION)
    return t00, t10, t11, t20, t21, t22, t30, t31, t32, t33


@triton.jit
def store_block(ptr, x, i: tl.constexpr, j: tl.constexpr, C: tl.constexpr):
    """Store block (i, j) of a chunk's matrix [C, C], and zeros in its mirror above the diagonal."""
    index = tl.arange(0, PIECE)
    cell = index[:, None] * C + index[None, :]
    dtype: tl.constexpr = ptr.dtype.element_ty
    tl.store(ptr + (i * C + j) * PIECE + cell, x.to(dtype))
    if i != j:
        tl.store(ptr + (j * C + i) * PIECE + cell, tl.zeros([PIECE, PIECE], dtype))
