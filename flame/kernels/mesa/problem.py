"""One mesa problem, checked once."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flame.errors import FlameError
from flame.kernels.linear_attention.triton_wide import parts
from flame.kernels.normalization import l2_norm


@dataclass(frozen=True)
class Problem:
    """q, k [B, T, H, K], v [B, T, H, V], log_decay, beta [B, T, H], regularizer [H, K]; states as in `mesa`."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor
    beta: Tensor
    regularizer: Tensor
    steps: int
    key_state: Tensor | None
    value_state: Tensor | None
    cu_seqlens: Tensor | None
    scale_gradient: bool = True
    normalize: bool = False

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.float64 if self.v.dtype == torch.float64 else torch.float32

    @property
    def sequences(self) -> int:
        return self.q.shape[0] if self.cu_seqlens is None else self.cu_seqlens.numel() - 1

    def initial_states(self) -> tuple[Tensor, Tensor]:
        """[N, H, K, K] and [N, H, K, V] in the compute dtype."""
        H, K, V = self.q.shape[2], self.k.shape[-1], self.v.shape[-1]
        zeros = self.q.new_zeros(self.sequences, H, K, K + V, dtype=self.compute_dtype).split([K, V], -1)
        given = (self.key_state, self.value_state)
        keys, values = (zero if x is None else x.to(self.compute_dtype) for x, zero in zip(given, zeros))
        return keys, values


def check(p: Problem) -> None:
    """Raise FlameError naming the argument at fault."""
    if p.q.dim() != 4 or p.k.shape != p.q.shape or p.v.shape[:-1] != p.q.shape[:-1]:
        shapes = f"q {list(p.q.shape)}, k {list(p.k.shape)}, v {list(p.v.shape)}"
        raise FlameError(f"mesa: q, k [B, T, H, K] and v [B, T, H, V] do not fit together; got {shapes}.")
    if p.cu_seqlens is not None and p.q.shape[0] != 1:
        raise FlameError(f"mesa: cu_seqlens packs documents into one row, so B must be 1; got {p.q.shape[0]}.")
    if p.steps < 1:
        raise FlameError(f"mesa: steps is the number of conjugate-gradient steps, at least 1; got {p.steps}.")
    H, K, V = p.q.shape[2], p.k.shape[-1], p.v.shape[-1]
    wanted = {
        "log_decay": (p.log_decay, [*p.q.shape[:3]]),
        "beta": (p.beta, [*p.q.shape[:3]]),
        "regularizer": (p.regularizer, [H, K]),
        "key_state": (p.key_state, [p.sequences, H, K, K]),
        "value_state": (p.value_state, [p.sequences, H, K, V]),
    }
    for name, (x, shape) in wanted.items():
        if x is not None and list(x.shape) != shape:
            raise FlameError(f"mesa: {name} must be {shape}, got {list(x.shape)}.")


def unit_rows(p: Problem) -> Problem:
    """The same problem with q and k of unit length, if it asks for that."""
    if not p.normalize:
        return p
    # In the compute dtype: the solver amplifies their rounding.
    q, k = (l2_norm(x.to(p.compute_dtype)) for x in (p.q, p.k))
    return replace(p, q=q, k=k, normalize=False)


WIDEST_KEYS = 128  # what the solver's kernel holds on chip


def supported(p: Problem) -> bool:
    """Whether the Triton form takes the problem; the torch form takes the others."""
    return p.k.shape[-1] <= WIDEST_KEYS and parts(p.v.shape[-1]) == 1 and p.compute_dtype == torch.float32
