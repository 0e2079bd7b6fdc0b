"""Log-linear attention: a state for every block of a Fenwick tree over the past, log2(T) of them (Guo et al., 2506.04761)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from flame.kernels.backend import select_backend
from flame.kernels.head_exchange import whole_rows
from flame.kernels.log_linear_attention.chunked import chunked
from flame.kernels.log_linear_attention.levels import by_levels
from flame.kernels.log_linear_attention.problem import LevelStates, Problem, check, kernels_cover
from flame.kernels.log_linear_attention.reference import recurrence
from flame.kernels.normalization import l2_norm
from flame.kernels.sequence import SequenceShard, refuse_states

__all__ = ["LevelStates", "log_linear_attention", "log_linear_delta_rule"]

_BACKENDS = ("triton", "chunked", "reference")


def log_linear_attention(  # noqa: PLR0913 (the options of linear attention)
    q: Tensor,
    k: Tensor,
    v: Tensor,
    level_weights: Tensor,
    *,
    scalar_decay: Tensor | None = None,
    scale: float | None = None,
    initial_state: LevelStates | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
    shard: SequenceShard | None = None,
) -> tuple[Tensor, LevelStates | None]:
    """``o_t = scale * sum_{u <= t} level_weights[t, l(t, u)] exp(g_{u+1} + .. + g_t) (q_t . k_u) v_u``.

    l(t, t) = 0, otherwise l(t, u) is one more than the highest bit in which t and u differ, counted from the document's
    start: the past of t is cut into one block for every set bit of t, the nearest being the smallest. The last level also
    stands for all higher ones, so that any length works with any number of levels.

    Args:
        q: [B, T, Hq, K], fp32, bf16, fp16 or fp64; k: [B, T, Hk, K]; v: [B, T, H, V], Hq and Hk dividing H. Head h of v uses
            head h // (H / Hq) of q.
        level_weights: [B, T, H, L], L >= 2; L = 1 + ceil(log2 T) gives every level its own.
        scalar_decay: g [B, T, H], natural log, <= 0.
        scale: K ** -0.5 when None.
        initial_state: from an earlier call, with the same L. The tokens are then taken one at a time.
        output_final_state: also return the states after the last token, in fp32.
        cu_seqlens: [N + 1] int32 token bounds of the documents packed into the one row of B = 1; they never meet.
        backend: 'triton' (for heads above 128 one pass of the plain op's kernels a level; 'chunked' where states are asked
            for), 'chunked' or 'reference'; None chooses by device (see `select_backend`).
        shard: this rank's part of a sequence cut over ranks (`flame.kernels.sequence`): computes as if it were whole,
            cu_seqlens being the bounds in this part. Excludes states.

    Every floating argument is differentiable, the final states too.

    Returns:
        o [B, T, H, V] in v's dtype, and the final states or None.

    Raises:
        FlameError: shapes that do not fit.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    p = Problem("log_linear_attention", q, k, v, level_weights, scalar_decay, None, scale, initial_state, cu_seqlens)
    return _solve(p, output_final_state, backend, shard)


def log_linear_delta_rule(  # noqa: PLR0913 (the options of the delta rule)
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    level_weights: Tensor,
    *,
    scalar_decay: Tensor | None = None,
    normalize: bool = False,
    scale: float | None = None,
    initial_state: LevelStates | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
    shard: SequenceShard | None = None,
) -> tuple[Tensor, LevelStates | None]:
    """``o_t = scale * sum_{u <= t} level_weights[t, l(t, u)] (q_t^T A_t .. A_{u+1} k_u) beta_u v_u``, the gated delta rule
    (A_t = exp(g_t) (I - beta_t k_t k_t^T)) with the levels of `log_linear_attention`; weights of 1 give the delta rule.

    Args:
        q, k: [B, T, Hk, K], Hk dividing v's H.
        beta: [B, T, H] write strength.
        normalize: divide q and k by sqrt(their sum of squares + 1e-6) first.

    The others, and what is returned and raised, are as in `log_linear_attention`.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if normalize:
        q, k = l2_norm(q), l2_norm(k)
    p = Problem("log_linear_delta_rule", q, k, v, level_weights, scalar_decay, beta, scale, initial_state, cu_seqlens)
    return _solve(p, output_final_state, backend, shard)


def _solve(
    p: Problem, final: bool, backend: str | None, shard: SequenceShard | None = None
) -> tuple[Tensor, LevelStates | None]:
    check(p)
    if shard is not None:
        refuse_states(p.op, p.initial, final)
        return _whole_rows(p, backend, shard), None
    name = select_backend(p.q, backend, _BACKENDS)
    if name == "reference" or p.initial is not None or p.q.shape[1] == 0:
        o, states = recurrence(p)
        return o, states if final else None
    if name == "triton" and not final and p.v.dtype != torch.float64:
        if kernels_cover(p):
            from flame.kernels.log_linear_attention.triton_op import log_linear_attention_triton

            return log_linear_attention_triton(p), None
        return by_levels(p), None
    return chunked(p, final)


def _whole_rows(p: Problem, backend: str | None, shard: SequenceShard) -> Tensor:
    """Levels are counted from a document's start and need all of its tokens, but heads do not depend on one another."""
    names = ["q", "k", "v", *(name for name in ("decay", "beta") if getattr(p, name) is not None)]

    def attend(own: Sequence[Tensor], others: Sequence[Tensor], bounds: Tensor | None) -> Tensor:
        part = replace(p, weights=own[0], cu_seqlens=bounds, **dict(zip(names, others)))
        return _solve(part, False, backend)[0]

    return whole_rows(attend, [p.weights], [getattr(p, name) for name in names], p.cu_seqlens, shard)
