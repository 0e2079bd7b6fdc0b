"""Causal softmax attention (Vaswani et al., arXiv 1706.03762) with grouped heads, windows and packed documents."""

from __future__ import annotations

import os

from torch import Tensor

from flame.errors import FlameError
from flame.kernels.backend import select_backend
from flame.kernels.softmax_attention import chunked, library, reference

__all__ = ["softmax_attention"]


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Every query sees the keys up to its own position, or the last `window` of them.

    Args:
        q: `[B, Tq, H, Dqk]`.
        k: `[B, Tk, Hk, Dqk]`, Tk >= Tq: the last query is aligned with the last key, so a decode step passes one query
            and the whole cache. Hk divides H; head h reads key head `h // (H / Hk)`.
        v: `[B, Tk, Hv, Dv]`, Hv divides H; Dv may differ from Dqk.
        scale: of the scores; Dqk^-0.5 by default.
        window: query i sees keys i - window + 1 .. i; None for all.
        cu_seqlens: `[N + 1]` boundaries of packed documents (B = 1, Tq = Tk); none sees another.
        max_seqlen: no document is longer; saves launching programs for documents as long as the row.
        backend: 'library' (torch's fast kernels, the default on a GPU where they can), 'chunked' (any device; with
            cu_seqlens it waits for the device) or 'reference'.

    Returns:
        `[B, Tq, H, Dv]` in q.dtype, softmax in fp32. Gradients flow to q, k and v.

    Raises:
        FlameError: shapes that do not fit together, a window under 1, an unknown backend.
    """
    _check(q, k, v, window, cu_seqlens)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if backend is None and q.is_cuda and "FLAME_BACKEND" not in os.environ:
        chosen = "library" if library.supports(q, k, v, window, cu_seqlens) else "chunked"
    else:
        chosen = select_backend(q, backend, ("chunked", "reference", "library"))
    if chosen == "library":
        return library.softmax_attention(q, k, v, scale, window, cu_seqlens, max_seqlen)
    return (chunked if chosen == "chunked" else reference).softmax_attention(q, k, v, scale, window, cu_seqlens)


def _check(q: Tensor, k: Tensor, v: Tensor, window: int | None, cu_seqlens: Tensor | None) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not (q.dim() == k.dim() == v.dim() == 4) or q.shape[3] != k.shape[3] or k.shape[:2] != v.shape[:2]:
        raise FlameError(
            f"softmax_attention: q [B, Tq, H, Dqk], k [B, Tk, Hk, Dqk], v [B, Tk, Hv, Dv] needed; got {shapes}."
        )
    if q.shape[0] != k.shape[0] or q.shape[1] > k.shape[1]:
        raise FlameError(f"softmax_attention: k needs the batch of q and at least as many tokens; got {shapes}.")
    if q.shape[2] % k.shape[2] or q.shape[2] % v.shape[2]:
        raise FlameError(f"softmax_attention: the heads of k and v must divide those of q; got {shapes}.")
    if window is not None and window < 1:
        raise FlameError(f"softmax_attention: window must be at least 1, or None for no window; got {window}.")
    if cu_seqlens is not None and (q.shape[0] != 1 or q.shape[1] != k.shape[1]):
        raise FlameError(f"softmax_attention: cu_seqlens needs B = 1 and Tq = Tk; got {shapes}.")
