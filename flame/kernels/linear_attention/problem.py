"""One decayed linear-attention problem: its tensors checked once, its decay reduced to a kind and one tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flame.errors import FlameError

DecayKind = Literal["none", "head", "scalar", "key", "value"]


@dataclass(frozen=True)
class Problem:
    """Tensors of one call, validated.

    q [B, T, Hq, K], k [B, T, Hk, K], v [B, T, Hv, V]; decay by kind: none, head [Hd], scalar [B, T, Hd],
    key [B, T, Hd, K], value [B, T, Hd, V]; bonus [H, K]; initial_state [N, H, K, V]; cu_seqlens [N + 1].
    Every head count divides `heads`, the largest of them; head h of a tensor with Hx heads is h // (heads / Hx).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    kind: DecayKind
    decay: Tensor | None
    bonus: Tensor | None
    scale: float
    initial_state: Tensor | None
    cu_seqlens: Tensor | None

    @property
    def heads(self) -> int:
        return max(self.q.shape[2], self.k.shape[2], self.v.shape[2], self.decay_heads)

    @property
    def decay_heads(self) -> int:
        if self.decay is None:
            return 1
        return self.decay.shape[0] if self.kind == "head" else self.decay.shape[2]

    @property
    def sequences(self) -> int:
        """Number of states: the batch, or the packed documents."""
        return self.q.shape[0] if self.cu_seqlens is None else self.cu_seqlens.numel() - 1

    @property
    def state_shape(self) -> tuple[int, int, int, int]:
        return self.sequences, self.heads, self.k.shape[-1], self.v.shape[-1]

    @property
    def compute_dtype(self) -> torch.dtype:
        """fp32 for every input but fp64, which makes the same code its own oracle."""
        return torch.float64 if self.v.dtype == torch.float64 else torch.float32


def make_problem(  # noqa: PLR0913 (the public signature)
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    head_decay: Tensor | None,
    scalar_decay: Tensor | None,
    key_decay: Tensor | None,
    value_decay: Tensor | None,
    bonus: Tensor | None,
    scale: float | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Problem:
    """Check shapes and reduce the four decay arguments to one kind. Raises FlameError naming the argument at fault."""
    decays: dict[DecayKind, Tensor | None] = {
        "head": head_decay,
        "scalar": scalar_decay,
        "key": key_decay,
        "value": value_decay,
    }
    given = [(kind, decay) for kind, decay in decays.items() if decay is not None]
    if len(given) > 1:
        names = ", ".join(f"{name}_decay" for name, _ in given)
        raise FlameError(f"linear_attention: got {names}; pass at most one (sum log decays of one shape beforehand).")
    kind: DecayKind = given[0][0] if given else "none"
    decay = given[0][1] if given else None
    _check_shapes(q, k, v, cu_seqlens)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    problem = Problem(q, k, v, kind, decay, bonus, scale, initial_state, cu_seqlens)
    _check_decay(problem)
    _check_heads(problem)
    _check_state(problem)
    return problem


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise FlameError(f"linear_attention: {name} must be [B, T, H, D], got {list(x.shape)}.")
    if q.shape[:2] != k.shape[:2] or q.shape[:2] != v.shape[:2] or q.shape[-1] != k.shape[-1]:
        shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
        raise FlameError(f"linear_attention: q, k, v must share [B, T], and q and k their last size; got {shapes}.")
    if cu_seqlens is not None and (q.shape[0] != 1 or cu_seqlens.dim() != 1):
        raise FlameError(
            f"linear_attention: cu_seqlens [N + 1] packs documents into one row, so B must be 1; got B={q.shape[0]} "
            f"and cu_seqlens {list(cu_seqlens.shape)}. Flatten the batch into the time dimension."
        )


def _check_decay(p: Problem) -> None:
    if p.decay is None:
        if p.bonus is not None:
            raise FlameError("linear_attention: bonus needs key_decay (pass zeros for none).")
        return
    if p.bonus is not None and p.kind != "key":
        raise FlameError(f"linear_attention: bonus goes with key_decay only, got {p.kind}_decay.")
    tail = {"key": [p.k.shape[-1]], "value": [p.v.shape[-1]]}.get(p.kind, [])
    wanted = [] if p.kind == "head" else [*p.q.shape[:2]]
    shape = list(p.decay.shape)
    if len(shape) != len(wanted) + 1 + len(tail) or shape[: len(wanted)] != wanted or shape[len(wanted) + 1 :] != tail:
        form = [*wanted, "H", *tail]
        raise FlameError(f"linear_attention: {p.kind}_decay must be {form}, got {shape}.")


def _check_heads(p: Problem) -> None:
    counts = {"q": p.q.shape[2], "k": p.k.shape[2], "v": p.v.shape[2], "decay": p.decay_heads}
    if any(p.heads % count for count in counts.values()):
        raise FlameError(f"linear_attention: every head count must divide the largest, got {counts}.")
    if p.bonus is not None and tuple(p.bonus.shape) != (p.heads, p.k.shape[-1]):
        raise FlameError(f"linear_attention: bonus must be {[p.heads, p.k.shape[-1]]}, got {list(p.bonus.shape)}.")


def _check_state(p: Problem) -> None:
    if p.initial_state is not None and tuple(p.initial_state.shape) != p.state_shape:
        got = list(p.initial_state.shape)
        raise FlameError(f"linear_attention: initial_state must be [N, H, K, V] = {list(p.state_shape)}, got {got}.")
