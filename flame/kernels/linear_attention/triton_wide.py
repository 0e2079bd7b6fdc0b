"""Head sizes beyond what a sweep's registers hold, as more heads of smaller size (Rodimus has V = 4096, DPFP K = 8 d).

Columns of the state are independent, so V splits into heads that share q, k and the decay; the output is a sum over rows of
the state, so K splits into heads whose outputs add up. Both use the grouped heads that the op has anyway.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from flame.errors import FlameError
from flame.kernels.linear_attention.problem import Problem

WIDEST = 256  # at 512, a sweep's operands alone take the registers
ODD = 128  # the same for sizes that are no power of two: masked to 256, sweeps with a decay came out wrong on an H200


def parts(width: int) -> int:
    """The fewest equal parts of `width` that are not wider than the sweeps take."""
    for count in range(1, width + 1):
        size = width // count
        if width % count == 0 and size <= (WIDEST if size & (size - 1) == 0 else ODD):
            return count
    raise FlameError(f"linear_attention: no head size divides {width}.")


def split_values(p: Problem, count: int) -> Problem:
    """The same problem with `count` heads of V / count for each one."""
    v = _split(_repeat(p.v, p.heads, 2), count)
    decay = p.decay
    if p.kind == "value" and decay is not None:
        decay = _split(_repeat(decay, p.heads, 2), count)
    bonus = None if p.bonus is None else p.bonus.repeat_interleave(count, 0)
    state = p.initial_state
    if state is not None:
        state = state.unflatten(-1, (count, -1)).movedim(-2, 2).flatten(1, 2)
    return replace(p, v=v, decay=decay, bonus=bonus, initial_state=state)


def join_values(o: Tensor, final: Tensor | None, count: int) -> tuple[Tensor, Tensor | None]:
    """Undo `split_values` on the output and the final state."""
    if final is not None:
        final = final.unflatten(1, (-1, count)).movedim(2, 3).flatten(3)
    return o.unflatten(2, (-1, count)).flatten(3), final


def split_keys(p: Problem, count: int) -> Problem:
    """The same problem with `count` heads of K / count for each one, whose outputs add up."""
    q, k = (_split(_repeat(x, p.heads, 2), count) for x in (p.q, p.k))
    decay = p.decay
    if p.kind == "key" and decay is not None:
        decay = _split(_repeat(decay, p.heads, 2), count)
    bonus = None if p.bonus is None else p.bonus.unflatten(1, (count, -1)).flatten(0, 1)
    state = p.initial_state
    if state is not None:
        state = state.unflatten(2, (count, -1)).flatten(1, 2)
    return replace(p, q=q, k=k, decay=decay, bonus=bonus, initial_state=state)


def join_keys(o: Tensor, final: Tensor | None, count: int) -> tuple[Tensor, Tensor | None]:
    if final is not None:
        final = final.unflatten(1, (-1, count)).flatten(2, 3)
    return o.unflatten(2, (-1, count)).float().sum(3).to(o.dtype), final


def _repeat(x: Tensor, heads: int, axis: int) -> Tensor:
    return x if x.shape[axis] == heads else x.repeat_interleave(heads // x.shape[axis], axis)


def _split(x: Tensor, count: int) -> Tensor:
    """[B, T, H, D] to [B, T, H count, D / count]."""
    return x.unflatten(-1, (count, -1)).flatten(2, 3)
