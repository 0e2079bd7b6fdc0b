"""The two delta-rule problems, checked once: the tied form (delta rule proper) and the diagonal-plus-low-rank form."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from flame.errors import FlameError

NORM_EPS = 1e-6  # added to the sum of squares, inside the root


@dataclass(frozen=True)
class Tied:
    """``e = v - a^T S'``, ``S = decay S + beta k e^T``, with S' the decayed state, or the plain one if `exclusive`.

    q, k [B, T, Hk, K], v [B, T, H, V], beta [B, T, H] or None for one, decay None, [B, T, H] or [B, T, H, K],
    erase [B, T, Hk, K] or None for k. `normalize`: q, k and erase are divided by their lengths first.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor | None
    decay: Tensor | None
    erase: Tensor | None
    exclusive: bool
    normalize: bool
    scale: float
    initial_state: Tensor | None
    cu_seqlens: Tensor | None

    @property
    def heads(self) -> int:
        return self.v.shape[2]


@dataclass(frozen=True)
class Untied:
    """``S = diag(exp(decay)) S + b (a^T S) + k v^T``, the read by `a` before the decay; all [B, T, H, K | V]."""

    q: Tensor
    k: Tensor
    v: Tensor
    a: Tensor
    b: Tensor
    decay: Tensor
    scale: float
    initial_state: Tensor | None
    cu_seqlens: Tensor | None

    @property
    def heads(self) -> int:
        return self.v.shape[2]


Problem = Tied | Untied


def compute_dtype(p: Problem) -> torch.dtype:
    """fp32 for every input but fp64, which makes the same code its own oracle."""
    return torch.float64 if p.v.dtype == torch.float64 else torch.float32


def sequences(p: Problem) -> int:
    """Number of states: the batch, or the packed documents."""
    return p.q.shape[0] if p.cu_seqlens is None else p.cu_seqlens.numel() - 1


def initial_state(p: Problem) -> Tensor:
    """[N, H, K, V] in the compute dtype."""
    dtype = compute_dtype(p)
    if p.initial_state is not None:
        return p.initial_state.to(dtype)
    return p.q.new_zeros(sequences(p), p.heads, p.k.shape[-1], p.v.shape[-1], dtype=dtype)


def normalized(p: Tied) -> Tied:
    """The same problem in the compute dtype with q, k and erase at unit length where that is asked for."""
    dtype = compute_dtype(p)
    q, k, erase = p.q.to(dtype), p.k.to(dtype), None if p.erase is None else p.erase.to(dtype)
    if p.normalize:
        q, k, erase = unit(q), unit(k), None if erase is None else unit(erase)
    return replace(p, q=q, k=k, erase=erase, normalize=False)


def unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + NORM_EPS)


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """[B, T, Hx, ...] to [B, T, H, ...]; head h reads h // (H / Hx)."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], 2)


def steps_per_token(q: Tensor, k: Tensor) -> int:
    """How many rank-one steps a token makes: k has that many rows for every row of q.

    Raises:
        FlameError: k's length is no multiple of q's.
    """
    if q.dim() != 4 or k.dim() != 4:
        raise FlameError(f"delta_rule: q and k must be [B, T, H, K], got {list(q.shape)} and {list(k.shape)}.")
    if q.shape[1] and k.shape[1] % q.shape[1]:
        raise FlameError(
            f"delta_rule: k has {k.shape[1]} rows for {q.shape[1]} tokens of q; give each token the same number of steps."
        )
    return k.shape[1] // q.shape[1] if q.shape[1] else 1


def expand_steps(p: Tied, steps: int) -> Tied:
    """One row a step: the decay acts on a token's first step, the read follows its last. Other rows read nothing."""
    if steps == 1:
        return p

    def spread(x: Tensor, at: int) -> Tensor:
        after = [0, 0] * (x.dim() - 2) + [at, steps - 1 - at]
        return F.pad(x.unsqueeze(2), after).flatten(1, 2)

    decay = None if p.decay is None else spread(p.decay, 0)
    bounds = None if p.cu_seqlens is None else p.cu_seqlens * steps
    return replace(p, q=spread(p.q, steps - 1), decay=decay, cu_seqlens=bounds)


