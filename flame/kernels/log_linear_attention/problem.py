"""One log-linear attention problem: its tensors checked once, and the bookkeeping of Fenwick levels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from flame.errors import FlameError

WIDEST = 128  # head sizes of keys and values that one tile of the kernels holds


class LevelStates(NamedTuple):
    """Decode state. Slot j of `states` [N, L - 1, H, K, V] holds the block of 2^j tokens that bit j of `count` [N] (int64,
    tokens seen) stands for, zero where the bit is 0; the last slot holds everything older than the others."""

    states: Tensor
    count: Tensor


@dataclass(frozen=True)
class Problem:
    """Tensors of one call, validated: q [B, T, Hq, K], k [B, T, Hk, K], v [B, T, H, V], weights [B, T, H, L], decay and
    beta [B, T, H]. With `beta` the states follow the delta rule, otherwise they only decay."""

    op: str
    q: Tensor
    k: Tensor
    v: Tensor
    weights: Tensor
    decay: Tensor | None
    beta: Tensor | None
    scale: float
    initial: LevelStates | None
    cu_seqlens: Tensor | None

    @property
    def heads(self) -> int:
        return self.v.shape[2]

    @property
    def levels(self) -> int:
        return self.weights.shape[-1]

    @property
    def sequences(self) -> int:
        """Number of states: the batch, or the packed documents."""
        return self.q.shape[0] if self.cu_seqlens is None else self.cu_seqlens.numel() - 1

    @property
    def compute_dtype(self) -> torch.dtype:
        """fp32 for every input but fp64, which makes the same code its own oracle."""
        return torch.float64 if self.v.dtype == torch.float64 else torch.float32

    def wide(self, x: Tensor) -> Tensor:
        """[B, T, Hx, D] to [B, T, H, D] in the compute dtype."""
        return x.to(self.compute_dtype).repeat_interleave(self.heads // x.shape[2], 2)

    @property
    def log_decay(self) -> Tensor:
        """[B, T, H] in the compute dtype; zeros for none."""
        if self.decay is None:
            return self.v.new_zeros(self.v.shape[:3], dtype=self.compute_dtype)
        return self.decay.to(self.compute_dtype)


def check(p: Problem) -> None:
    """Raises FlameError naming the argument at fault."""
    for name, x in (("q", p.q), ("k", p.k), ("v", p.v)):
        if x.dim() != 4:
            raise FlameError(f"{p.op}: {name} must be [B, T, H, D], got {list(x.shape)}.")
    rows = [*p.v.shape[:3]]
    if p.q.shape[:2] != p.v.shape[:2] or p.k.shape[:2] != p.v.shape[:2] or p.q.shape[-1] != p.k.shape[-1]:
        shapes = f"q {list(p.q.shape)}, k {list(p.k.shape)}, v {list(p.v.shape)}"
        raise FlameError(f"{p.op}: q, k, v must share [B, T], and q and k their last size; got {shapes}.")
    if p.heads % p.q.shape[2] or p.heads % p.k.shape[2]:
        raise FlameError(
            f"{p.op}: v's {p.heads} heads must be a multiple of q's {p.q.shape[2]} and k's {p.k.shape[2]}."
        )
    if p.beta is not None and p.q.shape[2] != p.k.shape[2]:
        raise FlameError(f"{p.op}: q and k must have as many heads, got {p.q.shape[2]} and {p.k.shape[2]}.")
    if list(p.weights.shape[:3]) != rows or p.weights.dim() != 4 or p.levels < 2:
        raise FlameError(f"{p.op}: level_weights must be {[*rows, 'L']} with L >= 2, got {list(p.weights.shape)}.")
    for name, y in (("scalar_decay", p.decay), ("beta", p.beta)):
        if y is not None and list(y.shape) != rows:
            raise FlameError(f"{p.op}: {name} must be {rows}, got {list(y.shape)}.")
    if p.cu_seqlens is not None and (p.q.shape[0] != 1 or p.cu_seqlens.dim() != 1):
        raise FlameError(
            f"{p.op}: cu_seqlens [N + 1] packs documents into one row, so B must be 1; got B={p.q.shape[0]} and "
            f"cu_seqlens {list(p.cu_seqlens.shape)}. Flatten the batch into the time dimension."
        )
    _check_initial(p)


def kernels_cover(p: Problem) -> bool:
    """Whether the op's own kernels take this problem: no delta rule, one dtype, heads up to `WIDEST`, no states."""
    small = max(p.q.shape[-1], p.v.shape[-1]) <= WIDEST
    return p.beta is None and p.initial is None and small and p.q.dtype == p.k.dtype == p.v.dtype != torch.float64


def _check_initial(p: Problem) -> None:
    if p.initial is None:
        return
    wanted = [p.sequences, p.levels - 1, p.heads, p.k.shape[-1], p.v.shape[-1]]
    if list(p.initial.states.shape) != wanted or list(p.initial.count.shape) != wanted[:1]:
        raise FlameError(
            f"{p.op}: initial_state must be LevelStates of {wanted} and {wanted[:1]}, got "
            f"{list(p.initial.states.shape)} and {list(p.initial.count.shape)}."
        )


def level_table(size: int, levels: int, device: torch.device) -> Tensor:
    """[size, size] int64: the level at which token i of an aligned block of `size` sees token j <= i, at most `levels` - 1:
    0 for itself, else one more than the highest bit in which i and j differ. Above the diagonal the value is meaningless.
    """
    index = torch.arange(size, device=device)
    return bit_length(index[:, None] ^ index[None, :]).clamp(max=levels - 1)


def bit_length(x: Tensor) -> Tensor:
    """Number of binary digits of integers >= 0 (0 for 0), exact below 2^53."""
    return torch.frexp(x.double()).exponent.long()
