"""How a row is cut into units for the walks: numbers only, known without a GPU."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from flame.kernels.layout import cdiv, power_of_2

BLOCK = 64
FAN = 8
LAST = 16  # units that are joined no more
PART = 512  # queries of one program of the gradient
PAD = 128


@dataclass(frozen=True)
class Level:
    """Units of `unit` tokens, `count` of them, in groups of `fan`; top: the last level, of one group."""

    unit: int
    count: int
    fan: int
    top: bool

    @property
    def groups(self) -> int:
        return cdiv(self.count, self.fan)

    @property
    def entries(self) -> int:
        """Matrices of a group (`triton_chain`)."""
        return 1 + self.fan * (self.fan + 1) // 2

    @property
    def part(self) -> int:
        return min(PART, self.unit)


def padded_tokens(tokens: int) -> int:
    return cdiv(tokens, PAD) * PAD


def levels_of(tokens: int) -> list[Level]:
    """tokens: padded."""
    found, unit, count = [], BLOCK, tokens // BLOCK
    while count > LAST:
        found.append(Level(unit, count, FAN, False))
        unit, count = unit * FAN, cdiv(count, FAN)
    return [*found, Level(unit, count, count, True)]


def padded_width(width: int) -> int:
    """Columns of a workspace: at least 64, since of rows of 32 the gradients of w and beta were NaN on an H200."""
    return max(64, power_of_2(width))


def kept_shapes(q: Tensor, k: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Of queries, keys and E at the bounds of the lowest level's groups, empty if it is the only one."""
    (B, _, H, K), Hk, tokens = q.shape, k.shape[2], padded_tokens(q.shape[1])
    first, *rest = levels_of(tokens)
    if not rest:
        return (0,), (0,), (0,)
    D = padded_width(K)
    return (B * H, tokens, D), (B * Hk, tokens, D), (B * Hk, first.groups, D, D)