def check_tied(p: Tied, steps: int) -> None:
    """Raise FlameError naming the argument at fault."""
    _check_rows("delta_rule", p.q, p.k, p.v, steps, p.cu_seqlens)
    B, rows, H = p.v.shape[:3]
    if p.q.shape[2] != p.k.shape[2] or H % p.k.shape[2]:
        raise FlameError(
            f"delta_rule: q and k must have one head count, which divides that of v; got q {p.q.shape[2]}, k "
            f"{p.k.shape[2]}, v {H}."
        )
    K = p.k.shape[-1]
    _check_shape("delta_rule", "beta", p.beta, [[B, rows, H]])
    _check_shape("delta_rule", "erase_key", p.erase, [[B, rows, p.k.shape[2], K]])
    tokens = p.q.shape[1]
    _check_shape("delta_rule", "decay", p.decay, [[B, tokens, H], [B, tokens, H, K]])
    _check_state("delta_rule", p)


def check_untied(p: Untied) -> None:
    """Raise FlameError naming the argument at fault."""
    _check_rows("dplr_delta_rule", p.q, p.k, p.v, 1, p.cu_seqlens)
    wanted = [[*p.v.shape[:3], p.k.shape[-1]]]
    for name, x in (("q", p.q), ("k", p.k), ("a", p.a), ("b", p.b), ("key_decay", p.decay)):
        _check_shape("dplr_delta_rule", name, x, wanted)
    _check_state("dplr_delta_rule", p)


WIDEST_KEY = 256  # channels of a key that the kernels hold in registers


def kernels_cover(p: Problem) -> bool:
    """Whether the Triton path has this form: 16-bit inputs (fp32 only where kernels are interpreted), keys up to 256
    channels, up to 128 with a decay per channel."""
    by_channel = isinstance(p, Untied) or (p.decay is not None and p.decay.dim() == 4)
    rows = [p.q, p.k, p.v, *((p.a, p.b) if isinstance(p, Untied) else () if p.erase is None else (p.erase,))]
    narrow = p.q.dtype in (torch.bfloat16, torch.float16) or (p.q.dtype == torch.float32 and not p.q.is_cuda)
    one_dtype = all(x.dtype == p.q.dtype for x in rows)
    return narrow and one_dtype and p.k.shape[-1] <= (128 if by_channel else WIDEST_KEY) and p.q.shape[1] > 0


def _check_rows(op: str, q: Tensor, k: Tensor, v: Tensor, steps: int, cu_seqlens: Tensor | None) -> None:
    B, T = q.shape[:2]
    if v.dim() != 4 or k.shape[:2] != (B, T * steps) or v.shape[:2] != k.shape[:2] or q.shape[-1] != k.shape[-1]:
        shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
        raise FlameError(f"{op}: q, k [B, T, H, K] and v [B, T, H, V] do not fit together; got {shapes}.")
    if cu_seqlens is not None and (B != 1 or cu_seqlens.dim() != 1):
        raise FlameError(
            f"{op}: cu_seqlens [N + 1] packs documents into one row, so B must be 1; got B={B} and cu_seqlens "
            f"{list(cu_seqlens.shape)}. Flatten the batch into the time dimension."
        )


def _check_shape(op: str, name: str, x: Tensor | None, wanted: list[list[int]]) -> None:
    if x is not None and list(x.shape) not in wanted:
        raise FlameError(f"{op}: {name} must be {' or '.join(map(str, wanted))}, got {list(x.shape)}.")


def _check_state(op: str, p: Problem) -> None:
    wanted = [sequences(p), p.heads, p.k.shape[-1], p.v.shape[-1]]
    if p.initial_state is not None and list(p.initial_state.shape) != wanted:
        raise FlameError(f"{op}: initial_state must be [N, H, K, V] = {wanted}, got {list(p.initial_state.shape)}.")
