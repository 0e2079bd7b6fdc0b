"""Softmax attention with Householder positions: PaTH (Yang et al., arXiv 2505.16381)."""

from __future__ import annotations

import torch
from torch import Tensor

from flame.errors import FlameError
from flame.kernels.backend import select_backend
from flame.kernels.head_exchange import whole_rows
from flame.kernels.path_attention import chunked, reference
from flame.kernels.path_attention.problem import Problem
from flame.kernels.path_attention.triton_op import path_tree
from flame.kernels.sequence import SequenceShard

__all__ = ["path_attention", "transport_keys"]


def path_attention(  # noqa: PLR0913
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    beta: Tensor,
    *,
    log_forget: Tensor | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
    shard: SequenceShard | None = None,
) -> Tensor:
    """Causal attention with score (i, j) = ``scale * (k_j^T H_{j+1} ... H_i q_i + sum of log_forget over j + 1 .. i)``.

    H_t = I - beta_t w_t w_t^T. A decode step passes the new queries with all keys: the first Tk - Tq of them are cached ones
    that `transport_keys` has moved to the newest cached position.

    Args:
        q: `[B, Tq, H, K]`.
        k: `[B, Tk, Hk, K]`, Tk >= Tq, the last query aligned with the last key; Hk divides H.
        v: `[B, Tk, Hk, V]`.
        w: `[B, Tq, Hk, K]` directions of unit length, fp32 or wider.
        beta: `[B, Tq, Hk]` in [0, 2], fp32 or wider.
        log_forget: `[B, Tk, H]` fp32, <= 0, one gate a query head, of all keys; None for no gate.
        scale: of the whole score, gates included; K^-0.5 by default.
        cu_seqlens: `[N + 1]` boundaries of packed documents (B = 1, Tq = Tk).
        backend: 'triton' (Tq = Tk, heads up to 256), 'chunked' (with cu_seqlens it waits for the device) or 'reference';
            default by device.
        shard: this rank's part of a sequence cut over ranks (`flame.kernels.sequence`): computes as if it were whole,
            cu_seqlens being the bounds in this part.

    Returns:
        `[B, Tq, H, V]` in q.dtype. Gradients flow to every floating input.

    Raises:
        FlameError: shapes that do not fit together, or an unknown backend.
    """
    if shard is not None:
        gates = [] if log_forget is None else [log_forget]
        return whole_rows(
            lambda own, others, bounds: path_attention(
                own[0],
                *others[:4],
                log_forget=others[4] if gates else None,
                scale=scale,
                cu_seqlens=bounds,
                backend=backend,
            ),
            [q],
            [k, v, w, beta, *gates],
            cu_seqlens,
            shard,
        )
    _check(q, k, v, w, beta, log_forget, cu_seqlens)
    problem = Problem(q, k, v, w, beta, log_forget, q.shape[-1] ** -0.5 if scale is None else scale, cu_seqlens)
    chosen = select_backend(q, backend)
    tiled = chosen == "triton" and (backend is not None or _tiled(q, k, v))
    if tiled or (chosen == "chunked" and cu_seqlens is not None and torch.compiler.is_compiling()):
        return path_tree(q, k, v, w, beta, log_forget, cu_seqlens, problem.scale, tiled)[0]  # a graph for all packings
    return (reference if chosen == "reference" else chunked).path_attention(problem)


def _tiled(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return q.shape[1] == k.shape[1] and q.dtype != torch.float64 and max(q.shape[-1], v.shape[-1]) <= 256


def transport_keys(k: Tensor, w: Tensor, beta: Tensor) -> Tensor:
    """Keys moved to the last position, ``H_T ... H_{j+1} k_j``, as a decode cache holds them: `[B, Tk, Hk, K]` fp32.

    The first Tk - Tq keys are cached ones, moved to the position before the first of `w`.
    Shapes are those of `path_attention`. Keep the result in fp32: it is moved on at every step, and rounding adds up.
    """
    return chunked.transport_keys(k, w, beta)


def _check(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor, beta: Tensor, log_forget: Tensor | None, cu_seqlens: Tensor | None
) -> None:
    (B, Tq, H, K), (Tk, Hk) = q.shape, k.shape[1:3]
    if Tq > Tk or k.shape[:3] != v.shape[:3] or H % Hk or k.shape[0] != B or k.shape[3] != K:
        raise FlameError(
            "path_attention: needs q [B, Tq, H, K], k [B, Tk, Hk, K], v [B, Tk, Hk, V] with Tk >= Tq and Hk dividing H; "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}."
        )
    if w.shape != (B, Tq, Hk, K) or beta.shape != (B, Tq, Hk):
        raise FlameError(
            f"path_attention: w must be [B, Tq, Hk, K] = {(B, Tq, Hk, K)} and beta [B, Tq, Hk]; "
            f"got {tuple(w.shape)} and {tuple(beta.shape)}."
        )
    if log_forget is not None and log_forget.shape != (B, Tk, H):
        raise FlameError(
            f"path_attention: log_forget must be [B, Tk, H] = {(B, Tk, H)}; got {tuple(log_forget.shape)}."
        )
    if cu_seqlens is not None and (B != 1 or Tq != Tk):
        raise FlameError(f"path_attention: cu_seqlens needs B = 1 and Tq = Tk; got B = {B}, Tq = {Tq}, Tk = {Tk}.")
